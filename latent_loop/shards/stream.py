"""One split of a prepared folder as one long stream of tokens, of which any part can be read."""

import bisect
import functools
import io
import itertools
import resource
from collections.abc import Iterator

import numpy as np

from latent_loop import storage
from latent_loop.errors import BadInput, StoreFault
from latent_loop.shards import manifest
from latent_loop.shards.manifest import Manifest, Shard
from latent_loop.shards.records import ARRAY_ENDING, END, ROWS, TOKENS_ENDING, Reader, token_dtype
from latent_loop.storage import Path

INDEX_ENDING = '.index.npy'
_DESCRIPTION = f'{ARRAY_ENDING}/zarr.json'


class Stream:
  """Opens a shard when it is needed, and keeps so many open as the system's limit allows to several streams.

  Holds 8 bytes of memory for each document. Raises BadInput, naming the file, for what is not as it was written.
  """

  def __init__(self, folder: Path, of: Manifest, split: str):
    self._folder, self._shards, self._vocab_size = folder, of.of(split), of.vocab_size
    self._begins = [0, *itertools.accumulate(shard.tokens for shard in self._shards)]
    self._reader = functools.lru_cache(_most_open())(self._open)
    self._ends = functools.cache(lambda k: _read_ends(folder, self._shards[k]))
    self.num_documents = sum(shard.documents for shard in self._shards)

  def __len__(self) -> int:
    """Tokens."""
    return self._begins[-1]

  def read(self, start: int, stop: int) -> np.ndarray:
    """Tokens [start, stop) of the stream."""
    return np.concatenate([self._reader(k).read(a, b) for k, a, b in self._where(start, stop)])

  def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
    """[start, stop) cut where documents begin."""
    cuts = [start]
    for k, a, b in self._where(start, stop):
      ends = self._ends(k)
      first = int(np.searchsorted(ends, np.uint64(a), side='right'))
      while ends[first] < b:
        cuts.append(self._begins[k] + int(ends[first]))
        first += 1
      cuts.append(self._begins[k] + b)
    return list(itertools.pairwise(cuts))

  def document_ends(self) -> Iterator[np.ndarray]:
    """Where documents end in the stream, int64, shard after shard."""
    for k in range(len(self._shards)):
      yield self._begins[k] + self._ends(k).astype(np.int64)

  def _where(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(shard, start, stop) for the parts of [start, stop) in each shard."""
    k = bisect.bisect_right(self._begins, start) - 1
    while start < stop:
      end = min(stop, self._begins[k + 1])
      yield k, start - self._begins[k], end - self._begins[k]
      start, k = end, k + 1

  def _open(self, k: int) -> Reader:
    shard, dtype = self._shards[k], token_dtype(self._vocab_size)
    is_array = _DESCRIPTION in shard.files
    path = self._folder / (shard.name + (ARRAY_ENDING if is_array else TOKENS_ENDING))
    if is_array:
      _check_description(self._folder / (shard.name + _DESCRIPTION), shard)
    return Reader(path, dtype, shard.tokens, self._vocab_size)


def _most_open() -> int | None:
  """Readers that a stream keeps; a process has a stream for each split of each path."""
  limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return None if limit == resource.RLIM_INFINITY else max(limit // 32, 1)


def _check_description(path: Path, shard: Shard) -> None:
  """What an array is, is said in a file without a checksum of its own."""
  try:
    if manifest.facts(path) != tuple(shard.files[_DESCRIPTION]):
      raise ValueError('its size or SHA-256 is not that of the manifest')
  except StoreFault:
    raise
  except (OSError, ValueError) as error:
    raise BadInput(f'{path}: cannot be used ({error}); restore the file from a copy, or prepare it anew') from error


def _read_ends(folder: Path, shard: Shard) -> np.ndarray:
  """Where the documents of a shard end, by its index, which is small: its checksum is compared whenever it is read."""
  path = folder / (shard.name + INDEX_ENDING)
  try:
    if manifest.facts(path) != tuple(shard.files[INDEX_ENDING]):
      raise ValueError('its size or SHA-256 is not that of the manifest')
    if storage.is_local(path):
      index = np.load(path, mmap_mode='r')
    else:
      index = np.load(io.BytesIO(path.read_bytes()))
    if index.shape != (ROWS, shard.documents) or index[END, -1] != shard.tokens:
      raise ValueError(f'it has {index.shape} numbers where the manifest wants {(ROWS, shard.documents)}')
    return np.array(index[END])  # a mapping would keep its file open
  except StoreFault:
    raise
  except (OSError, ValueError) as error:
    raise BadInput(f'{path}: cannot be used ({error}); restore the file from a copy, or prepare it anew') from error
