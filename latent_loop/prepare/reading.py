"""A part of a file to documents, one at a time. What cannot be read is an error that names file and record."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from latent_loop import optional
from latent_loop.errors import BadInput
from latent_loop.prepare.inputs import Part

_ROWS_AT_ONCE = 256
# A line of JSON may need more bytes than its text (escapes, other keys); a longer one is not read to its end.
_LINE_FACTOR = 8


class Document(NamedTuple):
  """place: where in the file; a byte for lines, a row for tables. text: None = longer than is read."""

  place: int
  text: bytes | None


def documents(part: Part, text_key: str, max_bytes: int) -> Iterator[Document]:
  """The documents of `part`; their text is not checked to be UTF-8. Raises BadInput."""
  try:
    if part.file.kind == 'text':
      yield _whole(part, max_bytes)
    elif part.file.kind == 'table':
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
  place, stop = 0, None
  if part.file.kind == 'lines':
    place, stop = part.start, part.stop
    if place:
      file.seek(place - 1)
      place += len(file.readline()) - 1  # the rest of a line that began before, or the end of one
  limit = _LINE_FACTOR * max_bytes
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
  parquet = optional.load('pyarrow.parquet', 'data', part.file.path)
  import pyarrow

  path = part.file.path
  try:
    with parquet.ParquetFile(path) as table:
      _check_column(path, table.schema_arrow, column)
      place = sum(table.metadata.row_group(i).num_rows for i in range(part.start))
      for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=list(range(part.start, part.stop)), columns=[column]):
        # As bytes: a string that is not UTF-8 must not end the whole batch.
        for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
          yield Document(place, value or b'')
          place += 1
  except pyarrow.ArrowException as error:
    raise BadInput(f'{path}: cannot be read to its end ({error}); replace or remove the file') from error


def _check_column(path: str, schema, column: str) -> None:
  kinds = {field.name: str(field.type) for field in schema}
  if column not in kinds:
    raise BadInput(f'{path}: no column {column!r} (it has: {", ".join(kinds)}); name the column with --text_key')
  if kinds[column] not in ('string', 'large_string', 'binary', 'large_binary'):
    raise BadInput(f'{path}: column {column!r} is {kinds[column]}, not text; name another with --text_key')
