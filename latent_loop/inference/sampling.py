"""From logits to the next token: each row by its own rule and seed, whatever its neighbors do.

The order is that of the reference and of transformers: repetition penalty, temperature, top-k, top-p, min-p, draw.
"""

import dataclasses

import jax
import jax.numpy as jnp

_DRAW = 0  # random numbers for `draw`; other purposes have other numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
  """One rule per row. temperature 0: the best token. top_k 0, top_p 1, min_p 0, repetition_penalty 1: off."""

  temperature_B: jax.Array
  top_k_B: jax.Array
  top_p_B: jax.Array
  min_p_B: jax.Array
  repetition_penalty_B: jax.Array
  seed_B: jax.Array


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
  """Logits of tokens seen before, divided by the penalty where positive, multiplied where negative."""
  penalty_B1 = penalty_B[:, None]
  lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
  return jnp.where(seen_BV, lowered_BV, logits_BV)


def restrict(logits_BV: jax.Array, rule: Sampling) -> jax.Array:
  """Logits at the rule's temperature, minus infinity for the tokens that it excludes. The best token always stays."""
  logits_BV = logits_BV / jnp.maximum(rule.temperature_B, 1e-6)[:, None]
  sorts = jnp.any((rule.top_k_B > 0) | (rule.top_p_B < 1))
  logits_BV = jax.lax.cond(sorts, _restrict_by_rank, lambda logits_BV, rule: logits_BV, logits_BV, rule)
  p_BV = jax.nn.softmax(logits_BV)
  too_small_BV = p_BV < rule.min_p_B[:, None] * jnp.max(p_BV, axis=-1, keepdims=True)
  return jnp.where(too_small_BV, -jnp.inf, logits_BV)


def _restrict_by_rank(logits_BV: jax.Array, rule: Sampling) -> jax.Array:
  V = logits_BV.shape[-1]
  sorted_BV = -jnp.sort(-logits_BV, axis=-1)
  rank_BV = jnp.arange(V)[None]
  k_B = jnp.where(rule.top_k_B > 0, jnp.minimum(rule.top_k_B, V), V)
  sorted_BV = jnp.where(rank_BV < k_B[:, None], sorted_BV, -jnp.inf)
  p_BV = jax.nn.softmax(sorted_BV)
  # The token that reaches p stays, as does everything ahead of it.
  ahead_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
  # Rare tokens may have all of the probability ahead of them, by rounding; a row without top-p keeps them.
  within_BV = (ahead_BV < rule.top_p_B[:, None]) | (rule.top_p_B >= 1)[:, None]
  kept_BV = within_BV & (rank_BV < k_B[:, None]) | (rank_BV == 0)
  lowest_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)


def probabilities(logits_BV: jax.Array, seen_BV: jax.Array, rule: Sampling) -> jax.Array:
  """What `draw` draws from; for a greedy row, all on the best token."""
  logits_BV = penalize(logits_BV, seen_BV, rule.repetition_penalty_B)
  best_BV = jax.nn.one_hot(jnp.argmax(logits_BV, axis=-1), logits_BV.shape[-1])
  return jnp.where((rule.temperature_B > 0)[:, None], jax.nn.softmax(restrict(logits_BV, rule)), best_BV)


def keys_of(purpose: int, rule: Sampling, position_B: jax.Array) -> jax.Array:
  """One key per row, from its seed and a position alone."""
  key = lambda seed, position: jax.random.fold_in(jax.random.fold_in(jax.random.key(purpose), seed), position)
  return jax.vmap(key)(rule.seed_B, position_B)


def pick(log_p_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
  """A token of every row at random, from log-probabilities that need not be normalized."""
  noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, log_p_BV.shape[1:]))(keys_B)
  return jnp.argmax(log_p_BV + noise_BV, axis=-1)


def draw(logits_BV: jax.Array, seen_BV: jax.Array, rule: Sampling, position_B: jax.Array) -> jax.Array:
  """The next token of every row; random numbers follow from the row's seed and the token's position."""
  logits_BV = penalize(logits_BV, seen_BV, rule.repetition_penalty_B)
  best_B = jnp.argmax(logits_BV, axis=-1)

  random = lambda logits_BV: pick(restrict(logits_BV, rule), keys_of(_DRAW, rule, position_B))
  hot_B = rule.temperature_B > 0
  drawn_B = jax.lax.cond(jnp.any(hot_B), random, lambda _: best_B, logits_BV)
  return jnp.where(hot_B, drawn_B, best_B).astype(jnp.int32)
