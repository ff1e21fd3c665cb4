"""The loop over depth, written once: everything that iterates the core comes through here."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LOOP_SCOPE = 'depth_loop'  # names the loops over depth in compiled programs

Core = Callable[[jax.Array], jax.Array]  # s_BTD -> s_BTD, with parameters and e bound


def iterate(core: Core, s_BTD: jax.Array, count: jax.Array | int) -> jax.Array:
  """`count` applications of the core, without gradient; `count` may be traced, so one executable serves all."""
  return jax.lax.fori_loop(0, count, lambda _, s: core(s), s_BTD)


def iterate_with_gradient(core: Core, s_BTD: jax.Array, k: jax.Array | int, max_k: int, remat: str) -> jax.Array:
  """`k` applications with gradient out of `max_k` compiled ones (k may be traced, max_k is static).

  All max_k are computed, those past k for nothing: behind a branch, what the backward pass might read is all written,
  weights and their gradients too, up to three times the memory (experiments/LOG.md). remat 'none': all stand in the
  program, which a CPU runs faster than a loop. 'block': one does, whose blocks the core itself keeps the inputs of.
  'iteration': one does, and only the states between iterations are kept.
  """
  step = lambda s, i: jnp.where(i < k, core(s), s)
  if remat == 'none':
    return functools.reduce(step, range(max_k), s_BTD)
  step = jax.checkpoint(step, prevent_cse=False) if remat == 'iteration' else step
  return jax.lax.scan(lambda s, i: (step(s, i), None), s_BTD, jnp.arange(max_k))[0]


def iterate_rows(core: Callable, leave: Callable, memory: Any, s_BTD: jax.Array, running_B: jax.Array):
  """Each row's iterations until it leaves: (memory, s_BTD, depth_B), without gradient; one executable for all depths.

  core(memory, s_BTD, t, running_B) -> (memory, s_BTD): iteration t = 0, 1, ... of the rows that run.
  leave(memory, before_BTD, s_BTD, t, running_B) -> (memory, leaves_B): asked after t = 1, 2, ... iterations.
  A row that has left keeps its state while others go on.
  """

  def body(loop):
    t, memory, before_BTD, running_B, depth_B = loop
    memory, s_BTD = core(memory, before_BTD, t, running_B)
    s_BTD = jnp.where(running_B[:, None, None], s_BTD, before_BTD)
    memory, leaves_B = leave(memory, before_BTD, s_BTD, t + 1, running_B)
    return t + 1, memory, s_BTD, running_B & ~leaves_B, depth_B + running_B

  start = jnp.int32(0), memory, s_BTD, running_B, jnp.zeros(running_B.shape, jnp.int32)
  _, memory, s_BTD, _, depth_B = jax.lax.while_loop(lambda loop: jnp.any(loop[3]), body, start)
  return memory, s_BTD, depth_B
