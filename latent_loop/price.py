"""What a run costs, known exactly before it starts: the depth of every step is a pure function of the config."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from latent_loop.config import Config
from latent_loop.model import build, cost, depth


@dataclasses.dataclass(frozen=True)
class Priced:
  """A run and its cost."""

  config: Config
  tokens: int  # that it trains on
  parameters: int
  flops: float  # of training, forward and backward, at the depths that its steps draw; without recomputation


def price(config: Config) -> Priced:
  """Of training all its steps."""
  counts = cost.count(build(config.model, config.depth), config.data.seq_len)
  n, k = np.asarray(_drawn_depths(config), np.float64)
  per_step = config.train.batch_size * config.data.seq_len
  flops = per_step * sum(counts.train(a, b) for a, b in zip(n.tolist(), k.tolist(), strict=True))
  return Priced(config, per_step * config.train.num_steps, counts.total_parameters, flops)


def _drawn_depths(config: Config) -> tuple[jax.Array, jax.Array]:
  """(n, k) of every step of a run, [num_steps] each: those that its training step draws."""
  draw = lambda step: depth.draw(config.depth, jax.random.key(config.seed), step)
  return jax.jit(jax.vmap(draw))(jnp.arange(config.train.num_steps))
