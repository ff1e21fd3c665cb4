"""Signals and a time limit as a question the loop can ask, so that a stop comes between two steps."""

import math
import signal
import time


class Stopped(BaseException):
  """A signal came while nothing was there to lose."""


class StopRequest:
  """Within the context, `requested()` tells whether a signal came, or time.monotonic() has passed `deadline`.

  A second Ctrl-C acts as usual. The other signals come from schedulers, which repeat them: they change nothing more.
  at_once: once it is set, the next signal raises Stopped. signaled: one came.
  """

  _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

  def __init__(self, deadline: float = math.inf):
    self._deadline, self.signaled, self.at_once = deadline, False, False

  def __enter__(self) -> 'StopRequest':
    self._previous = {number: signal.signal(number, self._receive) for number in self._SIGNALS}
    return self

  def requested(self) -> bool:
    return self.signaled or time.monotonic() >= self._deadline

  def _receive(self, number: int, frame: object) -> None:
    self.signaled = True
    if self.at_once:
      self.at_once = False
      raise Stopped
    if number == signal.SIGINT:
      signal.signal(number, self._previous[number])

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
