"""Depth laws: how many iterations a training step runs, as a pure function of (key, step).

Same key and step, same depth on every process; nothing to checkpoint. Every law gives the total depth
r >= 1, which is split into n = max(r - k, 0) iterations without gradient and min(r, k) with.
"""

import math

import jax
import jax.numpy as jnp

from latent_loop.config import DepthConfig


def _poisson_lognormal(key: jax.Array, mean: jax.Array, sigma: float) -> jax.Array:
  """1 + Poisson(rate), rate log-normal with mean `mean`: the paper's heavy-tailed law (section 3.3)."""
  rate_key, count_key = jax.random.split(key)
  rate = jnp.exp(jnp.log(mean) - sigma**2 / 2 + sigma * jax.random.normal(rate_key))
  return 1 + jax.random.poisson(count_key, rate)


def _poisson(key: jax.Array, mean: jax.Array, sigma: float) -> jax.Array:
  """max(1, Poisson(mean)), Parcae's law, one draw for the whole batch."""
  return jnp.maximum(jax.random.poisson(key, mean), 1)


def _uniform(key: jax.Array, mean: jax.Array, sigma: float) -> jax.Array:
  """Uniform on 1 .. 2 mean - 1."""
  return jax.random.randint(key, (), 1, 2 * mean.astype(jnp.int32))


def _fixed(key: jax.Array, mean: jax.Array, sigma: float) -> jax.Array:
  return mean.astype(jnp.int32)


LAWS = {'poisson_lognormal': _poisson_lognormal, 'poisson': _poisson, 'uniform': _uniform, 'fixed': _fixed}


def draw(cfg: DepthConfig, key: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(n, k) of this step, int32 scalars, from the key of the run; call inside jit."""
  key = jax.random.fold_in(jax.random.fold_in(key, step), 0)  # step.STATE is the other use
  progress = _progress(cfg, step)
  k = jnp.maximum(jnp.ceil(progress * cfg.backprop_depth), 1)
  mean = jnp.ceil(progress * (cfg.mean - cfg.backprop_depth)) + k
  depth = LAWS[cfg.kind](key, mean, cfg.sigma).astype(jnp.int32)
  k = k.astype(jnp.int32)
  return jnp.maximum(depth - k, 0), jnp.minimum(depth, k)


def _progress(cfg: DepthConfig, step: jax.Array) -> jax.Array:
  """How far the curriculum has come, from 0 to 1."""
  if cfg.curriculum == 'none':
    return jnp.float32(1.0)
  fraction = jnp.minimum((step + 1) / cfg.curriculum_steps, 1.0)
  return fraction if cfg.curriculum == 'linear' else 1 - jnp.sqrt(1 - fraction)


def expected(cfg: DepthConfig) -> float:
  """The law's mean depth once any curriculum has ended."""
  return cfg.mean + {'poisson_lognormal': 1.0, 'poisson': math.exp(-cfg.mean), 'uniform': 0.0, 'fixed': 0.0}[cfg.kind]
