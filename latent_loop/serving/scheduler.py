"""The thread that owns the board: jobs in through a bounded queue, answers out as they grow."""

import collections
import math
import threading
import time
from collections.abc import Callable

from latent_loop.errors import BadInput
from latent_loop.inference.board import Board
from latent_loop.inference.engine import Answer, Request

_TURN = 8  # iterations between two looks at the queue
_NAP_SECS = 0.2  # how late a stop is noticed by a scheduler without work


class Busy(RuntimeError):
  """The queue is full: come again later."""


class Closing(RuntimeError):
  """The server stops."""


class Job:
  """A request on its way. answer: the newest, all tokens so far. error: why there will be no more.

  on_change is called from the scheduler's thread after each change.
  """

  def __init__(self, request: Request, on_change: Callable[[], None]):
    self.request, self.on_change = request, on_change
    self.answer: Answer | None = None
    self.error: Exception | None = None
    self.cancelled = False

  @property
  def done(self) -> bool:
    return self.error is not None or (self.answer is not None and self.answer.finish is not None)

  def tell(self, answer: Answer | None = None, error: Exception | None = None) -> None:
    self.answer, self.error = answer or self.answer, error
    self.on_change()


class Scheduler:
  """Start it once; `submit` and `cancel` may be called from any thread."""

  def __init__(self, board: Board, queue: int):
    """queue: how many may wait while all slots are taken."""
    self._board, self._queue = board, queue
    self._waiting: collections.deque[Job] = collections.deque()
    self._running: dict[int, Job] = {}
    self._changed = threading.Condition()
    self._deadline = math.inf  # set by `close`: then what still runs is cut off
    self._closing = False
    self._thread = threading.Thread(target=self._work, name='scheduler', daemon=True)

  @property
  def takes_jobs(self) -> bool:
    return not self._closing and self._thread.is_alive()

  def start(self) -> None:
    self._thread.start()

  def submit(self, job: Job) -> None:
    """Raises BadInput for what the board cannot answer, Busy, Closing."""
    self._board.check(job.request)
    with self._changed:
      if not self.takes_jobs:
        raise Closing('the server is stopping; ask another, or this one once it is back')
      if len(self._waiting) >= self._queue + len(self._board.requests) - len(self._running):
        raise Busy(f'{len(self._running)} answers are being made and {len(self._waiting)} wait; come again soon')
      self._waiting.append(job)
      self._changed.notify()

  def cancel(self, job: Job) -> None:
    """Nobody wants the answer any more: its slot is free within one turn."""
    job.cancelled = True

  def load(self) -> dict[str, int]:
    """How many slots there are and are busy, how many jobs wait."""
    with self._changed:
      return {'slots': len(self._board.requests), 'busy': len(self._running), 'queued': len(self._waiting)}

  def close(self, within_secs: float) -> None:
    """No new jobs; those that run may go on for so long. Takes no lock: a signal handler may call it."""
    self._deadline = min(self._deadline, time.monotonic() + within_secs)
    self._closing = True

  def join(self) -> None:
    self._thread.join()

  def _work(self) -> None:
    try:
      while not self._closing or (self._running and time.monotonic() < self._deadline):
        self._turn()
    finally:
      self._closing = True
      with self._changed:
        left = [*self._running.values(), *self._waiting]
        self._running.clear()
        self._waiting.clear()
      for job in left:
        job.tell(error=Closing('the server stopped before this answer was complete'))

  def _turn(self) -> None:
    try:
      for slot in [slot for slot, job in self._running.items() if job.cancelled]:
        self._board.release(slot)
        self._leave(slot)
      self._admit()
      if self._running:
        self._advance()
    except RuntimeError as error:  # of the device, such as out of memory: the buffers may be gone
      with self._changed:
        jobs = list(self._running.values())
        self._running.clear()
      for job in jobs:
        job.tell(error=RuntimeError(f'the device failed ({" ".join(str(error).split())[:200]}); ask again'))
      self._board.clear()  # may fail as well; then the server ends

  def _admit(self) -> None:
    """Waiting jobs into free slots, few enough to hold nobody up; sleeps when there is nothing at all to do."""
    for _ in self._board.requests:
      with self._changed:
        if not self._waiting and not self._running:
          self._changed.wait(_NAP_SECS)
        for job in [job for job in self._waiting if job.cancelled or self._closing]:
          self._waiting.remove(job)
          job.tell(error=Closing('the server is stopping; ask another, or this one once it is back'))
        free = self._board.free
        if not self._waiting or not free:
          return
        job = self._waiting.popleft()
        self._running[free[0]] = job
      try:
        answer = self._board.admit(free[0], job.request)
      except BadInput as error:
        self._leave(free[0])
        job.tell(error=error)
        continue
      if answer.finish is not None:
        self._leave(free[0])
      job.tell(answer)

  def _advance(self) -> None:
    for slot, answer in self._board.advance(_TURN).items():
      job = self._running[slot]
      if answer.finish is not None:
        self._leave(slot)
      if job.answer is None or len(answer.tokens) > len(job.answer.tokens) or answer.finish is not None:
        job.tell(answer)

  def _leave(self, slot: int) -> None:
    with self._changed:
      del self._running[slot]
