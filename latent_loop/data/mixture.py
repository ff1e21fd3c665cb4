"""Rows of several sources under one numbering, each with its share of the stream, exact over every window."""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from fractions import Fraction

from latent_loop.data.packing import Row


class Mixture:
  """weights: the share of each source; none = as many rows as it has."""

  def __init__(self, sources: list, weights: tuple[float, ...]):
    self.sources = sources
    self._begins = [0, *itertools.accumulate(map(len, sources))]
    self.parts = [range(a, b) for a, b in itertools.pairwise(self._begins)]
    self.weights = weights or tuple(float(len(source)) for source in sources)

  def __len__(self) -> int:
    return self._begins[-1]

  def __getitem__(self, index: int) -> Row:
    source = bisect.bisect_right(self._begins, index) - 1
    return self.sources[source][index - self._begins[source]]


class Woven:
  """Several endless streams as one: place i is a pure function of i.

  changes: (the place from which other weights hold, those weights), in order. Each stream goes on where it was.
  """

  def __init__(
    self,
    streams: list[Sequence[int]],
    weights: Sequence[float],
    changes: Sequence[tuple[int, Sequence[float]]] = (),
  ):
    self._streams = streams
    self._phases = [_Phase(0, [0] * len(streams), _shares(weights))]
    for begin, new in changes:
      self._phases.append(_Phase(begin, self._phases[-1].read_before(begin), _shares(new)))
    self._begins = [phase.begin for phase in self._phases]

  def __getitem__(self, place: int) -> int:
    stream, index = self._phases[bisect.bisect_right(self._begins, place) - 1].at(place)
    return self._streams[stream][index]


@dataclasses.dataclass(frozen=True)
class _Phase:
  """From place `begin` on, where `read` is what each stream has given so far.

  The first stream has floor(i p) of the first i places, p its share; the others share what is left in the same way.
  """

  begin: int
  read: list[int]
  shares: list[Fraction]

  def at(self, place: int) -> tuple[int, int]:
    """(stream, which of its own) at a place."""
    place -= self.begin
    for stream, share in enumerate(self.shares):
      before = place * share.numerator // share.denominator
      if (place + 1) * share.numerator // share.denominator > before:
        return stream, self.read[stream] + before
      place -= before
    raise AssertionError('the last share is 1')

  def read_before(self, place: int) -> list[int]:
    """How much of each stream comes before a place."""
    left, out = place - self.begin, []
    for read, share in zip(self.read, self.shares, strict=True):
      count = left * share.numerator // share.denominator
      out.append(read + count)
      left -= count
    return out


def most_off(weights: Sequence[float]) -> list[float]:
  """How far the count of each stream can be from its share, at any place: 1 for two streams, 2 for three, and little
  more for any number of them where the large weights stand first.
  """
  left, out = 0.0, []  # what the streams before may have left too much; each leaves less than 1
  for share in map(float, _shares(weights)):
    out.append(max(1.0, share * left))
    left = left * (1 - share) + 1
  return out


def _shares(weights: Sequence[float]) -> list[Fraction]:
  """The share of each weight in what those before it leave; the last that is not 0 has 1."""
  exact = [Fraction(str(weight)) for weight in weights]
  left = list(itertools.accumulate(reversed(exact)))[::-1]
  return [weight / rest if weight else Fraction(0) for weight, rest in zip(exact, left, strict=True)]
