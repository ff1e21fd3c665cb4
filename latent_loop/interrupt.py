"""Ctrl-C and SIGTERM as a question the loop can ask, so that a stop comes between two steps."""

import signal


class StopRequest:
  """Within the context, `requested` tells whether a signal came; a second one acts as usual."""

  _SIGNALS = (signal.SIGINT, signal.SIGTERM)

  def __enter__(self) -> 'StopRequest':
    self.requested = False
    self._previous = {number: signal.signal(number, self._receive) for number in self._SIGNALS}
    return self

  def _receive(self, number: int, frame: object) -> None:
    self.requested = True
    signal.signal(number, self._previous[number])

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
