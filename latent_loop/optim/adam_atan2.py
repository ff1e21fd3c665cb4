"""The optimizer of the paper's run as an optax transformation: Adam whose ratio is an arctangent.

Four things differ from Adam (the flags update_clipping, atan_adam, running_init of the reference run):
the moments start at the first gradient instead of zero, yet are bias-corrected as if they did not, so the
first step is about 2.2 times a steady one; the second moment never falls below eps^2; atan2(m, sqrt(v))
replaces m / (sqrt(v) + eps), so no epsilon divides; and each tensor's step is divided by the RMS of
gradient / sqrt(v) where that exceeds 1 (over all parameters that are one tensor in the reference).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from latent_loop.parallel.sharding import path_of


class AdamAtan2State(NamedTuple):
  count: jax.Array
  mu: optax.Params
  nu: optax.Params


def scale_by_adam_atan2(b1: float, b2: float, eps: float, group: Callable[[str], str]) -> optax.GradientTransformation:
  """Update directions; multiply by minus the learning rate. State per tensor: mu and nu.

  group: parameter path -> name; parameters of one name share the RMS by which their step is divided.
  """

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return AdamAtan2State(jnp.zeros((), jnp.int32), zeros(), zeros())

  def update(grads, state, params=None):
    del params
    count = state.count + 1
    first = count == 1
    mu = jax.tree.map(lambda g, m: jnp.where(first, g, m), grads, state.mu)
    nu = jax.tree.map(lambda g, v: jnp.where(first, jnp.square(g), v), grads, state.nu)
    mu = jax.tree.map(lambda g, m: m + (1 - b1) * (g - m), grads, mu)
    nu = jax.tree.map(lambda g, v: jnp.maximum(b2 * v + (1 - b2) * jnp.square(g), eps**2), grads, nu)
    m_scale, v_scale = 1 / (1 - b1**count), jnp.sqrt(1 - b2**count)

    sums: dict[str, jax.Array] = {}
    sizes: dict[str, int] = {}
    squares = jax.tree.map(lambda g, v: jnp.sum(jnp.square(g) / v), grads, nu)
    for (path, g), square in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(squares), strict=True):
      name = group(path_of(path))
      sums[name], sizes[name] = sums.get(name, 0.0) + square, sizes.get(name, 0) + g.size

    def direction(path, m, v):
      name = group(path_of(path))
      clip = jnp.maximum(1.0, jnp.sqrt(sums[name] / sizes[name]))
      return m_scale / clip * jnp.arctan2(m, jnp.sqrt(v) / v_scale)

    return jax.tree_util.tree_map_with_path(direction, mu, nu), AdamAtan2State(count, mu, nu)

  return optax.GradientTransformation(init, update)
