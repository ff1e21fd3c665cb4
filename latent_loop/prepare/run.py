"""A preparation from its inputs to the manifest: units, then shards, each in parallel; a killed one goes on."""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from latent_loop import storage, tokenizer
from latent_loop.errors import BadInput
from latent_loop.interrupt import StopRequest
from latent_loop.prepare import beam, filters, inputs, merge, units
from latent_loop.prepare.crew import Crew
from latent_loop.prepare.inputs import size_of
from latent_loop.shards import manifest
from latent_loop.shards.records import RECORD_TOKENS, settled, token_dtype

WORK = 'unfinished'  # a folder in the output, gone at the end
SHARD_BYTES = 64 * 2**20  # of input for each shard
_MAX_SHARDS = 4096
_ENDINGS_SAID = 8


@dataclasses.dataclass(frozen=True)
class Request:
  """What to prepare. processes: how many of this machine work at once; 1 = this one alone. format: of the shards.

  runner: 'local', or the Beam runner that works instead of them, with Beam's own options.
  """

  patterns: list[str]
  tokenizer: str
  output: Path
  text_key: str
  invalid_utf8: str
  validation_fraction: float
  limits: filters.Limits
  processes: int
  format: str = 'arrayrecord'  # or 'zarr3'
  runner: str = 'local'
  beam_options: tuple[str, ...] = ()


def prepare(request: Request, say: Callable[[str], None]) -> manifest.Manifest:
  """Prepares `request.output`, or finds it prepared and whole. Raises BadInput, and crew.Stopped after a signal.

  Processes may be killed at any moment: the same request, made again, keeps what was done and ends in the same files.
  """
  files, others = inputs.find(request.patterns)
  code = tokenizer.load(request.tokenizer)
  settings = units.Settings(request.tokenizer, code.fingerprint, request.text_key, request.invalid_utf8, request.limits)
  todo = [units.Unit(tuple(parts), settings) for parts in inputs.units(files)]
  what = [f'{request.validation_fraction}', *(u.key for u in todo), request.format]
  key = hashlib.sha256(' '.join(what).encode()).hexdigest()
  if (request.output / manifest.NAME).exists():
    return _finished(request.output, key)
  with _folder_in_words(request.output), _own(request.output) as work, StopRequest() as stop:
    local = request.runner == 'local'
    crew = Crew(request.processes, stop, say) if local else beam.Crew(request.runner, request.beam_options, stop, say)
    marks = crew.do(units.do, [(unit, work) for unit in todo], [unit.num_bytes for unit in todo], 'tokenizing')
    parts = _ranges(request, todo, marks, token_dtype(code.vocab_size))
    merged = crew.do(merge.do, [(part, work, request.output) for part in parts], [1] * len(parts), 'writing shards')
    report = _Report(request, files, others, marks, merged)
    _finish(request, code, key, report, merged)
    shutil.rmtree(work, ignore_errors=True)  # NFS keeps the lock that is open; the next start removes it
  return manifest.read(request.output)


def _finished(output: Path, key: str) -> manifest.Manifest:
  """A folder that has its manifest is not touched again, but for what a kill in the last moment left."""
  found = manifest.read(output)
  if found.key != key:
    raise BadInput(
      f'--output={output} holds data prepared from other inputs or settings; give another folder, or remove it'
    )
  faults = manifest.damaged(output, found)
  if faults:
    raise BadInput(
      f'{"; ".join(faults[:3])}{" ..." * (len(faults) > 3)}; restore from a copy, or remove {output} and start again'
    )
  shutil.rmtree(output / WORK, ignore_errors=True)
  return found


