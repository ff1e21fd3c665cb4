"""A kernel cannot be split by the compiler: each shard over the mesh's tensor axis runs it on its own heads."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P


def on_own_heads(attend: Callable) -> Callable:
  """`attend` (q, k, v with heads on axis 2, segment ids or None) for code that runs on each device's own rows."""
  mesh, heads = jax.sharding.get_abstract_mesh(), P(None, None, 'tensor')
  if mesh.empty:
    return attend
  specs = (heads, heads, heads, P())
  return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, axis_names={'tensor'}, check_vma=False)
