"""Rows of several sources under one numbering, each with its share of the stream, exact over every window."""

import bisect
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

  The first stream has floor(i p) of the first i places, p its share; the others share what is left in the same way. So
  the count of any stream is never further than 2 from its share of the places so far.
  """

  def __init__(self, streams: list[Sequence[int]], weights: Sequence[float]):
    exact = [Fraction(str(weight)) for weight in weights]
    left = list(itertools.accumulate(reversed(exact)))[::-1]
    self._streams, self._shares = streams, [weight / rest for weight, rest in zip(exact, left, strict=True)]

  def __getitem__(self, place: int) -> int:
    for stream, share in zip(self._streams, self._shares, strict=True):
      before = place * share.numerator // share.denominator
      if (place + 1) * share.numerator // share.denominator > before:
        return stream[before]
      place -= before
    raise AssertionError('the last share is 1')
