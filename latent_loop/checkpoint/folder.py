"""The folder `checkpoints` of a run: which steps it holds, what was left unfinished, what is set aside or deleted.

STEP/ is a step. STEP.unfinished stands beside it from before its save starts until its manifest is written, so that
a save that was killed is known from a step that lost its manifest. set_aside/ holds the damaged ones, as STEP-0, STEP-1
...; STEP.aside-0 stands beside one on its way there: in an object store that is no single act. The process that trains
holds the file `lock` beside the folder.
"""

import contextlib
import fcntl
import platform
import re
import sys
import time
from collections.abc import Iterator
from typing import IO

from etils import epath

from latent_loop import storage
from latent_loop.checkpoint import manifest
from latent_loop.config import CheckpointConfig
from latent_loop.errors import BadInput

_MARK, _ORBAX, _ASIDE = '.unfinished', '.orbax-checkpoint-tmp', 'set_aside'
_LOCK = 'lock'
PATIENCE_SECS = 30.0  # so long a process that was told to end may take to do so
_LEAVING = re.compile(r'(\d+)\.aside-(\d+)')


def _machine() -> str:
  """This one since it was started: no other has the number, nor will it have it again."""
  try:
    with open('/proc/sys/kernel/random/boot_id') as file:
      return file.read().strip()
  except OSError:
    return platform.node()


class Folder:
  """Process 0 alone changes it."""

  def __init__(self, workdir: storage.Path):
    self.path = epath.Path(storage.absolute(workdir)) / 'checkpoints'
    self.set_aside_path = self.path / _ASIDE
    if storage.is_local(self.path) and self.path.is_file():
      raise BadInput(f'{self.path}: a file, where the folder of the checkpoints belongs; move it away')
    self._lock: IO | None = None

  def claim(self) -> None:
    """Keeps other processes of this machine from the folder, as far as its disk has locks; raises BadInput when one has
    it. A disk of the network may keep the lock of a machine that is gone: of another machine's there is a warning only.
    """
    if self._lock is not None or not storage.is_local(self.path):
      return
    try:
      self._lock = open(self.path.parent / _LOCK, 'a+')
      if self._is_mine(time.monotonic() + PATIENCE_SECS):
        self._lock.truncate(0)
        self._lock.write(_machine())
        self._lock.flush()
        return
      self._lock.seek(0)
      there = self._lock.read()
    except OSError:
      return  # a folder that cannot be written, of a run that has ended; or a disk without locks
    if there == _machine():
      self.release()
      raise BadInput(
        f"{self.path.parent}: another process trains here, and two would spoil each other's saves; end that one, or "
        'give another --workdir'
      )
    print(
      f'warning: {self.path.parent / _LOCK} is held by another machine; if a process there still trains here, end it: '
      "two would spoil each other's saves",
      file=sys.stderr,
      flush=True,
    )

  def _is_mine(self, deadline: float) -> bool:
    while True:
      try:
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
      except BlockingIOError:
        if time.monotonic() >= deadline:
          return False
        time.sleep(0.1)

  def release(self) -> None:
    if self._lock is not None:
      self._lock.close()
      self._lock = None

  @contextlib.contextmanager
  def fault_in_words(self) -> Iterator[None]:
    """Raises BadInput for what the disk or the store refuses."""
    try:
      yield
    except OSError as error:
      raise BadInput(
        f'{self.path}: cannot be used ({manifest.short(error)}); repair the disk, its rights or the connection'
      ) from error

  def __truediv__(self, step: int | str) -> epath.Path:
    return self.path / str(step)

  def steps(self) -> list[int]:
    """Every step that is not known to be unfinished, ascending; some of them may be damaged."""
    names = self._names()
    leaving = {match[1] for match in map(_LEAVING.fullmatch, names) if match}
    found = [int(name) for name in names if name.isdecimal() and name == str(int(name)) and name not in leaving]
    return sorted(s for s in found if f'{s}{_MARK}' not in names or self._has_manifest(s))

  def unfinished(self) -> list[int]:
    """Every step that a save works on, or was killed at."""
    names = [name.removesuffix(_MARK) for name in self._names() if name.endswith(_MARK)]
    return sorted(int(name) for name in names if name.isdecimal() and not self._has_manifest(name))

  def _names(self) -> list[str]:
    return [path.name for path in self.path.iterdir()] if self.path.exists() else []

  def _has_manifest(self, step: int | str) -> bool:
    return (self / step / manifest.NAME).exists()

  def begin(self, step: int) -> None:
    """Notes that a save of `step` starts."""
    self.path.mkdir(parents=True, exist_ok=True)
    self._mark(step).touch()

  def end(self, step: int | str) -> None:
    """Notes that `step` has its manifest."""
    self._mark(step).unlink(missing_ok=True)

  def _mark(self, step: int | str) -> epath.Path:
    return self.path / f'{step}{_MARK}'

  def clean_up(self) -> None:
    """Ends what a killed process left: removes unfinished saves, of which nobody was told; the rest goes aside."""
    for name in self._names():
      if _ORBAX in name:
        (self / name).rmtree() if (self / name).is_dir() else (self / name).unlink()
      elif leaving := _LEAVING.fullmatch(name):
        self._move_aside(*leaving.groups())
    for name in self._names():
      step = name.removesuffix(_MARK)
      if name.endswith(_MARK) and step.isdecimal():
        if (self / step).exists() and not self._has_manifest(step):
          (self / step).rmtree()
        self.end(step)

  def set_aside(self, step: int) -> epath.Path:
    """Moves a damaged step out of the way, where it can be looked at; returns the place."""
    taken = {path.name for path in self.list_set_aside()}
    number = next(i for i in range(len(taken) + 1) if f'{step}-{i}' not in taken)
    return self._move_aside(step, number)

  def _move_aside(self, step: int | str, number: int | str) -> epath.Path:
    """Killed anywhere in it, it has to be done again, and can be."""
    mark, target = self.path / f'{step}.aside-{number}', self.set_aside_path / f'{step}-{number}'
    mark.touch()
    if (self / step).exists():
      storage.move(self / step, target)
    mark.unlink()
    return target

  def list_set_aside(self) -> list[epath.Path]:
    return sorted(self.set_aside_path.iterdir()) if self.set_aside_path.exists() else []

  def delete_old(self, cfg: CheckpointConfig, newest: int) -> None:
    """Deletes what `cfg` does not keep, once `newest` has its manifest; damaged steps stay for the next start."""
    finished = [step for step in self.steps() if step <= newest and self._has_manifest(step)]
    for step in finished[: -cfg.keep_last]:
      if not (cfg.keep_every_steps and step % cfg.keep_every_steps == 0):
        self.begin(step)  # killed here, what is left of it counts as unfinished
        (self / step / manifest.NAME).unlink()
        (self / step).rmtree()
        self.end(step)
