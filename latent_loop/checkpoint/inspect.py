"""What a person asks about checkpoints: which are there, are they good, what differs between two. Changes nothing."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from latent_loop.checkpoint import FAULTS, content, manifest
from latent_loop.checkpoint.folder import Folder
from latent_loop.checkpoint.manifest import Damaged, Manifest
from latent_loop.errors import BadInput
from latent_loop.parallel.sharding import path_of
from latent_loop.sealing import flat
from latent_loop.storage import Path


def table(workdir: Path) -> list[str]:
  """A line per step: bytes, arrays, and what a look at the manifest and the sizes of files says of its health."""
  folder = _folder(workdir)
  lines = ['    step          MB  arrays  health']
  for step in folder.steps():
    try:
      found = manifest.read(folder / step, step)
      manifest.check_sizes(folder / step, found)
      lines.append(f'{step:8d}  {found.num_bytes / 1e6:10.1f}  {len(found.arrays):6d}  whole')
    except Damaged as error:
      lines.append(f'{step:8d}  {"":10}  {"":6}  damaged: {error}')
  lines += [f'{step:8d}  {"":10}  {"":6}  unfinished: a save under way, or one that was killed' for step in
            folder.unfinished()]  # fmt: skip
  return lines + [f'set aside: {path}' for path in folder.list_set_aside()]


def verify(workdir: Path, steps: list[int]) -> Iterator[str]:
  """Reads every byte of `steps` (none given: of all), and every array; raises BadInput naming the damaged ones."""
  folder, damaged = _folder(workdir), []
  for step in steps or folder.steps():
    try:
      found = _whole(folder / step, step)
      arrays = _load(folder / step, set(found.arrays))
      manifest.check_arrays(found, content.finish(list(arrays), content.start(arrays)))
      yield f'step {step}: good: {len(found.files)} files, {found.num_bytes / 1e6:.1f} MB, {len(arrays)} arrays'
    except Damaged as error:
      damaged.append(f'{folder / step}: damaged: {error}')
      yield f'step {step}: damaged: {error}'
  if damaged:
    raise BadInput('; '.join(damaged) + '; a run that starts there sets it aside and uses the newest good one')


def differences(a: tuple[Path, int | None], b: tuple[Path, int | None]) -> Iterator[str]:
  """A line for every value of the config and every array in which two checkpoints differ; no step: the newest."""
  folders, found = [], []
  for workdir, step in (a, b):
    folder = _folder(workdir)
    if step is None and not folder.steps():
      raise BadInput(f'{folder.path}: no save there is finished; wait for one, or give another --workdir')
    step = step if step is not None else max(folder.steps())
    try:
      found.append(_whole(folder / step, step))
    except Damaged as error:
      raise BadInput(f'{folder / step}: damaged: {error}; take another step') from error
    folders.append(folder / step)
  yield f'a is {folders[0]}, b is {folders[1]}'
  for name, (x, y) in _unequal(*(flat(one.about) for one in found)):
    yield f'{name}: {x!r} in a, {y!r} in b'
  changed = []
  for name, (x, y) in _unequal(*(one.arrays for one in found)):
    kinds = [entry['kind'] if entry else 'absent' for entry in (x, y)]
    if kinds[0] != kinds[1]:
      yield f'{name}: {kinds[0]} in a, {kinds[1]} in b'
    else:
      changed.append(name)
  loaded = [_load(path, set(changed)) for path in folders] if changed else []
  for name in changed:
    x, y = (np.asarray(arrays[name], np.float64) for arrays in loaded)
    where = x != y
    yield f'{name}: {where.sum()} of {x.size} elements differ, by at most {np.abs(x - y).max():.3g}'
  yield f'{len(changed)} of {len(found[0].arrays)} arrays hold something else'


def _folder(workdir: Path) -> Folder:
  folder = Folder(workdir)
  with folder.fault_in_words():
    there = folder.steps() or folder.unfinished() or folder.list_set_aside()
  if not there:
    raise BadInput(f'{folder.path}: no checkpoint there; give the --workdir of a training run that has saved')
  return folder


def _whole(path: epath.Path, step: int) -> Manifest:
  if not path.exists():
    raise BadInput(f'{path}: no such checkpoint; see which there are with python -m launch.checkpoint list')
  found = manifest.read(path, step)
  manifest.check_files(path, found)
  return found


def _load(path: epath.Path, names: set[str]) -> dict[str, jax.Array]:
  """Arrays by name, on the processor, whatever the devices and the config they were saved from."""
  one = jax.sharding.SingleDeviceSharding(jax.local_devices(backend='cpu')[0])

  def target(keypath: tuple, leaf: Any) -> Any:
    wanted = path_of(keypath) in names
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one) if wanted else ocp.PLACEHOLDER

  try:
    shapes = ocp.metadata(str(path)).metadata
    state = ocp.load(str(path), jax.tree_util.tree_map_with_path(target, shapes))
  except FAULTS as error:
    raise manifest.unreadable(path, error) from error
  loaded = {name: leaf for name, leaf in content.named(state).items() if name in names}
  if loaded.keys() != names:
    raise Damaged(f'array {sorted(names - loaded.keys())[0]} is missing')
  return loaded


def _unequal(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
  for key in sorted(a.keys() | b.keys()):
    if a.get(key) != b.get(key):
      yield key, (a.get(key), b.get(key))
