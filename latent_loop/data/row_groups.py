"""Rows of token ids in parquet files, read at random: a row group is read whole, and the newest ones are kept."""

import bisect
import hashlib
import itertools
import os
import threading
from typing import NamedTuple

import numpy as np

from latent_loop import optional
from latent_loop.errors import BadInput

_KEPT_BYTES = 2**30  # of rows in memory; one row group is always kept
_ROWS_AT_ONCE = 512
_REMEDY = 'correct or replace the file'


class Group(NamedTuple):
  """Row group `number` of a file, whose first row is row `first` of the file."""

  path: str
  number: int
  first: int
  rows: int


class RowGroups:
  """One numbering of the rows of `paths`; each is `row_tokens` ids below `vocab_size` in the column `column`.

  Raises BadInput, with file and row, for rows that are not: where the file's own footer shows it at once, else when
  the row is read.
  """

  def __init__(self, paths: list[str], column: str, row_tokens: int, vocab_size: int):
    optional.load('pyarrow', 'data', f'{paths[0]}' if paths else 'parquet')
    self._column, self._row_tokens, self._vocab_size = column, row_tokens, vocab_size
    self._dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    self._kept: dict[int, np.ndarray] = {}  # oldest first
    self._lock = threading.Lock()  # pyarrow reads one group by several threads of its own
    self.groups: list[Group] = []
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
      self.groups += self._open(path, digest)
    self.begins = [0, *itertools.accumulate(group.rows for group in self.groups)]
    self.fingerprint = digest.hexdigest()  # of the footers, which hold sizes and statistics, not of every token

  def __len__(self) -> int:
    return self.begins[-1]

  def __getitem__(self, row: int) -> np.ndarray:
    """The ids of a row, [row_tokens]."""
    k = bisect.bisect_right(self.begins, row) - 1
    with self._lock:
      if k in self._kept:
        self._kept[k] = self._kept.pop(k)  # now the newest
      else:
        self._kept[k] = self._read(self.groups[k])
        while len(self._kept) > 1 and sum(rows.nbytes for rows in self._kept.values()) > _KEPT_BYTES:
          del self._kept[next(iter(self._kept))]
      return self._kept[k][row - self.begins[k]]

  def _open(self, path: str, digest) -> list[Group]:
    """The row groups of a file, by its footer; reads those that the footer says hold something else."""
    import pyarrow
    from pyarrow import parquet

    try:
      with open(path, 'rb') as file:
        meta = parquet.read_metadata(file)
        file.seek(-meta.serialized_size - 8, os.SEEK_END)
        digest.update(file.read())
      self._check_type(path, meta.schema.to_arrow_schema())
    except (OSError, pyarrow.ArrowException) as error:
      raise BadInput(f'{path}: not a whole parquet file ({error}); {_REMEDY}') from error
    counts = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
    firsts = itertools.accumulate(counts[:-1], initial=0)
    groups = [Group(path, *facts) for facts in zip(range(len(counts)), firsts, counts, strict=False)]
    for group in groups:
      if not self._likely(meta.row_group(group.number), group.rows):
        self._read(group)  # names the row
    return [group for group in groups if group.rows]

  def _check_type(self, path: str, schema) -> None:
    from pyarrow import types

    kinds = {field.name: field.type for field in schema}
    if self._column not in kinds:
      raise BadInput(
        f'{path}: no column {self._column!r} (it has: {", ".join(kinds)}); name the one of token ids with '
        'config.data.column'
      )
    kind = kinds[self._column]
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not is_list or not types.is_integer(kind.value_type):
      raise BadInput(
        f'{path}: column {self._column!r} is {kind}, not lists of token ids; name another with config.data.column, or '
        'prepare text with launch.prepare_data'
      )

  def _likely(self, group, rows: int) -> bool:
    """Whether the footer agrees with what the rows should be, as far as it says."""
    columns = [group.column(i) for i in range(group.num_columns)]
    chunks = [one for one in columns if f'{one.path_in_schema}.'.startswith(f'{self._column}.')]
    if len(chunks) != 1:  # a column 'a' beside one 'a.b': only the rows tell
      return False
    (chunk,) = chunks
    numbers = chunk.statistics if chunk.is_stats_set else None
    fits = numbers is None or not numbers.has_min_max or 0 <= numbers.min <= numbers.max < self._vocab_size
    fits = fits and not (numbers and numbers.null_count)
    return fits and chunk.num_values == rows * self._row_tokens

  def _read(self, group: Group) -> np.ndarray:
    """[rows, row_tokens]. A page is compared with its checksum where the file has them."""
    import pyarrow
    from pyarrow import parquet

    out, done = np.empty((group.rows, self._row_tokens), self._dtype), 0
    try:
      with parquet.ParquetFile(group.path, page_checksum_verification=True) as table:
        for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=[group.number], columns=[self._column]):
          out[done : done + len(batch)] = self._checked(batch.column(0), group.path, group.first + done)
          done += len(batch)
    except (OSError, pyarrow.ArrowException) as error:
      where = f'{group.path}, row group {group.number}, after row {group.first + done - 1}'
      raise BadInput(f'{where}: cannot be read ({error}); {_REMEDY}') from error
    return out

  def _checked(self, lists, path: str, first: int) -> np.ndarray:
    from pyarrow import compute

    lengths = compute.list_value_length(lists).fill_null(0).to_numpy()
    wrong = np.flatnonzero(lengths != self._row_tokens)
    if wrong.size:
      raise BadInput(
        f'{path}, row {first + wrong[0]}: it has {lengths[wrong[0]]} token ids, and a row of config.data.seq_len='
        f'{self._row_tokens - 1} needs {self._row_tokens}; set seq_len to one less than the rows have, or {_REMEDY}'
      )
    flat = lists.flatten()
    flat = flat.cast('int64').fill_null(-1) if flat.null_count else flat
    values = flat.to_numpy().reshape(-1, self._row_tokens)
    if values.min() < 0 or values.max() >= self._vocab_size:
      rows, places = np.nonzero((values < 0) | (values >= self._vocab_size))
      raise BadInput(
        f'{path}, row {first + rows[0]}: token {places[0]} is {values[rows[0], places[0]]}, and ids run from 0 to '
        f'{self._vocab_size - 1}; raise config.model.vocab_size, or {_REMEDY}'
      )
    return values
