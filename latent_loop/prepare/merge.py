"""A range of digests, over all units, to the shards of both splits: duplicates go, the rest is in digest order.

Only the tables of documents are held in memory; tokens go from file to file.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latent_loop.prepare import units
from latent_loop.shards import records
from latent_loop.shards.manifest import SPLITS
from latent_loop.shards.records import ARRAY_ENDING, END, FILE, HIGH, LOW, TOKENS_ENDING
from latent_loop.shards.stream import INDEX_ENDING

_OPEN_FILES = 200


@dataclasses.dataclass(frozen=True)
class Range:
  """Shard `number` of `count`: equal parts of the range of digests. segments: in the order of the input.

  format: 'arrayrecord' or 'zarr3'.
  """

  number: int
  count: int
  segments: tuple[str, ...]
  dtype: str
  validation_fraction: float
  format: str

  @property
  def key(self) -> str:
    return 'shard-' + hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()[:24]

  @property
  def bounds(self) -> tuple[int, int]:
    """First and last value of the digest's high half."""
    return -(-(self.number << 64) // self.count), -(-((self.number + 1) << 64) // self.count) - 1


def do(part: Range, work: Path, output: Path) -> dict:
  """Writes the shards of `part` in `output`, unless the mark in `work` says that they are there; returns the mark.

  The mark: 'duplicates' {file: (count, bytes)} and 'shards' [{name, documents, tokens, records}].
  """
  if (mark := units.read_mark(work, part.key, output)) is not None:
    return mark
  table, duplicates = _documents(part, work)
  held_out = table[LOW] < np.uint64(min(int(part.validation_fraction * 2**64), 2**64 - 1))
  shards, files = [], []
  for split, mine in zip(SPLITS, (~held_out, held_out), strict=True):
    name = f'{split}-{part.number:05}'
    if mine.any():
      shard, names = _write(output, name, table[:, mine], part, work)
      shards.append(shard)
      files += names
  found = {}
  for number, num_bytes in duplicates.T.tolist():
    count, total = found.get(str(number), (0, 0))
    found[str(number)] = (count + 1, total + num_bytes)
  return units.write_mark(work, part.key, output, files, {'duplicates': found, 'shards': shards})


_SEGMENT = units.NUM_BYTES + 1  # a last row, added here: which segment holds the document


def _documents(part: Range, work: Path) -> tuple[np.ndarray, np.ndarray]:
  """(the table of the documents in the range, by digest, each once; file and bytes of those that came again)."""
  low, high = part.bounds
  tables = []
  for number, segment in enumerate(part.segments):
    table = np.load(work / units.names(segment)[1], mmap_mode='r')
    first, last = np.searchsorted(table[HIGH], np.array([low, high], np.uint64), side='left')
    last += np.searchsorted(table[HIGH, last:], np.uint64(high), side='right')
    slice_ = np.asarray(table[:, first:last])
    tables.append(np.concatenate([slice_, np.full((1, slice_.shape[1]), number, np.uint64)]))
  table = np.concatenate(tables, axis=1)
  table = table[:, units.in_order(table)]
  again = np.zeros(table.shape[1], bool)
  again[1:] = (table[HIGH, 1:] == table[HIGH, :-1]) & (table[LOW, 1:] == table[LOW, :-1])
  return table[:, ~again], table[[FILE, units.NUM_BYTES]][:, again]


def _write(output: Path, name: str, table: np.ndarray, part: Range, work: Path) -> tuple[dict, list[str]]:
  """(what the mark says of a shard, the names of its files)."""
  index = table[: records.ROWS].copy()
  index[END] = np.cumsum(table[units.NUM_TOKENS])
  tokens, length = _tokens(table, part, work), int(index[END, -1])
  if part.format == 'zarr3':
    array = name + ARRAY_ENDING
    files = [f'{array}/{file}' for file in records.write_array(output / array, tokens, np.dtype(part.dtype), length)]
  else:
    files = [name + TOKENS_ENDING]
    records.write_tokens(output / files[0], tokens)
  records.write_index(output / (name + INDEX_ENDING), index)
  count = -(-length // records.RECORD_TOKENS)
  shard = {'name': name, 'documents': table.shape[1], 'tokens': length, 'records': count}
  return shard, [*files, name + INDEX_ENDING]


def _tokens(table: np.ndarray, part: Range, work: Path) -> Iterator[np.ndarray]:
  dtype = np.dtype(part.dtype)
  opened = functools.lru_cache(_OPEN_FILES)(lambda segment: (work / units.names(part.segments[segment])[0]).open('rb'))
  for end, num_tokens, segment in table[[END, units.NUM_TOKENS, _SEGMENT]].T.tolist():
    file = opened(segment)
    file.seek((end - num_tokens) * dtype.itemsize)
    yield np.frombuffer(file.read(num_tokens * dtype.itemsize), dtype)
