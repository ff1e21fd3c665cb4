"""Tasks done in parallel by processes of this machine, with a line now and then about how far they are."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable

from latent_loop.errors import BadInput
from latent_loop.interrupt import StopRequest

_SAY_SECS, _LOOK_SECS = 5.0, 0.2


class Stopped(Exception):
  """A signal came; what is done is kept."""


class Crew:
  """Does tasks, in processes of their own, and tells how far it is."""

  def __init__(self, processes: int, stop: StopRequest, say: Callable[[str], None]):
    self._processes, self._stop, self._say = processes, stop, say

  def do(self, function: Callable, tasks: list[tuple], sizes: list[int], title: str) -> list:
    """function(*task) of every task, in order. Raises what the first failing one raises, and Stopped."""
    began = said = time.monotonic()
    results, total = {}, sum(sizes)
    for i, result in self._results(function, tasks):
      if i is not None:
        results[i] = result
      if self._stop.requested():
        raise Stopped(f'stopped while {title}: {len(results)} of {len(tasks)} parts are')
      now, done = time.monotonic(), sum(sizes[i] for i in results)
      if now - said >= _SAY_SECS:
        said, secs = now, now - began
        left = f', {int(secs * (total - done) / done)} s left' if done else ''
        self._say(f'{title}: {len(results)} of {len(tasks)} parts, {done / max(total, 1):.0%}, {secs:.0f} s{left}')
    return [results[i] for i in range(len(tasks))]

  def _results(self, function: Callable, tasks: list[tuple]) -> Iterable[tuple[int | None, object]]:
    """(which task, its result) as they come, and (None, None) now and then."""
    if self._processes == 1:
      yield from ((i, function(*task)) for i, task in enumerate(tasks))
      return
    # Not forked: the parent may have threads. Workers leave when the parent is gone, however it went.
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(self._processes, context, _start_worker) as pool:
      try:
        waiting = {pool.submit(function, *task): i for i, task in enumerate(tasks)}
        while waiting:
          done, _ = concurrent.futures.wait(waiting, _LOOK_SECS, concurrent.futures.FIRST_COMPLETED)
          yield None, None
          yield from ((waiting.pop(future), future.result()) for future in done)
      except concurrent.futures.process.BrokenProcessPool as error:
        raise BadInput(
          'a worker process was killed, perhaps for its memory; what is done is kept: start the same command again, '
          'with fewer --processes if it happens again'
        ) from error
      finally:
        for process in multiprocessing.active_children():
          process.kill()  # after the last result they are idle; after a failure nobody waits for them


def _start_worker() -> None:
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)  # the parent decides
  parent = multiprocessing.parent_process()
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
