"""Verified checkpoints: asynchronous saves of the whole train state, exact restores, all of Orbax.

A step folder holds `state` (arrays, Orbax) and manifest.jsonl. A save goes: a mark that it is under way, Orbax in the
background, the manifest, the mark gone, older steps deleted. A restore goes: the newest step whose manifest and
files are what was saved, and whose arrays, once on the devices, hold what they held; any other is set aside.
"""

import concurrent.futures
import json
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from latent_loop.checkpoint import content, manifest
from latent_loop.checkpoint.content import named
from latent_loop.checkpoint.folder import Folder
from latent_loop.checkpoint.manifest import Damaged, Manifest
from latent_loop.config import CheckpointConfig
from latent_loop.errors import BadInput, SaveFailed
from latent_loop.parallel.sharding import path_of
from latent_loop.storage import Path

# What Orbax raises when it cannot read or write.
FAULTS = (ocp.errors.InvalidLayoutError, OSError, KeyError, ValueError, RuntimeError)


class Checkpoints:
  """The checkpoints of one workdir. Close it: a save may still be under way, and it keeps other processes from here.

  read_only: another process may be writing here, so leave everything as it is.
  """

  def __init__(self, workdir: Path, cfg: CheckpointConfig, read_only: bool = False):
    self._cfg, self._read_only = cfg, read_only
    self.folder = Folder(workdir)
    self._worker = concurrent.futures.ThreadPoolExecutor(1, 'save')
    self._saving: tuple[int, concurrent.futures.Future] | None = None

  def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
    """Starts a save and returns; an earlier save's failure is raised here, in wait() or in close()."""
    self.wait()
    try:
      if jax.process_index() == 0:
        self.folder.begin(step)
      names, sums = list(named(state)), content.start(state)
      response = ocp.save_async(str(self.folder / step), state)
    except FAULTS as error:
      raise self._failure(step, error) from error
    arrays = describe(state)

    def finish() -> None:
      response.result()
      checksums = content.finish(names, sums)
      if jax.process_index() == 0:
        entries = {name: {'kind': arrays[name], 'checksum': checksums[name]} for name in names}
        manifest.write(self.folder / step, step, about, entries)
        self.folder.end(step)
        self.folder.delete_old(self._cfg, step)

    self._saving = step, self._worker.submit(finish)

  def wait(self) -> None:
    """Returns when the save under way has its manifest; raises SaveFailed when it could not be written."""
    if self._saving is not None:
      (step, future), self._saving = self._saving, None
      try:
        future.result()
      except FAULTS as error:
        raise self._failure(step, error) from error

  def _failure(self, step: int, error: BaseException) -> SaveFailed:
    try:
      older = [s for s in self.folder.steps() if s != step]
      rest = f'the step before it, {older[-1]}, is as it was' if older else 'there is no step before it'
    except OSError:  # an object store that is gone altogether
      rest = 'no step before it was touched'
    return SaveFailed(
      f'{self.folder / step}: this checkpoint could not be saved ({manifest.short(error)}); {rest}. Make room, or '
      'repair the disk or the connection, then start the same command again'
    )

  def restore_newest(
    self, shapes: Any, specs: Any, fingerprint: str | None, only: tuple[str, ...] = ()
  ) -> tuple[int, Any] | None:
    """(step, state) of the newest good checkpoint; None when this run has not saved any yet.

    Names every damaged step on stderr and, unless read_only, sets it aside. Raises BadInput when there are damaged
    ones only, and when `restore` does.
    """
    skipped: list[int] = []
    while True:
      step = self._newest_good(skipped)
      if step is None:
        if not self._read_only:
          self._worker.submit(content.prepare, shapes, specs)  # compiles while the first steps run
        return None
      state = reason = None
      try:
        state = self._restore(step, shapes, specs, fingerprint, only)
      except Damaged as error:
        reason = error
      if not _anywhere(reason is not None):
        return step, state
      if jax.process_index() == 0:
        self._skip(step, reason or Damaged('another process cannot read it'), skipped)

  def go_back(self, last: int) -> int | None:
    """The newest step up to `last` with whole files, once all behind it are set aside; None: there is none.

    As process 0 sees it; damaged steps that it meets are set aside, too.
    """
    self.wait()
    found = None
    if jax.process_index() == 0:
      try:
        steps = self.folder.steps()
        for step in reversed([s for s in steps if s <= last]):
          try:
            manifest.check_files(self.folder / step, manifest.read(self.folder / step, step))
            found = step
            break
          except Damaged as error:
            self._skip(step, error, [])
        for step in reversed([s for s in steps if s > last] if found is not None else []):
          self.folder.set_aside(step)
      except OSError as error:
        raise SaveFailed(
          f'{self.folder.path}: what is behind step {last} could not be set aside ({manifest.short(error)}); make '
          'room, or repair the disk or the connection, then start the same command again'
        ) from error
    return _from_process_0(found)

  def _newest_good(self, skipped: list[int]) -> int | None:
    """The newest step with whole files, as process 0 sees it; None: there never was any; raises BadInput."""
    found = None
    if jax.process_index() == 0:
      found = {'step': None, 'refused': None}
      try:
        with self.folder.fault_in_words():
          if not self._read_only:
            self.folder.claim()
            self.folder.clean_up()
          for step in reversed([s for s in self.folder.steps() if s not in skipped]):
            try:
              manifest.check_files(self.folder / step, manifest.read(self.folder / step, step))
              found['step'] = step
              break
            except Damaged as error:
              self._skip(step, error, skipped)
      except BadInput as error:
        found['refused'] = str(error)
      if found['step'] is None and not found['refused'] and (skipped or self.folder.list_set_aside()):
        found['refused'] = (
          f'{self.folder.path}: no checkpoint there is good, and a run is never started over; repair one of those in '
          f'{self.folder.set_aside_path.name}/ and move it back, or give another --workdir'
        )
    found = _from_process_0(found)
    if found['refused']:
      self.folder.release()
      raise BadInput(found['refused'])
    return found['step']

  def _skip(self, step: int, reason: Damaged, skipped: list[int]) -> None:
    skipped.append(step)
    where = 'left where it is' if self._read_only else f'set aside as {self.folder.set_aside(step)}'
    print(f'warning: {self.folder / step}: damaged: {reason}; {where}', file=sys.stderr, flush=True)

  def restore(self, step: int, shapes: Any, specs: Any, fingerprint: str | None, only: tuple[str, ...] = ()) -> Any:
    """The train state at `step`, laid out by `specs`; with `only`, just the arrays under these names.

    Raises BadInput when it is damaged, or when its arrays or its data are not those of this run: names the first
    difference.
    """
    path = self.folder / step
    try:
      manifest.check_files(path, manifest.read(path, step))
      return self._restore(step, shapes, specs, fingerprint, only)
    except Damaged as error:
      raise BadInput(f'{path}: damaged: {error}; take another step') from error

  def _restore(self, step: int, shapes: Any, specs: Any, fingerprint: str | None, only: tuple[str, ...]) -> Any:
    """As `restore`, for a step whose files were found whole; raises Damaged when its arrays are not."""
    path = self.folder / step
    saved = manifest.read(path, step)
    _check_kinds(path, saved, shapes)
    then = saved.about.get('data_fingerprint')
    if fingerprint is not None and then != fingerprint:
      raise BadInput(
        f'{path}: the data changed since the run began (fingerprint {then} then, '
        f'{fingerprint} now), so it cannot continue exactly; restore the data and the Python version, or start a new '
        'workdir'
      )
    wanted = {name for name in named(shapes) if not only or name.split('/')[0] in only}
    part = lambda tree: {name: leaf for name, leaf in named(tree).items() if name in wanted}
    compiling = self._worker.submit(content.prepare, part(shapes), part(specs))

    def target(keypath: tuple, a: Any, spec: Any) -> Any:
      here = path_of(keypath) in wanted
      return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=spec) if here else ocp.PLACEHOLDER

    try:
      state = ocp.load(str(path), jax.tree_util.tree_map_with_path(target, shapes, specs))
    except FAULTS as error:
      raise manifest.unreadable(path, error) from error
    compiling.result()
    arrays = part(state)
    manifest.check_arrays(saved, content.finish(list(arrays), content.start(arrays)))
    return state

  def close(self) -> None:
    """Waits for the save under way; raises SaveFailed if it could not be written."""
    try:
      self.wait()
    finally:
      self._worker.shutdown()
      self.folder.release()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def describe(tree: Any) -> dict[str, str]:
  """path -> 'float32[128,384]' for every array of `tree`."""
  return {name: f'{leaf.dtype}{list(leaf.shape)}'.replace(' ', '') for name, leaf in named(tree).items()}


def _check_kinds(path: Any, saved: Manifest, shapes: Any) -> None:
  """Raises BadInput: Orbax would cast a wrong dtype without a word."""
  there, here = {name: array['kind'] for name, array in saved.arrays.items()}, describe(shapes)
  for name in sorted(there.keys() | here.keys()):
    if here.get(name) != there.get(name):
      raise BadInput(
        f'{path}: array {name} is {there.get(name, "absent")} in the checkpoint and {here.get(name, "absent")} in this '
        'config; continue with the config of the run, or start a new workdir'
      )


def _from_process_0(value: Any) -> Any:
  """What process 0 gives, on every process."""
  if jax.process_count() == 1:
    return value
  text = json.dumps(value).encode()
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  buffer = np.zeros(size, np.uint8)
  if jax.process_index() == 0:
    buffer[:] = np.frombuffer(text, np.uint8)
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


def _anywhere(here: bool) -> bool:
  """Whether it is so on any process."""
  return here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(here)).any())
