"""Devices as a mesh with the axes of config.mesh, and which batches divide over it."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from latent_loop.config import MeshConfig
from latent_loop.errors import BadInput
from latent_loop.parallel.sharding import ROW_AXES


def make_mesh(cfg: MeshConfig, devices: list | None = None) -> Mesh:
  """The mesh of `cfg` over `devices` (default: all). Raises BadInput when the sizes do not fit."""
  devices = jax.devices() if devices is None else devices
  shape = resolve(cfg, len(devices))
  return Mesh(_arranged(devices, tuple(shape.values())), tuple(shape), axis_types=(AxisType.Auto,) * 4)


def _arranged(devices: list, shape: tuple[int, ...]) -> np.ndarray:
  """The devices in the mesh's shape; on TPUs neighbors of an axis are neighbors on the torus, slices are on `dcn`."""
  if devices[0].platform != 'tpu':
    return np.asarray(devices).reshape(shape)
  slices = len({getattr(device, 'slice_index', 0) for device in devices})  # a lone slice may not say its number
  if slices != shape[0]:
    raise BadInput(f'config.mesh.dcn={shape[0]}: the devices are in {slices} slice(s); dcn is their number')
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  ici, dcn = (1, *shape[1:]), (slices, 1, 1, 1)
  return mesh_utils.create_hybrid_device_mesh(ici, dcn, devices, allow_split_physical_axes=True)


def resolve(cfg: MeshConfig, num_devices: int) -> dict[str, int]:
  """Axis name -> size with -1 filled in; raises BadInput when they cannot multiply to `num_devices`."""
  sizes = {'dcn': cfg.dcn, 'data': cfg.data, 'fsdp': cfg.fsdp, 'tensor': cfg.tensor}
  known = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if num_devices % known or (not free and known != num_devices):
    raise BadInput(
      f'config.mesh={sizes}: the axes given multiply to {known}, which does not fit {num_devices} '
      'device(s); change an axis, or set one to -1 to take what is left'
    )
  return {name: num_devices // known if name in free else size for name, size in sizes.items()}


def check_batch(batch_size: int, num_microbatches: int, axes: Mapping[str, int]) -> None:
  """Raises BadInput unless every microbatch divides over the axes that split rows. axes: name -> size."""
  sizes = [axes[axis] for axis in ROW_AXES]
  ways = math.prod(sizes) * num_microbatches
  if batch_size % ways:
    raise BadInput(
      f'config.train.batch_size={batch_size} does not divide over dcn x data x fsdp x num_microbatches = '
      f'{" x ".join(map(str, sizes))} x {num_microbatches}; use a multiple of {ways}'
    )


def with_mesh(step: Callable, mesh: Mesh) -> Callable:
  """`step` run inside the mesh context, where constraints by axis name hold."""

  @functools.wraps(step)
  def run(*args):
    with jax.set_mesh(mesh):
      return step(*args)

  def lower(*args):
    with jax.set_mesh(mesh):
      return step.lower(*args)

  run.compiled_count = step._cache_size
  run.lower = lower
  return run
