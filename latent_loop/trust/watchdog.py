"""A thread that ends a process in which nothing moves any more, with a patience that follows the depth.

A step of n iterations without gradient takes about a + b n seconds; a and b are fitted while the run goes. The thread
counts its own turns, not the clock: while the whole process is stopped, no time passes.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from latent_loop.config import GuardConfig
from latent_loop.exit_codes import HANG

TURN_SECS = 1.0
STEP = ('data', 'dispatch', 'device', 'peers')  # phases of a step; any other is waited for by itself
SAVE_UNDER_WAY = 'wait for a save'  # how long that takes says when the save began, and not how long the next one may
ENOUGH = 8  # steps, before the fit is believed
_FORGET = 0.99  # what a step counts for, one step later


class StepTime:
  """Seconds of a step as a + b n: least squares over the steps so far, the late ones counting most."""

  def __init__(self):
    self.count, self._sums = 0, (0.0,) * 5

  def add(self, n: int, secs: float) -> None:
    self.count += 1
    new = (1, n, n * n, secs, n * secs)
    self._sums = tuple(_FORGET * old + value for old, value in zip(self._sums, new, strict=True))

  def expect(self, n: int) -> float:
    """Seconds of a step at n; 0 before the first."""
    if not self.count:
      return 0.0
    w, n_sum, nn_sum, secs, n_secs = self._sums
    mean_n, mean = n_sum / w, secs / w
    spread = nn_sum / w - mean_n**2
    b = max((n_secs / w - mean_n * mean) / spread, 0.0) if spread > 1e-6 else 0.0
    return max(mean - b * mean_n, 0.0) + b * n


class Watchdog:
  """Told of every phase and every step; on silence prints all stacks and ends the process with exit code HANG.

  told: called with the code first, so that other processes hear of it. The rest is replaced in tests.
  """

  def __init__(
    self,
    cfg: GuardConfig,
    told: Callable[[int], None] = lambda code: None,
    clock: Callable[[], float] = time.monotonic,
    end: Callable[[int], None] = os._exit,
  ):
    self._cfg, self._told, self._clock, self._end = cfg, told, clock, end
    self._steps, self._read_one, self._next_n = StepTime(), False, 0
    self._phase, self._since, self._silence = 'start', clock(), 0.0
    self._spent: dict[str, float] = {}  # seconds by phase since the last step was read
    self._longest: dict[str, float] = {}  # of each phase that is no part of a step
    self.slow_steps = 0
    self._closed, self._barking = threading.Event(), threading.Lock()

  def __enter__(self) -> 'Watchdog':
    threading.Thread(target=self._watch, name='watchdog', daemon=True).start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._closed.set()

  def phase(self, name: str) -> float:
    """What the process does from now on; returns the seconds of the phase that ends."""
    now = self._clock()
    secs, ended = now - self._since, self._phase
    if ended in STEP:
      self._spent[ended] = self._spent.get(ended, 0.0) + secs
    else:
      self._longest[ended] = max(self._longest.get(ended, 0.0), secs)
    self._phase, self._since, self._silence = name, now, 0.0
    return secs

  def step_done(self, n: int, next_n: int) -> str | None:
    """A step of n iterations without gradient was read, one of next_n is under way; a sentence when it was slow."""
    self.phase(self._phase)
    spent, self._spent = self._spent, {}
    secs, first = sum(spent.values()), not self._read_one
    self._next_n, self._read_one = next_n, True
    if first:
      return None  # it was compiled
    expected, known = self._steps.expect(n), self._steps.count >= ENOUGH
    most = self._cfg.slow_factor * expected
    self._steps.add(n, min(secs, most) if known else secs)  # one hiccup must not make the fit believe anything
    if not known or secs <= most:
      return None
    self.slow_steps += 1
    where = max(spent, key=spent.get)
    return (
      f'slow: {secs:.2f} s where n={n} explains {expected:.2f} s; {spent[where]:.2f} s of it in phase {where!r} '
      f'({self.slow_steps} slow steps since the start)'
    )

  def patience(self) -> float:
    """Seconds that the phase under way may take."""
    cfg = self._cfg
    if self._phase in STEP:
      known, expected = self._steps.count >= ENOUGH, self._steps.expect(self._next_n)
    else:
      known = self._phase in self._longest and self._phase != SAVE_UNDER_WAY
      expected = self._longest.get(self._phase, 0.0)
    return max(cfg.patience_secs, cfg.patience_factor * expected) if known else cfg.startup_secs

  def turn(self, secs: float = TURN_SECS) -> None:
    """`secs` more of silence, and the end when that is too much."""
    self._silence += secs
    if self._silence > self.patience():
      self.bark(f'nothing has moved for {self._silence:.0f} s, more than the depth explains')

  def bark(self, reason: str) -> None:
    """All stacks, the phase, the end. The first call counts: a peer's alarm may come at the same moment."""
    if not self._barking.acquire(blocking=False):
      return
    self._told(HANG)
    print(
      f'error: {reason}; this process is in phase {self._phase!r}. Stacks of all threads:', file=sys.stderr, flush=True
    )
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    print(
      f'error: ends with exit code {HANG}; start the same command again, everywhere: it continues from the last save',
      file=sys.stderr,
      flush=True,
    )
    self._end(HANG)

  def _watch(self) -> None:
    while not self._closed.wait(TURN_SECS):
      self.turn()
