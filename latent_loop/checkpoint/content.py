"""A checksum of what an array holds, computed where the array lives.

Two sums modulo 2^32 over the elements, each element mixed with its place in the global array. The mixing is one to one
for a given place, so any change of one element changes both sums; what else changes, two swapped elements say, escapes
with a probability of 2^-64. Sums of integers do not depend on their order: neither the mesh, the number of processes
nor the way an array is split changes them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from latent_loop.parallel.sharding import path_of


def named(tree: Any) -> dict[str, Any]:
  """path -> leaf for every array of `tree`, by name, so that a state and a dict of its arrays give the same program."""
  return dict(sorted((path_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)))


def start(tree: Any) -> jax.Array:
  """Starts the checksums of all arrays: [array, 2], whole on every process, in the order of `named`.

  It returns at once, and the arrays may be donated right after.
  """
  leaves = list(named(tree).values())
  return compiled(tuple(_kind(leaf, leaf.sharding) for leaf in leaves))(leaves)


def prepare(shapes: Any, specs: Any) -> None:
  """Compiles `start` for arrays of these shapes under these shardings, ahead of the first call."""
  compiled(tuple(map(_kind, named(shapes).values(), named(specs).values())))


def finish(names: list[str], sums: jax.Array) -> dict[str, str]:
  """name -> 16 hexadecimal digits; waits for the device."""
  return {name: f'{a:08x}{b:08x}' for name, (a, b) in zip(names, np.asarray(sums).tolist(), strict=True)}


def _kind(leaf: Any, sharding: jax.sharding.Sharding) -> tuple:
  return leaf.shape, leaf.dtype, sharding


@functools.lru_cache(maxsize=8)
def compiled(kinds: tuple) -> jax.stages.Compiled:
  """One program for all arrays of a state; it and the state's sharding are known before the first save."""
  shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in kinds]
  sharding = kinds[0][2]
  whole = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding
  return jax.jit(lambda leaves: jnp.stack(list(map(_sums, leaves))), out_shardings=whole).lower(shapes).compile()


@jax.jit  # so arrays of one kind are traced once
def _sums(x: jax.Array) -> jax.Array:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == jnp.bool:
    x = x.astype(jnp.uint8)
  width = min(8 * x.dtype.itemsize, 32)  # 64 bits become two words, one more axis
  words = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{width}')).astype(jnp.uint32)
  place = jnp.zeros(words.shape, jnp.uint32)
  for axis, size in enumerate(words.shape):
    place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  first = _mix(words ^ _mix(place ^ np.uint32(0x9E3779B9)))
  second = _mix(first + place * np.uint32(0x85EBCA77))
  add = lambda a, b: (a[0] + b[0], a[1] + b[1])
  zero = np.uint32(0)
  return jnp.stack(jax.lax.reduce((first, second), (zero, zero), add, tuple(range(place.ndim))))


def _mix(x: jax.Array) -> jax.Array:
  """A one-to-one scrambling of 32 bits, in which every input bit reaches every output bit (that of MurmurHash3)."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
