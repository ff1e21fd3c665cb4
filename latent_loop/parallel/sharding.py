"""The mesh, and one ordered table that says how every array of the train state is split over it."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from latent_loop.config import MeshConfig
from latent_loop.errors import BadInput

# path regex -> spec. Optimizer moments and averages end in the path of their parameter, so one table
# serves all of them. Exactly one rule matches each array. Widths go over fsdp, heads and hidden units
# over tensor.
RULES = (
  (r'embed/embedding$', P('tensor', 'fsdp')),
  (r'attn/[qkv]/kernel$', P('fsdp', 'tensor', None)),
  (r'attn/[qk]/bias$', P('tensor', None)),
  (r'attn/out/kernel$', P('tensor', None, 'fsdp')),
  (r'mlp/(gate|up)/kernel$', P('fsdp', 'tensor')),
  (r'mlp/down/kernel$', P('tensor', 'fsdp')),
  (r'injection/(kernel|b)$', P(None, 'fsdp')),
  (r'core_exit/kernel$', P(None, 'fsdp')),
  (r'injection/(log_a|dt_bias)$', P()),
  (r'(norm_\d|final_norm|prelude_norm)/scale$', P()),
  (r'ns_coeffs$', P()),  # of Muon
)

# The axes that split rows, outermost first: between slices, between replicas, between holders of a weight's shards.
ROW_AXES = ('dcn', 'data', 'fsdp')
BATCH = P(ROW_AXES)


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


def path_of(keypath: tuple) -> str:
  """'opt_state/0/mu/core/0/attn/q/kernel' from a JAX key path."""
  return jax.tree_util.keystr(keypath, simple=True, separator='/')


def spec_of(path: str) -> P:
  """The one rule for `path` (of an array with at least one axis); one without exactly one is our bug, and is named."""
  hits = [spec for pattern, spec in RULES if re.search(pattern, path)]
  assert len(hits) == 1, f'{path}: {len(hits)} sharding rules match, want 1; edit latent_loop/parallel/sharding.py'
  return hits[0]


def specs_of(tree: Any) -> Any:
  """The PartitionSpec of every array of `tree`."""
  one = lambda keypath, leaf: spec_of(path_of(keypath)) if leaf.ndim else P()
  return jax.tree_util.tree_map_with_path(one, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
  """A NamedSharding for every array of `tree` (arrays or shapes); raises BadInput when one does not divide."""

  def one(keypath, leaf, spec):
    path = path_of(keypath)
    for size, axis in zip(leaf.shape, spec, strict=False):
      if axis is not None and size % mesh.shape[axis]:
        raise BadInput(
          f'config.mesh.{axis}={mesh.shape[axis]} does not divide {path} of shape {leaf.shape}; '
          'choose an axis size that divides the width, heads and vocabulary'
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, tree, specs_of(tree))


def check_batch(batch_size: int, num_microbatches: int, mesh: Mesh) -> None:
  """Raises BadInput unless every microbatch divides over the axes that split rows."""
  check_batch_sizes(batch_size, num_microbatches, dict(mesh.shape))


def check_batch_sizes(batch_size: int, num_microbatches: int, axes: dict[str, int]) -> None:
  """`check_batch` for axis name -> size, where there is no mesh yet."""
  sizes = [axes[axis] for axis in ROW_AXES]
  ways = math.prod(sizes) * num_microbatches
  if batch_size % ways:
    raise BadInput(
      f'config.train.batch_size={batch_size} does not divide over dcn x data x fsdp x num_microbatches = '
      f'{" x ".join(map(str, sizes))} x {num_microbatches}; use a multiple of {ways}'
    )


def constrain(x: jax.Array, *axes) -> jax.Array:
  """`x` split as P(*axes) where a mesh is set (jax.set_mesh), `x` itself where none is.

  Axes that a surrounding `weights.on_rows` has already split are left out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  if set(mesh.manual_axes):
    axes = tuple(axis if isinstance(axis, str) and axis not in mesh.manual_axes else None for axis in axes)
  return jax.lax.with_sharding_constraint(x, P(*axes))


def target_platform() -> str:
  """'cpu', 'gpu' or 'tpu': what the program being traced is for, which in planning is not this machine."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def on_own_rows() -> bool:
  """Whether the code being traced runs on each device's own rows (parallel/weights.py), not on the global batch."""
  return set(ROW_AXES) <= set(jax.sharding.get_abstract_mesh().manual_axes)
