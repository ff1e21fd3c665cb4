"""Where a run's files are: a local folder, or an object store by its URL. All that differs between the two is here.

Both are paths with the methods of pathlib: pathlib.Path for a folder, epath.Path for a URL. An object is written whole
or not at all, cannot be appended to or renamed, and there are no empty folders.
"""

import contextlib
import os
import pathlib
import re
import time
import types
from collections.abc import Iterator

from etils import epath

from latent_loop.errors import BadInput, SaveFailed, StoreFault

Path = pathlib.Path | epath.Path  # what a workdir is
TEMPORARY = '.tmp'  # what stands behind the name of a local file that is being written
_URL = re.compile(r'(\w[\w+.-]*)://(.*)')
_REFUSED = {
  's3': 'Orbax, which writes the arrays of a checkpoint, knows local folders and gs:// only (google/orbax, issue 872); '
  'give gs://BUCKET/FOLDER, or a folder that all machines share, and copy it to the bucket',
  'memory': 'what one process keeps in its memory ends with it, and no other process sees it; give a local folder, '
  'which may lie in memory too: /dev/shm/FOLDER',
}
_FAULT = re.compile(
  r'\b(ABORTED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED): '
)  # how TensorStore's messages begin then; DATA_LOSS, NOT_FOUND and others are about the content
_SECS_BETWEEN_WRITES = 30.0  # of an object to which lines are added
_SHARE_OF_TIME = 0.05  # that writing those may take


def path(text: str, flag: str = '--workdir') -> Path:
  """A folder or a URL as a path; raises BadInput for a URL that is none of ours."""
  url = _URL.match(text)
  if not url:
    return pathlib.Path(text)
  if url[1] != 'gs':
    reason = _REFUSED.get(url[1], 'no store of this kind is known; give a local folder or gs://BUCKET/FOLDER')
    raise BadInput(f'{flag}={text}: {reason}')
  bucket, _, folder = url[2].partition('/')
  if not bucket or not folder.strip('/') or '//' in folder or {'.', '..'} & set(folder.split('/')):
    raise BadInput(f'{flag}={text}: not the URL of a folder in a bucket; write gs://BUCKET/FOLDER')
  _objects().register(bucket)
  return epath.Path(text)


def absolute(place: Path) -> Path:
  return place.absolute() if is_local(place) else place  # epath would put the current folder before a URL


def is_local(place: Path) -> bool:
  return '://' not in str(place)


def local_only(place: Path, what: str) -> None:
  """Raises BadInput when `place` is no local folder, for what a library writes that knows nothing else."""
  if not is_local(place):
    raise BadInput(f'{what} is written to local folders only, and {place} is none; leave it out, or change --workdir')


def write(place: Path, content: str | bytes) -> None:
  """A file that is written whole or not at all: a process killed meanwhile, or a power failure, leaves the old one."""
  content = content.encode() if isinstance(content, str) else content
  if not is_local(place):
    place.write_bytes(content)
    return
  temporary = place.with_name(place.name + TEMPORARY)
  with open(temporary, 'wb') as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, place)


@contextlib.contextmanager
def full_disk_in_words(place: Path) -> Iterator[None]:
  """Raises SaveFailed where what is done with the file `place` raises OSError, most often of a full disk."""
  try:
    yield
  except OSError as error:
    raise SaveFailed(
      f'{place}: cannot be written ({error}); make room, or repair the disk or the connection, then start the same '
      'command again'
    ) from error


def move(folder: Path, target: Path) -> None:
  """Moves a folder to a name that is free. A process killed meanwhile has moved a part: move it again."""
  target.parent.mkdir(parents=True, exist_ok=True)
  if is_local(folder):
    folder.rename(target)
    return
  for name in files_below(folder):
    write(target / name, (folder / name).read_bytes())
    (folder / name).unlink()


def is_fault(place: Path, error: Exception) -> bool:
  """Whether a library could not read `place` because its store failed, and not because of what is there."""
  return not is_local(place) and (isinstance(error, StoreFault) or bool(_FAULT.search(str(error))))


def check_listed(place: Path) -> None:
  """Raises StoreFault when a file that is there is not listed: a run would not find its checkpoints, and start over."""
  if not is_local(place) and place.name not in files_below(place.parent):
    raise StoreFault(f'{place} is there and the store does not list it; credentials need the right to list objects too')


def files_below(folder: Path, prefix: str = '') -> list[str]:
  """Every file below `folder`, by its name from there."""
  if not is_local(folder):
    return _objects().names_below(str(folder))
  out = []
  for place in sorted(folder.iterdir()):
    out += files_below(place, f'{prefix}{place.name}/') if place.is_dir() else [prefix + place.name]
  return out


def is_longer(place: Path, num_bytes: int) -> bool:
  """Whether a file has more than `num_bytes`, without reading it; raises FileNotFoundError."""
  return os.stat(place).st_size > num_bytes if is_local(place) else _objects().is_longer(str(place), num_bytes)


def has_size(place: Path, num_bytes: int) -> bool:
  """Whether a file has that many bytes, without reading it; raises FileNotFoundError."""
  return not is_longer(place, num_bytes) and (num_bytes == 0 or is_longer(place, num_bytes - 1))


def _objects() -> types.ModuleType:
  from latent_loop.storage import objects  # only when a URL is given: it loads TensorStore

  return objects


class Lines:
  """A text file that lines are added to.

  An object can only be written anew, so that happens every now and then, in sync() and in close().
  """

  def __init__(self, place: Path):
    self._place, self._file = place, open(place, 'a') if is_local(place) else None
    self._lines = [place.read_text()] if self._file is None and place.exists() else []
    self._due, self._unwritten = time.monotonic() + _SECS_BETWEEN_WRITES, False

  def add(self, line: str) -> None:
    if self._file:
      self._file.write(line)
      self._file.flush()
      return
    self._lines.append(line)
    self._unwritten = True
    if time.monotonic() >= self._due:
      with contextlib.suppress(OSError):  # they are kept, and written next time; sync() says so when it matters
        self.sync()

  def sync(self) -> None:
    """Returns when all lines are there for others to read."""
    if self._unwritten:
      began = time.monotonic()
      try:
        write(self._place, ''.join(self._lines))
        self._unwritten = False
      finally:
        now = time.monotonic()
        self._due = now + max(_SECS_BETWEEN_WRITES, (now - began) / _SHARE_OF_TIME)

  def close(self) -> None:
    self.sync()
    if self._file:
      self._file.close()
