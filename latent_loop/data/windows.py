"""An order for rows that are read in blocks: shuffled blocks, a window of them at a time, whose rows are shuffled."""

import bisect
import functools
import itertools

import numpy as np

_WINDOW_ROWS = 4096  # at least so many rows are shuffled together


class Windows:
  """Place in the endless stream -> row: a pure function of (blocks, seed, place). Each epoch is a new order."""

  def __init__(self, blocks: list[range], seed: int):
    self._blocks, self._seed = blocks, seed
    self._rows = sum(map(len, blocks))
    self._epoch = functools.lru_cache(2)(self._windows_of)
    self._window = functools.lru_cache(2)(self._rows_of)

  def __getitem__(self, place: int) -> int:
    epoch, place = divmod(place, self._rows)
    begins, _ = self._epoch(epoch)
    window = bisect.bisect_right(begins, place) - 1
    return int(self._window(epoch, window)[place - begins[window]])

  def _windows_of(self, epoch: int) -> tuple[list[int], list[list[int]]]:
    """(the place where each window of an epoch begins, its blocks)."""
    windows, sizes = [[]], [0]
    for block in np.random.default_rng([self._seed, epoch]).permutation(len(self._blocks)).tolist():
      if sizes[-1] >= _WINDOW_ROWS:
        windows.append([])
        sizes.append(0)
      windows[-1].append(block)
      sizes[-1] += len(self._blocks[block])
    return [0, *itertools.accumulate(sizes[:-1])], windows

  def _rows_of(self, epoch: int, window: int) -> np.ndarray:
    _, windows = self._epoch(epoch)
    rows = np.concatenate([np.arange(b.start, b.stop) for b in (self._blocks[i] for i in windows[window])])
    return np.random.default_rng([self._seed, epoch, window]).permutation(rows)
