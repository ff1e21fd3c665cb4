"""Where and when weights are whole: the collectives over rows, written out instead of left to the compiler.

A device computes its own rows. Its weights lie in shards over fsdp and are gathered before use, and the gradients
of all devices are summed and scattered back. Left to the compiler, a loop over depth gathers the core again in every
iteration and reduces its gradient in every iteration of the backward pass. Here one config key says where:

  gather_once            ahead of the step, for all microbatches and depths: fewest bytes, most memory
  gather_per_microbatch  ahead of each microbatch, for all depths: no whole gradient outlives a microbatch
  gather_per_iteration   the core in every iteration: least memory, bytes grow with depth

The tensor axis is left to the compiler in all three.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from latent_loop.parallel.sharding import ROW_AXES


def on_rows(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
  """`function` run by each device on its own rows; collectives over ROW_AXES are the function's own business.

  Specs may name the tensor axis, which is left to the compiler.
  """
  strip = lambda specs: jax.tree.map(_without_tensor, specs, is_leaf=lambda x: isinstance(x, P))
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=strip(in_specs),
    out_specs=strip(out_specs),
    axis_names=set(ROW_AXES),
    # Off: the model does not know the mesh, and loop carries that start as constants would not pass.
    check_vma=False,
  )


def gather(tree: Any, specs: Any) -> Any:
  """Every array whole over fsdp; call inside `on_rows`. Its transpose sums and scatters over fsdp.

  The barrier keeps the gathering where it is written: the TPU compiler sinks it into the loop that reads it.
  """
  return jax.lax.optimization_barrier(jax.tree.map(_gather, tree, specs))


@dataclasses.dataclass(frozen=True)
class Gathering:
  """The three places at which weights may become whole, of which config.mesh.weights chooses.

  specs: a PartitionSpec for every parameter.
  """

  mode: str
  specs: dict[str, Any]

  def ahead_of_step(self, shards: dict[str, Any]) -> dict[str, Any]:
    return gather(shards, self.specs) if self.mode == 'gather_once' else shards

  def ahead_of_microbatch(self, shards: dict[str, Any], rows: Any) -> dict[str, Any]:
    if self.mode == 'gather_once':
      return shards
    later = ('core',) if self.mode == 'gather_per_iteration' else ()
    return self._gather_parts(shards, [part for part in shards if part not in later], rows)

  def ahead_of_iteration(self, shards: dict[str, Any], s_BTD: jax.Array) -> dict[str, Any]:
    """For gather_per_iteration only: in the other modes the core is whole by then."""
    return self._gather_parts(shards, ['core'], s_BTD)

  def reduce(self, grads: dict[str, Any]) -> dict[str, Any]:
    """The sum over all devices, in shards, of the gradients that each has for its rows; in float32, but over fsdp as
    weights travel, in all modes but gather_once. Over fsdp first: between pods and slices goes one shard per device.
    """
    return jax.tree.map(self._reduce, grads, self.specs)

  def _reduce(self, grad: jax.Array, spec: P) -> jax.Array:
    grad = grad.astype(jnp.float32)
    axis = _fsdp_axis(spec)
    if axis is None:
      return jax.lax.psum(grad, ROW_AXES)
    if self.mode == 'gather_once':  # in the other modes the transpose of `gather` has done it
      scatter = functools.partial(jax.lax.psum_scatter, axis_name='fsdp', scatter_dimension=axis, tiled=True)
      grad = _per_tensor_shard(scatter, spec)(grad)
    return jax.lax.psum(grad, tuple(name for name in ROW_AXES if name != 'fsdp'))

  def _gather_parts(self, shards: dict[str, Any], parts: list[str], at: Any) -> dict[str, Any]:
    """The barrier ties the gathering to `at`, what this turn of a loop reads; it would be hoisted out otherwise."""
    chosen, _ = jax.lax.optimization_barrier(({part: shards[part] for part in parts}, at))
    return {**shards, **gather(chosen, {part: self.specs[part] for part in parts})}


def _gather(shard: jax.Array, spec: P) -> jax.Array:
  axis = _fsdp_axis(spec)
  if axis is None:
    return shard
  return _per_tensor_shard(functools.partial(jax.lax.all_gather, axis_name='fsdp', axis=axis, tiled=True), spec)(shard)


def _per_tensor_shard(collective: Callable, spec: P) -> Callable:
  """`collective` on each shard over tensor by itself: the compiler would gather them around a reduce-scatter."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.shard_map(
    collective, mesh=mesh, in_specs=_whole(spec), out_specs=_whole(spec), axis_names={'tensor'}, check_vma=False
  )


def _fsdp_axis(spec: P) -> int | None:
  split = 'fsdp' in spec and jax.lax.axis_size('fsdp') > 1  # over one device it would be a copy
  return tuple(spec).index('fsdp') if split else None


def _whole(spec: P) -> P:
  """`spec` without fsdp: how the tensor axis, and only it, still splits the array."""
  return P(*(None if name == 'fsdp' else name for name in spec))


def _without_tensor(spec: P) -> P:
  return P(*(None if name == 'tensor' else name for name in spec))
