"""A unit of work to tokens: files named by a key, which says what they were made from and how.

KEY-0.tokens: the documents that are kept, one behind the other. KEY-0.documents.npy: uint64 [7, documents] by digest:
the rows of shards/records.py, then number of tokens and bytes of text. KEY-1 and so on when a unit has more documents
than should be held in memory. KEY.json: counts, and the checksums of all these; written last.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latent_loop import tokenizer
from latent_loop.errors import BadInput
from latent_loop.prepare import filters
from latent_loop.prepare.inputs import Part, state_of
from latent_loop.prepare.reading import documents
from latent_loop.shards import manifest
from latent_loop.shards.records import FILE, HIGH, LOW, PLACE, ROWS, settled, token_dtype, write_index

NUM_TOKENS, NUM_BYTES = ROWS, ROWS + 1  # two rows more than an index has
_VERSION = 2  # of what a unit does; in its key
_BATCH_BYTES = 2**20  # of text that the tokenizer gets at once
_SEGMENT_DOCUMENTS = 2**17


@dataclasses.dataclass(frozen=True)
class Settings:
  """How documents become tokens. invalid_utf8: what a document that is not UTF-8 does."""

  tokenizer: str
  fingerprint: str  # of the tokenizer
  text_key: str
  invalid_utf8: str  # 'error' or 'drop'
  limits: filters.Limits


@dataclasses.dataclass(frozen=True)
class Unit:
  parts: tuple[Part, ...]
  settings: Settings

  @functools.cached_property
  def key(self) -> str:
    made_from = [(p.file.number, p.file.path, p.file.state, p.start, p.stop) for p in self.parts]
    how = {**dataclasses.asdict(self.settings), 'tokenizer': ''}
    return hashlib.sha256(json.dumps([_VERSION, made_from, how]).encode()).hexdigest()[:24]

  @property
  def num_bytes(self) -> int:
    return sum(part.num_bytes for part in self.parts)


def names(segment: str) -> tuple[str, str]:
  return f'{segment}.tokens', f'{segment}.documents.npy'


def read_mark(folder: Path, key: str, home: Path) -> dict | None:
  """What KEY.json says, when the files it names are in `home` and as it says; None: to be done (again)."""
  try:
    mark = json.loads((folder / f'{key}.json').read_text())
    whole = all(manifest.facts(home / name) == tuple(facts) for name, facts in mark['checksums'].items())
    return mark if whole else None
  except (OSError, ValueError, KeyError):
    return None


def mark_of(folder: Path, key: str) -> dict:
  """What KEY.json says, as a task that was just done left it."""
  return json.loads((folder / f'{key}.json').read_text())


def write_mark(folder: Path, key: str, home: Path, files: list[str], counts: dict) -> dict:
  mark = {**counts, 'checksums': {name: manifest.facts(home / name) for name in files}}
  with settled(folder / f'{key}.json') as temporary:
    temporary.write_text(json.dumps(mark) + '\n')
  return mark


# One for all units of a process: the library keeps a few MB of every tokenizer that was ever loaded.
_tokenizer = functools.lru_cache(1)(tokenizer.load)


def do(unit: Unit, folder: Path) -> dict:
  """Does `unit`, unless its mark says that it is done; returns the mark. Raises BadInput."""
  if (mark := read_mark(folder, unit.key, folder)) is not None:
    return mark
  counts, segments, files = _Counts(unit), [], []
  code = _tokenizer(unit.settings.tokenizer)
  if code.fingerprint != unit.settings.fingerprint:
    raise BadInput(f'--tokenizer={unit.settings.tokenizer}: changed while data was prepared with it; start again')
  items = _kept(unit, counts, code.vocab_size)
  for number in itertools.count():
    some = itertools.islice(items, _SEGMENT_DOCUMENTS)
    segment = _write_segment(some, code, f'{unit.key}-{number}', folder)
    if segment is None:
      break
    segments.append(segment)
    files += names(segment)
  for file in {part.file for part in unit.parts}:
    if state_of(file.path) != file.state:
      raise BadInput(f'{file.path}: changed while it was read; wait until nobody writes it, then start again')
  return write_mark(folder, unit.key, folder, files, {'files': counts.result(), 'segments': segments})


def _write_segment(items: Iterator, code: tokenizer.Tokenizer, name: str, folder: Path) -> str | None:
  """Writes the files of one segment; None when there is no document left."""
  dtype, columns, end = token_dtype(code.vocab_size), [], 0
  tokens_path, documents_path = (folder / file for file in names(name))
  with settled(tokens_path) as temporary, temporary.open('wb') as file:
    for batch in _batches(items):
      for head, tokens, num_bytes in _encoded(batch, code):
        file.write(np.r_[code.bos, tokens, code.eos].astype(dtype).tobytes())
        end += len(tokens) + 2
        columns.append((end, *head, len(tokens) + 2, num_bytes))
  if not columns:
    tokens_path.unlink()
    return None
  table = np.array(columns, np.uint64).T
  write_index(documents_path, np.ascontiguousarray(table[:, in_order(table)]))
  return name


def _encoded(batch: list, code: tokenizer.Tokenizer) -> Iterator[tuple[tuple, np.ndarray, int]]:
  """(head, tokens without those that begin and end a document, bytes) of each item."""
  texts = iter(code.encode([content for _, content in batch if isinstance(content, str)]))
  for head, content in batch:
    if isinstance(content, str):
      yield head, next(texts), len(content.encode())
    else:
      begun, ended = (content[:1] == code.bos).sum(), (content[-1:] == code.eos).sum()
      yield head, content[begun : len(content) - ended], filters.ID_BYTES * len(content)


def in_order(table: np.ndarray) -> np.ndarray:
  """The order of documents: by digest; of equal ones by where they stand in the input."""
  return np.lexsort((table[PLACE], table[FILE], table[LOW], table[HIGH]))


class _Counts:
  """Per file of a unit: bytes kept, documents read, and dropped by reason."""

  def __init__(self, unit: Unit):
    self._files = {part.file.number: collections.Counter({'documents': 0, 'kept bytes': 0}) for part in unit.parts}

  def of(self, number: int) -> collections.Counter:
    return self._files[number]

  def result(self) -> dict[str, dict[str, int]]:
    return {str(number): dict(sorted(counter.items())) for number, counter in self._files.items()}


def _kept(unit: Unit, counts: _Counts, vocab_size: int) -> Iterator[tuple[tuple[int, int, int, int], str | np.ndarray]]:
  """((digest high, low, file, place), text or ready ids) of every document to keep; others are counted by reason."""
  settings, seen = unit.settings, set()
  for part in unit.parts:
    counter = counts.of(part.file.number)
    for place, raw in documents(part, settings.text_key, settings.limits.max_bytes):
      counter['documents'] += 1
      if raw is None:
        text, reason = None, 'too long'
      else:  # what is no text is said ahead of what it looks like as one
        text = _text_or_ids(raw, part, place, settings, vocab_size)
        reason = 'not UTF-8' if text is None else filters.reason_to_drop(raw, settings.limits)
      digest = filters.digest(raw) if reason is None else None
      if digest in seen:
        reason = 'duplicate'
      if reason is not None:
        counter[f'dropped: {reason}'] += 1
        continue
      if len(seen) == _SEGMENT_DOCUMENTS:
        seen.clear()  # merge.py finds every duplicate; this only saves tokenizing most of them
      seen.add(digest)
      counter['kept bytes'] += filters.ID_BYTES * len(raw) if isinstance(raw, np.ndarray) else len(raw)
      yield (*digest, part.file.number, place), text


def _text_or_ids(
  raw: bytes | np.ndarray, part: Part, place: int, settings: Settings, vocab_size: int
) -> str | np.ndarray | None:
  """None: not UTF-8, where such are dropped."""
  if isinstance(raw, np.ndarray):
    return _checked(raw, part, place, vocab_size)
  return _decoded(raw, part, place, settings)


def _checked(ids: np.ndarray, part: Part, place: int, vocab_size: int) -> np.ndarray:
  wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
  if wrong.size:
    raise BadInput(
      f'{part.file.path}, {where(part, place)}: token {wrong[0]} is {ids[wrong[0]]}, and the ids of the tokenizer run '
      f'from 0 to {vocab_size - 1}; give the --tokenizer that made them, or correct the file'
    )
  return ids


def _decoded(raw: bytes, part: Part, place: int, settings: Settings) -> str | None:
  try:
    return raw.decode('utf-8')
  except UnicodeDecodeError as error:
    if settings.invalid_utf8 == 'drop':
      return None
    raise BadInput(
      f'{part.file.path}, {where(part, place)}: not UTF-8 text (byte {error.start} of the document); correct it, or '
      'give --invalid_utf8=drop to leave such documents out and count them'
    ) from error


def where(part: Part, place: int) -> str:
  if part.file.kind == 'text':
    return 'the whole file'
  return f'row {place}' if part.file.kind in ('table', 'arrow') else f'the line at byte {place}'


def _batches(items: Iterator) -> Iterator[list]:
  """Documents together, up to _BATCH_BYTES of text and one document more."""
  held, size = [], 0
  for item in items:
    held.append(item)
    size += len(item[1])
    if size >= _BATCH_BYTES:
      yield held
      held, size = [], 0
  if held:
    yield held
