"""One ordered table that says how every array of the train state is split over the mesh."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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
