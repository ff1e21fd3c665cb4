"""The loop over depth, written once: everything that iterates the core comes through here."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

LOOP_SCOPE = 'depth_loop'  # names the loops over depth in compiled programs

Core = Callable[[jax.Array], jax.Array]  # s_BTD -> s_BTD, with parameters and e bound


def iterate(core: Core, s_BTD: jax.Array, count: jax.Array | int) -> jax.Array:
  """`count` applications of the core, without gradient; `count` may be traced, so one executable serves all."""
  return jax.lax.fori_loop(0, count, lambda _, s: core(s), s_BTD)


def iterate_with_gradient(core: Core, s_BTD: jax.Array, k: jax.Array | int, max_k: int, remat: bool) -> jax.Array:
  """`k` applications with gradient out of `max_k` compiled ones (k may be traced, max_k is static).

  An iteration past k passes the state through. With `remat` only the state between iterations is kept
  for the backward pass, and each iteration is computed again there. Without, iterations stand one after another
  in the program: a scan would copy everything that the backward pass reads into stacked arrays.
  """
  step = lambda s, i: jax.lax.cond(i < k, core, lambda s: s, s)
  if not remat:
    for i in range(max_k):
      s_BTD = step(s_BTD, i)
    return s_BTD
  body = jax.checkpoint(lambda s, i: (step(s, i), None), prevent_cse=False)
  return jax.lax.scan(body, s_BTD, jnp.arange(max_k))[0]
