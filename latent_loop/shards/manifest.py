"""manifest.json of a folder of token shards: what it holds, sealed by a hash. It is written last."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from latent_loop import storage
from latent_loop.errors import BadInput

FORMAT = 1
NAME, TOKENIZER, FILES = 'manifest.json', 'tokenizer.json', 'files.jsonl'
SPLITS = ('train', 'validation')
_CHUNK = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Shard:
  """Its files by size and SHA-256; `name` is that of all of them without its ending."""

  name: str
  documents: int
  tokens: int
  records: int
  files: dict[str, tuple[int, str]]  # ending -> (bytes, SHA-256)

  @property
  def split(self) -> str:
    return self.name.partition('-')[0]


@dataclasses.dataclass(frozen=True)
class Manifest:
  """about: sources, what was dropped and why, settings, versions: for people."""

  key: str  # of the inputs and settings
  tokenizer: str  # fingerprint
  vocab_size: int
  shards: tuple[Shard, ...]
  other_files: dict[str, tuple[int, str]]
  about: dict[str, Any]
  seal: str  # the hash of all this

  def of(self, split: str) -> list[Shard]:
    return [shard for shard in self.shards if shard.split == split]


def write(folder: Path, body: dict[str, Any]) -> None:
  body = {'format': FORMAT, **body}
  storage.write(folder / NAME, json.dumps({'seal': _seal(body), **body}, indent=1) + '\n')


def read(folder: Path) -> Manifest:
  """Raises BadInput when there is none or it is damaged."""
  path = folder / NAME
  try:
    body = json.loads(path.read_bytes())
    seal = body.pop('seal')
    if _seal(body) != seal:
      raise ValueError('it does not have the hash that it states')
    if body.pop('format') != FORMAT:
      raise ValueError(f'its format is not {FORMAT}')
    return Manifest(**{**body, 'shards': tuple(Shard(**shard) for shard in body['shards'])}, seal=seal)
  except FileNotFoundError as error:
    raise BadInput(
      f'{path}: missing, so {folder} holds no prepared data; python -m launch.prepare_data --input=TEXTS '
      f'--output={folder} makes it; for an experiment of this repository do what its first lines say'
    ) from error
  except OSError as error:
    raise BadInput(f'{path}: cannot be read ({error.strerror}); give a folder that can') from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise BadInput(f'{path}: truncated or altered ({error}); restore it, or prepare the folder anew') from error


def _seal(body: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def facts(path: Path) -> tuple[int, str]:
  """(bytes, SHA-256) of a file."""
  digest, size = hashlib.sha256(), 0
  with path.open('rb') as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
      size += len(chunk)
  return size, digest.hexdigest()


def check_sizes(folder: Path, manifest: Manifest) -> None:
  """Raises BadInput, naming it, for the first file that is missing or has another size; reads no file."""
  for name, (size, _) in all_files(manifest).items():
    path = folder / name
    try:
      fault = '' if storage.has_size(path, size) else f'it has not the {size} bytes of the manifest'
    except FileNotFoundError:
      fault = 'missing'
    if fault:
      raise BadInput(f'{path}: {fault}; restore the file from a copy, or remove {folder} and prepare it anew')


def damaged(folder: Path, manifest: Manifest) -> list[str]:
  """A sentence for every file that is not what the manifest says; reads all of them."""
  out = []
  for name, (size, digest) in all_files(manifest).items():
    path = folder / name
    if not path.is_file():
      out.append(f'{path}: missing')
    elif facts(path) != (size, digest):
      out.append(f'{path}: truncated or altered; its size or SHA-256 is not that of the manifest')
  return out


def all_files(manifest: Manifest) -> dict[str, tuple[int, str]]:
  out = {name: tuple(value) for name, value in manifest.other_files.items()}
  for shard in manifest.shards:
    out |= {shard.name + ending: tuple(value) for ending, value in shard.files.items()}
  return out
