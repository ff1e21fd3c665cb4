"""manifest.jsonl of a step: what the step holds, so that any change of it shows.

Two lines of JSON: the SHA-256 of the second, and that second line: the size and SHA-256 of every file, the shape,
dtype and checksum of every array, and what the run says about itself. It is written last, so a step without it was
never finished.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import re
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from latent_loop import storage
from latent_loop.errors import StoreFault

FORMAT = 2  # 1: no manifest, what it says about itself in `meta`; 2: manifest.jsonl
NAME = 'manifest.jsonl'
_LARGEST_MANIFEST = 64 * 2**20  # bytes; that of a 3.5B run has 0.1 MB
_CHUNK = 4 * 2**20
_FILES_AT_ONCE = 4


class Damaged(Exception):
  """A step that is not what was saved; the message names the file or array and says how."""


@dataclasses.dataclass(frozen=True)
class Manifest:
  """arrays: path -> {'kind': 'float32[128,384]', 'checksum': 16 digits}. files: name -> [bytes, SHA-256]."""

  step: int
  about: dict[str, Any]  # the sealed config, the fingerprint of the data
  arrays: dict[str, dict[str, str]]
  files: dict[str, list]

  @property
  def num_bytes(self) -> int:
    return sum(size for size, _ in self.files.values())


def write(folder: epath.Path, step: int, about: dict[str, Any], arrays: dict[str, dict[str, str]]) -> None:
  """Hashes every file of the finished step in `folder` and writes its manifest, whole or not at all."""
  names = [name for name in storage.files_below(folder) if not name.startswith(NAME)]
  with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
    files = dict(zip(names, pool.map(lambda name: _hash(folder / name), names), strict=True))
  body = {'format': FORMAT, 'step': step, 'about': about, 'arrays': arrays, 'files': files}
  storage.write(folder / NAME, encode(body))


def encode(body: dict[str, Any]) -> bytes:
  line = json.dumps(body).encode()
  return json.dumps({'sha256': hashlib.sha256(line).hexdigest()}).encode() + b'\n' + line + b'\n'


def read(folder: epath.Path, step: int) -> Manifest:
  """The manifest of the step in `folder`; raises Damaged when it is absent, altered, or of another step."""
  path = folder / NAME
  try:
    if storage.is_longer(path, _LARGEST_MANIFEST):
      raise Damaged(f'{NAME} has over {_LARGEST_MANIFEST} bytes, more than any manifest')
    first, _, rest = path.read_bytes().partition(b'\n')
  except (FileNotFoundError, NotADirectoryError) as error:
    raise Damaged(f'no {NAME}') from error
  line = rest.removesuffix(b'\n')
  seal = json.dumps({'sha256': hashlib.sha256(line).hexdigest()}).encode()
  if first != seal or rest == line:
    raise Damaged(f'{NAME} is truncated or altered: it does not have the hash that it states')
  try:
    return _check(json.loads(line), step)
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise Damaged(f'{NAME} is not a manifest of format {FORMAT} ({type(error).__name__}: {error})') from error


def _check(body: dict[str, Any], step: int) -> Manifest:
  """Someone may have written a manifest with the right hash by hand: it may not point outside or cost memory."""
  if body['format'] != FORMAT:
    raise ValueError(f'it has format {body["format"]}')
  if body['step'] != step:
    raise Damaged(f'{NAME} is that of step {body["step"]}')
  for name, (size, digest) in body['files'].items():
    parts = name.split('/')
    if not parts or {'', '.', '..'} & set(parts) or '\\' in name or PurePosixPath(name).is_absolute():
      raise ValueError(f'it names the file {name!r}, which is no file below its folder')
    if not (isinstance(size, int) and size >= 0 and re.fullmatch('[0-9a-f]{64}', digest)):
      raise ValueError(f'it gives no size and hash of {name!r}')
  for name, array in body['arrays'].items():
    if not (isinstance(array['kind'], str) and re.fullmatch('[0-9a-f]{16}', array['checksum'])):
      raise ValueError(f'it gives no kind and checksum of array {name!r}')
  if not (body['files'] and body['arrays'] and isinstance(body['about'], dict)):
    raise ValueError('it names no files or no arrays')
  return Manifest(step, body['about'], body['arrays'], body['files'])


def check_sizes(folder: epath.Path, manifest: Manifest) -> None:
  """The part of `check_files` that opens no file."""
  with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
    checks = pool.map(lambda name: _check_size(folder, name, manifest.files[name][0]), manifest.files)
    collections.deque(checks, maxlen=0)


def _check_size(folder: epath.Path, name: str, size: int) -> None:
  try:
    if not storage.has_size(folder / name, size):
      raise Damaged(f'{name} does not have the {size} bytes that were saved')
  except FileNotFoundError as error:
    raise Damaged(f'{name} is missing') from error


def check_files(folder: epath.Path, manifest: Manifest) -> None:
  """Raises Damaged, naming the first file that is absent, truncated or altered. Extra files do no harm."""
  check_sizes(folder, manifest)
  with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
    found = pool.map(lambda name: _hash_if_there(folder / name), manifest.files)
    for (name, wanted), got in zip(manifest.files.items(), found, strict=True):
      if got is None:  # deleted since: a reader may look while the run deletes old steps
        raise Damaged(f'{name} is missing')
      if got != wanted:
        raise Damaged(f'{name} is altered: its bytes do not have the hash of what was saved')


def check_arrays(manifest: Manifest, checksums: dict[str, str]) -> None:
  """Raises Damaged, naming the first array whose content is not what was saved."""
  for name, checksum in checksums.items():
    saved = manifest.arrays[name]['checksum']
    if checksum != saved:
      raise Damaged(f'array {name} does not hold what was saved: its content has checksum {checksum}, not {saved}')


def _hash(path: epath.Path) -> list:
  """[bytes, SHA-256] of a file."""
  digest, size = hashlib.sha256(), 0
  with path.open('rb') as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
      size += len(chunk)
  return [size, digest.hexdigest()]


def _hash_if_there(path: epath.Path) -> list | None:
  try:
    return _hash(path)
  except FileNotFoundError:
    return None


def unreadable(folder: epath.Path, error: Exception) -> Exception:
  """What to raise when Orbax could not read the arrays of a step whose files are whole: a store may be at fault."""
  if storage.is_fault(folder, error):
    return StoreFault(f'{folder}: the store did not read it ({short(error)})')
  return Damaged(f'its arrays cannot be read ({short(error)})')


def short(error: BaseException) -> str:
  """An error of a library as part of a sentence; without the answer of a server that TensorStore quotes."""
  return f'{type(error).__name__}: {" ".join(str(error).partition(" [http")[0].split())[:200]}'
