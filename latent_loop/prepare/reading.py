"""A part of a file to documents, one at a time. What cannot be read is an error that names file and record."""

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from latent_loop import optional
from latent_loop.errors import BadInput
from latent_loop.prepare.inputs import Part

_ROWS_AT_ONCE = 256
# A line of JSON may need more bytes than its text (escapes, other keys); a longer one is not read to its end.
_LINE_FACTOR = 8


class Document(NamedTuple):
  """place: where in the file; a byte for lines, a row for tables. text: None = longer than is read; or ready token ids,
  int64, -1 where there is none.
  """

  place: int
  text: bytes | np.ndarray | None


def documents(part: Part, text_key: str, max_bytes: int) -> Iterator[Document]:
  """The documents of `part`; their text is not checked to be UTF-8. Raises BadInput."""
  try:
    if part.file.kind == 'text':
      yield _whole(part, max_bytes)
    elif part.file.kind in ('table', 'arrow'):
      yield from _rows(part, text_key)
    else:
      with _open(part.file.path) as file:
        yield from _lines(file, part, text_key, max_bytes)
  except (OSError, EOFError, zlib.error) as error:
    raise BadInput(f'{part.file.path}: cannot be read to its end ({error}); replace or remove the file') from error


def _whole(part: Part, max_bytes: int) -> Document:
  with open(part.file.path, 'rb') as file:
    text = file.read(max_bytes + 1)
  return Document(0, text if len(text) <= max_bytes else None)


def _open(path: str) -> BinaryIO:
  if path.lower().endswith('.gz'):
    return gzip.open(path, 'rb')
  if path.lower().endswith('.zst'):
    return io.BufferedReader(optional.load('pyarrow', 'data', path).input_stream(path, compression='zstd'))
  return open(path, 'rb')


def _lines(file: BinaryIO, part: Part, text_key: str, max_bytes: int) -> Iterator[Document]:
  """The lines that begin in [start, stop) of plain lines; every line of packed ones."""
  place, stop, limit = 0, None, _LINE_FACTOR * max_bytes
  if part.file.kind == 'lines':
    place, stop = part.start, part.stop
    if place:
      file.seek(place - 1)
      place -= 1
      while place < stop:  # the rest of a line that began before, or the end of one
        line = file.readline(limit)
        place += len(line)
        if not line or line.endswith(b'\n'):
          break
  while stop is None or place < stop:
    line = file.readline(limit)
    if not line:
      return
    size = len(line)
    if whole := size < limit or line.endswith(b'\n'):
      if line.strip():
        yield Document(place, _text_of(line, text_key, f'{part.file.path}, the line at byte {place}'))
    else:
      yield Document(place, None)
    while not whole:
      rest = file.readline(limit)
      size, whole = size + len(rest), not rest or rest.endswith(b'\n')
    place += size


def _text_of(line: bytes, text_key: str, where: str) -> bytes:
  try:
    record = json.loads(line)
  except UnicodeDecodeError:
    return line  # not UTF-8: counted or refused where all documents are
  except (ValueError, RecursionError) as error:
    raise BadInput(f'{where}: not JSON ({error}); correct or remove the line') from error
  if not isinstance(record, dict) or text_key not in record:
    keys = ', '.join(list(record)[:8]) if isinstance(record, dict) else 'none, it is no object'
    raise BadInput(f'{where}: no key {text_key!r} (it has: {keys}); name the key with --text_key')
  return _encoded(record[text_key], text_key, where)


def _encoded(text: object, text_key: str, where: str) -> bytes:
  if text is None:
    return b''
  if not isinstance(text, str):
    raise BadInput(f'{where}: {text_key!r} is {type(text).__name__}, not text; name another with --text_key')
  return text.encode('utf-8', errors='surrogatepass')  # half a surrogate pair: not UTF-8 either


def _rows(part: Part, column: str) -> Iterator[Document]:
  optional.load('pyarrow', 'data', part.file.path)
  import pyarrow

  path = part.file.path
  try:
    for place, values in _columns(part, column):
      if _holds_ids(values.type):
        found = [np.array(_ids_of(one), np.int64) for one in values.to_pylist()]
      else:  # as bytes: a string that is not UTF-8 must not end the whole batch
        found = [value or b'' for value in values.cast(pyarrow.large_binary()).to_pylist()]
      yield from (Document(place + i, one) for i, one in enumerate(found))
  except pyarrow.ArrowException as error:
    raise BadInput(f'{path}: cannot be read to its end ({error}); replace or remove the file') from error


def _ids_of(row: list | None) -> list[int]:
  return [-1 if one is None or one >= 2**63 else one for one in row or ()]  # -1: no id of any tokenizer


def _columns(part: Part, column: str) -> Iterator[tuple[int, object]]:
  """(the first row of some rows, their values in `column`)."""
  import pyarrow
  from pyarrow import ipc, parquet

  path = part.file.path
  if part.file.kind == 'table':
    with parquet.ParquetFile(path) as table:
      _check_column(path, table.schema_arrow, column)
      place = sum(table.metadata.row_group(i).num_rows for i in range(part.start))
      for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=list(range(part.start, part.stop)), columns=[column]):
        yield place, batch.column(0)
        place += batch.num_rows
    return
  with pyarrow.memory_map(path) as raw, ipc.open_stream(raw) as stream:
    _check_column(path, stream.schema, column)
    place = 0
    for number, batch in enumerate(itertools.islice(stream, part.stop)):
      if number >= part.start:
        values = batch.column(column)
        yield from ((place + i, values.slice(i, _ROWS_AT_ONCE)) for i in range(0, len(values), _ROWS_AT_ONCE))
      place += batch.num_rows


def _holds_ids(kind) -> bool:
  from pyarrow import types

  is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
  return is_list and types.is_integer(kind.value_type)


def _check_column(path: str, schema, column: str) -> None:
  kinds = {field.name: field.type for field in schema}
  if column not in kinds:
    raise BadInput(f'{path}: no column {column!r} (it has: {", ".join(kinds)}); name the column with --text_key')
  kind = kinds[column]
  if str(kind) not in ('string', 'large_string', 'binary', 'large_binary') and not _holds_ids(kind):
    raise BadInput(
      f'{path}: column {column!r} is {kind}, neither text nor lists of token ids; name another with --text_key'
    )
