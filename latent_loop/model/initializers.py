"""Initial values: the variances of takase (2502.05171 section 3.2) and of Parcae's scaled-zero."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from latent_loop.config import ModelConfig

Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]


@dataclasses.dataclass(frozen=True)
class Inits:
  """inner: matrices that read the stream, and the embedding; out: matrices that write into it."""

  inner: Init
  out: Init


def truncated_normal(std: float) -> Init:
  """Normal with deviation `std` before it is cut at three deviations, as the reference draws."""
  return lambda key, shape: std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)


def orthogonal(std: float) -> Init:
  """A matrix with orthogonal rows or columns whose entries have deviation `std`."""

  def init(key, shape):
    fan_in, fan_out = shape[0], math.prod(shape[1:])
    q = jax.nn.initializers.orthogonal()(key, (fan_in, fan_out), jnp.float32)
    return (q * std * math.sqrt(max(fan_in, fan_out))).reshape(shape)

  return init


def base_std(cfg: ModelConfig) -> float:
  """sqrt(2 / (5 D)): deviation of inner matrices, embedding and (times the embedding scale) of s_0."""
  return math.sqrt(2 / (5 * cfg.width))


def make_inits(cfg: ModelConfig, mean_depth: int) -> Inits:
  """takase: output matrices shrink with the effective depth, prelude + core * mean depth + coda."""
  std = base_std(cfg)
  if cfg.init == 'scaled_zero':
    return Inits(orthogonal(std), lambda key, shape: jnp.zeros(shape, jnp.float32))
  effective_depth = cfg.num_prelude_layers + cfg.num_core_layers * mean_depth + cfg.num_coda_layers
  return Inits(truncated_normal(std), truncated_normal(std / math.sqrt(2 * effective_depth)))
