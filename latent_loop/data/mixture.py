"""Rows of several sources under one numbering, each with the share it has of the stream."""

import bisect
import itertools

from latent_loop.data.packing import Row


class Mixture:
  """parts: (the row numbers of a source, its weight) of each. A source that ends begins its next epoch by itself."""

  def __init__(self, sources: list, weights: tuple[float, ...]):
    self._sources = sources
    self._begins = [0, *itertools.accumulate(map(len, sources))]
    ranges = [range(a, b) for a, b in itertools.pairwise(self._begins)]
    self.parts = tuple(zip(ranges, weights or map(float, map(len, sources)), strict=True))

  def __len__(self) -> int:
    return self._begins[-1]

  def __getitem__(self, index: int) -> Row:
    source = bisect.bisect_right(self._begins, index) - 1
    return self._sources[source][index - self._begins[source]]
