"""What is to be read: globs to parts of files, and parts to units of work of about one size."""

import collections
import dataclasses
import glob
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from latent_loop import optional
from latent_loop.errors import BadInput

# What one process reads between two marks, of the files as they lie on the disk: small parts cost little when killed,
# and every shard looks into every part.
_LEAST_UNIT_BYTES, _MOST_UNIT_BYTES, _UNITS = 4 * 2**20, 512 * 2**20, 2048
_LEFT_OUT = ('__pycache__', 'lost+found')  # folders, beside those that are hidden
_TEXT = """txt md rst py pyi pyx pxd c h cc cpp cxx hpp hh cu cuh rs go java kt scala js jsx ts tsx rb pl pm lua jl r sh
  bash sql f f90 hs ml swift cs php tex bib html css toml yaml yml cfg ini proto cmake""".split()
KINDS = {
  **{f'.{suffix}': 'text' for suffix in _TEXT},
  '.jsonl': 'lines', '.ndjson': 'lines', '.jsonl.gz': 'packed_lines', '.json.gz': 'packed_lines',
  '.jsonl.zst': 'packed_lines', '.json.zst': 'packed_lines', '.parquet': 'table',
  '.arrow': 'arrow',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class File:
  """input: which --input it came from. state: changes when the file does."""

  number: int
  path: str
  kind: str
  input: int
  num_bytes: int
  state: str


@dataclasses.dataclass(frozen=True)
class Part:
  """[start, stop) of a file: in bytes of .jsonl (the lines that begin there), in row groups of .parquet, in record
  batches of .arrow; else all.
  """

  file: File
  start: int
  stop: int
  num_bytes: int


def find(patterns: list[str]) -> tuple[list[File], dict[str, int]]:
  """(the files of all patterns in a fixed order, each once; the number of files left out, by ending).

  A pattern is a glob (** crosses folders), a file, or a folder, which stands for the text and source files under it,
  also behind links: .jsonl and .parquet may be anything there, so they are named by globs; but a folder of
  `save_to_disk` stands for its .arrow files. Raises BadInput when there is nothing to read.
  """
  files, others, seen = [], collections.Counter(), set()
  for number, pattern in enumerate(patterns):
    before = len(files)
    saved = _saved_dataset(pattern)
    for path in saved or sorted(_matches(pattern)):
      if path in seen:
        continue
      seen.add(path)
      kind = kind_of(path)
      if kind is None or (kind != 'text' and os.path.isdir(pattern) and not saved):
        others[Path(path).suffix or 'no ending'] += 1
        continue
      files.append(File(len(files), path, kind, number, os.stat(path).st_size, state_of(path)))
    if len(files) == before:
      raise BadInput(
        f'--input={pattern}: no file to read{_why(others)}; known are .txt, .md, source files, and by a glob, as in '
        "'folder/**/*.jsonl', .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow"
      )
  return files, dict(sorted(others.items()))


def state_of(path: str) -> str:
  facts = os.stat(path)
  return f'{facts.st_size} {facts.st_mtime_ns}'


def size_of(num_bytes: int) -> str:
  """In words, also of a few files."""
  return f'{num_bytes / 1e6:,.1f} MB' if num_bytes >= 1e5 else f'{num_bytes:,} bytes'


def _why(others: collections.Counter) -> str:
  return f' ({sum(others.values())} with other endings: {", ".join(sorted(others)[:5])})' if others else ''


def _matches(pattern: str) -> Iterator[str]:
  if os.path.isdir(pattern):
    seen = set()
    for folder, folders, names in os.walk(pattern, onerror=_refuse, followlinks=True):
      if (real := os.path.realpath(folder)) in seen:  # a link led back
        folders.clear()
        continue
      seen.add(real)
      folders[:] = sorted(name for name in folders if not name.startswith('.') and name not in _LEFT_OUT)
      paths = (os.path.join(folder, name) for name in names if not name.startswith('.'))
      yield from (path for path in paths if os.path.isfile(path))  # and no link to what is not there
  elif os.path.isfile(pattern):  # its name may look like a glob
    yield pattern
  else:
    yield from (path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


def _refuse(error: OSError) -> None:
  raise BadInput(f'{error.filename}: cannot be read ({error.strerror}); change its rights, or leave it out') from error


def _saved_dataset(folder: str) -> list[str]:
  """The .arrow files of a folder that save_to_disk of Hugging Face's `datasets` wrote; none where it is no such folder.

  Raises BadInput for a folder of several splits: which of them are to be trained on, a person knows.
  """
  if os.path.exists(os.path.join(folder, 'dataset_dict.json')):
    splits = _fields(folder, 'dataset_dict.json', lambda body: list(body['splits']))
    if len(splits) != 1:
      raise BadInput(
        f'--input={folder}: a dataset of the splits {", ".join(splits)}; name each that is to be read, as in '
        f'--input={os.path.join(folder, "train")}'
      )
    folder = os.path.join(folder, splits[0])
  elif not all(os.path.exists(os.path.join(folder, name)) for name in ('state.json', 'dataset_info.json')):
    return []
  names = _fields(folder, 'state.json', lambda body: [one['filename'] for one in body['_data_files']])
  for path in (paths := [os.path.join(folder, name) for name in names]):
    if not os.path.isfile(path):
      raise BadInput(f'{path}: missing, and state.json beside it names it; restore it, or save the dataset again')
  return paths


def _fields(folder: str, name: str, pick: Callable[[dict], list[str]]) -> list[str]:
  try:
    return pick(json.loads(Path(folder, name).read_bytes()))
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise BadInput(
      f'{os.path.join(folder, name)}: cannot be read ({error!r}); restore it, or save the dataset again'
    ) from error


def kind_of(path: str) -> str | None:
  """How a file is read, by the longest ending that is known."""
  name = os.path.basename(path).lower()
  endings = [name[i:] for i, letter in enumerate(name) if letter == '.']
  return next((KINDS[ending] for ending in endings if ending in KINDS), None)


def units(files: list[File]) -> list[list[Part]]:
  """Parts in order, grouped so that units have about one size; a part that cannot be divided may be larger."""
  total = sum(file.num_bytes for file in files)
  limit = min(max(total // _UNITS, _LEAST_UNIT_BYTES), _MOST_UNIT_BYTES)
  out, size = [[]], 0
  for part in (part for file in files for part in _parts(file, limit)):
    if out[-1] and size + part.num_bytes > limit:
      out.append([])
      size = 0
    out[-1].append(part)
    size += part.num_bytes
  return out


def _parts(file: File, limit: int) -> Iterator[Part]:
  if file.kind == 'lines':
    for start in range(0, max(file.num_bytes, 1), limit):
      stop = min(start + limit, file.num_bytes)
      yield Part(file, start, stop, stop - start)
  elif file.kind == 'table':
    sizes = _row_groups(file)
    for i, size in enumerate(sizes):
      yield Part(file, i, i + 1, size)
  elif file.kind == 'arrow':
    start, size = 0, 0
    for i, num_bytes in enumerate(_record_batches(file), 1):
      size += num_bytes
      if size >= limit:
        yield Part(file, start, i, size)
        start, size = i, 0
    if size:
      yield Part(file, start, i, size)
  else:
    yield Part(file, 0, 1, file.num_bytes)


def _record_batches(file: File) -> Iterator[int]:
  """Bytes of each record batch of an Arrow stream, of which nothing but the headers is read."""
  ipc = optional.load('pyarrow.ipc', 'data', file.path)
  import pyarrow

  rows = 0
  try:
    with pyarrow.memory_map(file.path) as raw, ipc.open_stream(raw) as stream:
      for batch in stream:
        rows += batch.num_rows
        yield batch.nbytes
      raw.seek(max(raw.size() - len(_END_OF_STREAM), 0))
      if raw.read() != _END_OF_STREAM:  # a stream that was cut between two batches would be shorter, and in silence
        raise OSError('its end is missing')
  except (OSError, pyarrow.ArrowException) as error:
    raise BadInput(
      f'{file.path}: not a whole Arrow stream, after row {rows - 1} ({error}); replace or remove it'
    ) from error


_END_OF_STREAM = b'\xff\xff\xff\xff\0\0\0\0'


def _row_groups(file: File) -> list[int]:
  """Bytes of each row group of a parquet file."""
  parquet = optional.load('pyarrow.parquet', 'data', file.path)
  import pyarrow

  try:
    with parquet.ParquetFile(file.path) as table:
      return [table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)]
  except (OSError, pyarrow.ArrowException) as error:
    raise BadInput(f'{file.path}: not a whole parquet file ({error}); replace or remove it') from error
