"""Guards of the train state: an update that is not finite is not made, a state that is not finite is not saved."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from latent_loop.parallel.sharding import path_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Skips:
  """Updates that were not made because the loss or a gradient was not finite."""

  total: jax.Array
  in_row: jax.Array  # up to the last step

  @classmethod
  def none(cls) -> 'Skips':
    return cls(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def choose(finite: jax.Array, new: Any, old: Any, skips: Skips, most: int) -> tuple[Any, Skips]:
  """`new` where `finite`, else `old` to the bit; and the count.

  After `most` skips in a row nothing changes any more: the host, which reads one step late, finds the state as it was.
  """
  made = finite & (skips.in_row < most)
  skipped = 1 - made.astype(jnp.int32)
  kept = jax.tree.map(lambda new, old: jnp.where(made, new, old), new, old)
  return kept, Skips(skips.total + skipped, (skips.in_row + 1) * skipped)


@jax.jit
def _all_finite(tree: Any) -> Any:
  return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree)


def not_finite(tree: Any) -> list[str]:
  """Paths of the arrays of `tree` that hold a value that is not finite; waits for the device."""
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_all_finite(tree)))
  return [path_of(path) for path, finite in leaves if not finite]
