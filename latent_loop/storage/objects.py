"""gs:// for epath, and so for Orbax's own small files, through the client that writes Orbax's arrays: TensorStore.

One client means one set of credentials (GOOGLE_APPLICATION_CREDENTIALS, gcloud's, the machine's own), one patience, no
cache of listings, and no further packages. A fault of the store is always an error here: fsspec's own `exists` would
say False, and a run would start over.
"""

import functools
import io
from typing import Any

import fsspec
import tensorstore as ts

from latent_loop.errors import BadInput, StoreFault

# Of one request: a store that fails at once counts as gone after two minutes. Orbax's arrays have TensorStore's own
# patience, a quarter of an hour; the watchdog ends a save sooner.
RETRIES = {'max_retries': 9, 'initial_delay': '500ms', 'max_delay': '32s'}


def register(bucket: str) -> None:
  """From now on epath reads and writes gs:// here; raises BadInput for an impossible name of a bucket."""
  for name in ('gs', 'gcs'):
    fsspec.register_implementation(name, Objects, clobber=True)
  try:
    bucket_at(bucket)
  except ValueError as error:
    raise BadInput(f'gs://{bucket}: no bucket can have this name ({_short(error)}); correct it') from error


def names_below(path: str) -> list[str]:
  """Every key below a folder, without the folder's own, and without the empty objects that consoles show as folders."""
  bucket, key = _split(path)
  prefix = f'{key}/' if key else ''
  everything = ts.KvStore.KeyRange(prefix, prefix[:-1] + '0' if prefix else '')  # '0' follows '/'
  names = _found(bucket_at(bucket).list(everything, len(prefix)), path)
  # TensorStore 0.1.86 takes the refusal of a list for the end of it, so ask something else: are we refused?
  _found(bucket_at(bucket).read(f'{prefix}.', byte_range=slice(0, 0)), path)
  return sorted(name.decode() for name in names if name and not name.endswith(b'/'))


def is_longer(path: str, num_bytes: int) -> bool:
  """Whether an object has more than `num_bytes`; raises FileNotFoundError."""
  bucket, key = _split(path)
  try:
    return len(_read(bucket, key, slice(num_bytes, num_bytes + 1))) == 1
  except StoreFault as error:
    if 'OUT_OF_RANGE' in str(error):
      return False
    raise


class Objects(fsspec.AbstractFileSystem):
  """The part of fsspec's interface that epath uses. A folder is there as long as there is an object below it."""

  protocol = ('gs', 'gcs')

  def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list:
    below = names_below(path)
    if not below:
      raise FileNotFoundError(f'{path}: no such folder in the store')
    top, prefix = {}, self._strip_protocol(path)
    for key in below:
      name, *further = key.split('/')
      top[name] = 'directory' if further else top.get(name, 'file')
    found = [self._info(f'{prefix}/{name}', kind) for name, kind in sorted(top.items())]
    return found if detail else [entry['name'] for entry in found]

  def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
    """Without a size, which would cost reading the object."""
    if self.isfile(path):
      return self._info(self._strip_protocol(path), 'file')
    if self.isdir(path):
      return self._info(self._strip_protocol(path), 'directory')
    raise FileNotFoundError(f'{path}: not in the store')

  def _info(self, name: str, kind: str) -> dict[str, Any]:
    return {'name': name, 'type': kind, 'size': None}

  def isfile(self, path: str) -> bool:
    bucket, key = _split(path)
    return bool(key) and _found(bucket_at(bucket).read(key, byte_range=slice(0, 0)), path).state == 'value'

  def isdir(self, path: str) -> bool:
    return bool(names_below(path))

  def exists(self, path: str, **kwargs: Any) -> bool:
    return self.isfile(path) or self.isdir(path)

  def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
    """There are no folders to make."""

  def makedirs(self, path: str, exist_ok: bool = False) -> None:
    """There are no folders to make."""

  def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
    bucket, key = _split(path)
    keys = [f'{key}/{name}' for name in names_below(path)] if recursive else []
    if not keys and not self.isfile(path):
      raise FileNotFoundError(f'{path}: not in the store')
    pending = [(name, bucket_at(bucket).write(name, None)) for name in keys or [key]]
    for name, future in pending:
      _found(future, f'{bucket}/{name}', writing=True)

  def _open(self, path: str, mode: str = 'rb', **kwargs: Any) -> io.BytesIO:
    bucket, key = _split(path)
    if mode == 'rb':
      return io.BytesIO(_read(bucket, key))
    if mode == 'wb':
      return _Upload(bucket, key)
    raise StoreFault(f'gs://{path}: an object cannot be opened with mode {mode}', writing=True)


class _Upload(io.BytesIO):
  """Becomes an object when it is closed."""

  def __init__(self, bucket: str, key: str):
    super().__init__()
    self._bucket, self._key = bucket, key

  def close(self) -> None:
    if not self.closed:
      content = self.getvalue()
      super().close()
      _found(bucket_at(self._bucket).write(self._key, content), f'{self._bucket}/{self._key}', writing=True)


def _read(bucket: str, key: str, part: slice | None = None) -> bytes:
  result = _found(bucket_at(bucket).read(key, byte_range=part), f'{bucket}/{key}')
  if result.state != 'value':
    raise FileNotFoundError(f'gs://{bucket}/{key}: not in the store')
  return result.value


@functools.cache
def bucket_at(bucket: str) -> ts.KvStore:
  context = ts.Context({'gcs_request_retries': RETRIES})
  return ts.KvStore.open({'driver': 'gcs', 'bucket': bucket, 'path': ''}, context=context).result()


def _found(future: ts.Future, path: str, writing: bool = False) -> Any:
  """The result of a request; raises StoreFault."""
  try:
    return future.result()
  except (ValueError, RuntimeError) as error:  # TensorStore has no errors of its own
    url = 'gs://' + path.removeprefix('gs://')
    raise StoreFault(
      f'{url}: the store did not {"write" if writing else "read"} it ({_short(error)})', writing
    ) from error


def _split(path: str) -> tuple[str, str]:
  bucket, _, key = path.removeprefix('gs://').rstrip('/').partition('/')
  return bucket, key


def _short(error: BaseException) -> str:
  """TensorStore's message without the answer it quotes and the place in its source."""
  return ' '.join(str(error).split(' [')[0].split())