@contextlib.contextmanager
def _folder_in_words(output: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise BadInput(
      f'--output={output} cannot be written: {error}; what is done is kept: make room or repair the disk, then start '
      'the same command again'
    ) from error


@contextlib.contextmanager
def _own(output: Path) -> Iterator[Path]:
  """The work folder, locked for as long as this process lives."""
  work = output / WORK
  if output.is_dir() and not work.is_dir() and any(output.iterdir()):
    raise BadInput(f'--output={output} is not empty and no preparation was begun there; give another folder')
  work.mkdir(parents=True, exist_ok=True)
  with (work / 'lock').open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise BadInput(f'--output={output}: another process prepares this folder; wait for it, or end it') from error
    for left in [*output.rglob(f'*{storage.TEMPORARY}')]:
      left.unlink()  # of a killed process; it may be what fills the disk
    yield work


def _ranges(request: Request, todo: list[units.Unit], marks: list[dict], dtype) -> list[merge.Range]:
  segments = tuple(segment for mark in marks for segment in mark['segments'])
  if not segments:
    raise BadInput(_nothing_kept(request, marks))
  count = min(-(-sum(unit.num_bytes for unit in todo) // SHARD_BYTES), _MAX_SHARDS)
  how = segments, dtype.str, request.validation_fraction, request.format
  return [merge.Range(i, count, *how) for i in range(count)]


def _nothing_kept(request: Request, marks: list[dict]) -> str:
  counts, limits = collections.Counter(), request.limits
  for mark in marks:
    for numbers in mark['files'].values():
      counts.update(numbers)
  return (
    f'--input={" --input=".join(request.patterns)}: no document was kept; {_reasons(counts) or "the files are empty"}; '
    f'kept is UTF-8 text from --min_bytes={limits.min_bytes} to --max_bytes={limits.max_bytes}, a fifth of it letters '
    'and hardly a control character: give other files or limits'
  )


class _Report:
  """What was read, kept and dropped: one line for each file, a summary for each --input."""

  def __init__(self, request: Request, files: list[inputs.File], others: dict, marks: list[dict], merged: list[dict]):
    counts = collections.defaultdict(collections.Counter)
    for mark in marks:
      for number, numbers in mark['files'].items():
        counts[int(number)].update(numbers)
    for mark in merged:
      for number, (count, num_bytes) in mark['duplicates'].items():
        counts[int(number)].update({'dropped: duplicate': count, 'kept bytes': -num_bytes})
    self.lines = [{'path': file.path, 'bytes': file.num_bytes, **counts[file.number]} for file in files]
    self.sources = []
    for number, pattern in enumerate(request.patterns):
      mine = [file for file in files if file.input == number]
      total = collections.Counter()
      for file in mine:
        total.update(counts[file.number])
      self.sources.append({
        'input': pattern, 'files': len(mine), 'bytes': sum(file.num_bytes for file in mine),
        **{name: total[name] for name in sorted({'documents', 'kept bytes', *total})},
      })  # fmt: skip
    self.others = others


def _reasons(counts: dict[str, int]) -> str:
  prefix = 'dropped: '
  return ', '.join(f'{n} {name.removeprefix(prefix)}' for name, n in sorted(counts.items()) if name.startswith(prefix))


def _finish(request: Request, code: tokenizer.Tokenizer, key: str, report: _Report, merged: list[dict]) -> None:
  output, others = request.output, []
  storage.write(output / manifest.FILES, ''.join(json.dumps(line) + '\n' for line in report.lines))
  others.append(manifest.FILES)
  if request.tokenizer != 'bytes':
    with settled(output / manifest.TOKENIZER) as temporary:
      # Byte by byte: its checksum is its name.
      temporary.write_bytes(storage.path(request.tokenizer, '--tokenizer').read_bytes())
    others.append(manifest.TOKENIZER)
  shards = []
  for mark in merged:
    for shard in mark['shards']:
      name, sums = shard['name'], mark['checksums']
      facts = {file.removeprefix(name): sums[file] for file in sums if file.startswith(f'{name}.')}
      shards.append({**shard, 'files': facts})
  manifest.write(output, {
    'key': key,
    'tokenizer': code.fingerprint,
    'vocab_size': code.vocab_size,
    'shards': sorted(shards, key=lambda shard: shard['name']),
    'other_files': {name: manifest.facts(output / name) for name in others},
    'about': {
      'sources': report.sources,
      'files left out, by ending': report.others,
      'settings': {'text_key': request.text_key, 'invalid_utf8': request.invalid_utf8,
                   'validation_fraction': request.validation_fraction, **dataclasses.asdict(request.limits)},
      'record_tokens': RECORD_TOKENS,
      'versions': {name: importlib.metadata.version(name) for name in (_WRITERS[request.format], 'numpy', *_OPTIONAL)
                   if importlib.util.find_spec(name)},
    },
  })  # fmt: skip


_OPTIONAL = ('tokenizers', 'pyarrow')
_WRITERS = {'arrayrecord': 'array_record', 'zarr3': 'tensorstore'}


def summary(found: manifest.Manifest) -> list[str]:
  """A prepared folder in a few lines."""
  lines = []
  for source in found.about['sources']:
    dropped = _reasons(source) or 'none'
    size = f'{source["files"]:,} files, {size_of(source["bytes"])}, {size_of(source["kept bytes"])} kept'
    lines.append(f'{source["input"]}: {size}, {source["documents"]:,} documents; dropped: {dropped}')
  others = found.about['files left out, by ending']
  if others:
    most = sorted(others, key=others.get, reverse=True)[:_ENDINGS_SAID]
    lines.append(
      f'files left out by their ending: {", ".join(f"{others[e]} {e}" for e in most)} (all: {manifest.NAME})'
    )
  for split in manifest.SPLITS:
    shards = found.of(split)
    documents, tokens = sum(s.documents for s in shards), sum(s.tokens for s in shards)
    lines.append(f'{split}: {documents:,} documents, {tokens:,} tokens, {len(shards)} shards')
  if not found.of('validation'):
    lines.append(
      f'warning: --validation_fraction={found.about["settings"]["validation_fraction"]} held no document out, and '
      'launch.train needs some to evaluate on; prepare more documents, or a larger fraction, in another folder'
    )
  return lines
