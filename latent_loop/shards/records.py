"""The files of a shard, written whole or not at all, and read at random; what is damaged is named."""

import contextlib
import itertools
import os
import types
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from latent_loop import storage
from latent_loop.errors import BadInput, StoreFault

TOKENS_ENDING, ARRAY_ENDING = '.arrayrecord', '.zarr'  # of a shard's tokens: one of both
RECORD_TOKENS = 2048
FILE_RECORDS = 4096  # of a zarr3 array: 16 to 32 MiB of tokens, which one process holds while it writes them
# Rows of an index, uint64 [ROWS, documents]: the end of a document in the shard's tokens, its digest, its file (a line
# of files.jsonl, from 0), and its place in that file (the byte of a line, the row of a table, or 0).
END, HIGH, LOW, FILE, PLACE = range(5)
ROWS = 5

_NO_THREADS = 'readahead_buffer_size:0,max_parallelism:0'  # random access: what is read ahead is thrown away


def token_dtype(vocab_size: int) -> np.dtype:
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


def write_tokens(path: Path, tokens: Iterable[np.ndarray]) -> None:
  """Writes the pieces of `tokens` as one shard; the same tokens, the same bytes."""
  with settled(path) as temporary:
    writer = ArrayRecordWriter(str(temporary), 'group_size:1,uncompressed')
    try:
      for record in _records(tokens):
        writer.write(record)
      writer.close()
    except RuntimeError as error:  # a full disk and the like, in its words
      raise OSError(f'{path}: {error}') from error


def write_array(path: Path, tokens: Iterable[np.ndarray], dtype: np.dtype, length: int) -> list[str]:
  """Writes `length` tokens as a zarr3 array, a folder, in which a record is a piece; returns the names of its files."""
  records, names = _records(tokens), []
  files = iter(lambda: b''.join(itertools.islice(records, FILE_RECORDS)), b'')
  for name, content in _arrays().encoded(files, dtype, length, (FILE_RECORDS * RECORD_TOKENS, RECORD_TOKENS)):
    place = path / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with settled(place) as temporary:
      temporary.write_bytes(content)
    names.append(name)
  return names


def _arrays() -> types.ModuleType:
  from latent_loop.storage import arrays  # only when there is one: it loads TensorStore

  return arrays


def write_index(path: Path, index: np.ndarray) -> None:
  with settled(path) as temporary, temporary.open('wb') as file:
    np.save(file, index)


@contextlib.contextmanager
def settled(path: Path) -> Iterator[Path]:
  """A file to write that becomes `path` at the end, or is gone.

  It is on the disk before it has its name: a mark that says it is whole may outlive a power failure. Until then its
  name is its writer's alone: two machines may write one file, the same bytes.
  """
  temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex[:12]}{storage.TEMPORARY}')
  try:
    yield temporary
    with temporary.open('rb') as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _records(tokens: Iterable[np.ndarray]) -> Iterator[bytes]:
  held, size = [], 0
  for piece in tokens:
    held.append(piece)
    size += len(piece)
    if size >= RECORD_TOKENS:
      whole = np.concatenate(held)
      full = size // RECORD_TOKENS * RECORD_TOKENS
      for start in range(0, full, RECORD_TOKENS):
        yield whole[start : start + RECORD_TOKENS].tobytes()
      held, size = [whole[full:]], size - full
  if size:
    yield np.concatenate(held).tobytes()


class Reader:
  """Random access to the tokens of one shard. Raises BadInput, with file and record, for what cannot be read."""

  def __init__(self, path: Path, dtype: np.dtype, tokens: int, vocab_size: int):
    self._path, self._dtype, self._tokens, self._vocab_size = path, dtype, tokens, vocab_size
    try:
      if path.suffix == ARRAY_ENDING:
        self._array, self._reader = _arrays().Array(path, dtype, tokens), None
      else:
        self._reader = ArrayRecordReader(str(path), options=_NO_THREADS)
    except (RuntimeError, ValueError) as error:
      raise _refusal(path, None, error) from error

  def read(self, start: int, stop: int) -> np.ndarray:
    """Tokens [start, stop) of the shard."""
    first, last = start // RECORD_TOKENS, (stop - 1) // RECORD_TOKENS
    pieces = [self._record(i) for i in range(first, last + 1)]
    skip = first * RECORD_TOKENS
    return np.concatenate(pieces)[start - skip : stop - skip]

  def _record(self, i: int) -> np.ndarray:
    start, stop = i * RECORD_TOKENS, min((i + 1) * RECORD_TOKENS, self._tokens)
    try:
      raw = self._reader.read([i])[0] if self._reader else self._array.read(start, stop).tobytes()
    except (RuntimeError, ValueError, IndexError) as error:
      raise _refusal(self._path, i, error) from error
    expected = (stop - start) * self._dtype.itemsize
    if len(raw) != expected:
      raise BadInput(_fault(self._path, i, f'it has {len(raw)} bytes where the manifest wants {expected}'))
    tokens = np.frombuffer(raw, self._dtype)
    if tokens.max() >= self._vocab_size:
      where = start + int(tokens.argmax())
      raise BadInput(
        _fault(self._path, i, f'token {where} is {tokens.max()}, and the vocabulary ends at {self._vocab_size - 1}')
      )
    return tokens


def _refusal(path: storage.Path, record: int | None, error: Exception) -> Exception:
  """What to raise: the store may have failed, and its content be whole."""
  if storage.is_fault(path, error):
    return StoreFault(f'{path}: the store did not read it ({error})')
  return BadInput(_fault(path, record, error))


def _fault(path: Path, record: int | None, reason: object) -> str:
  what = f'{path}' if record is None else f'{path}, record {record}'
  return f'{what}: cannot be read ({reason}); restore the file from a copy, or prepare the folder anew'
