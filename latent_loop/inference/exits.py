"""When a token has thought enough: per-token exit criteria (2502.05171 section 6.1), each row by its own rule.

A criterion compares an iteration with the one before, or, where it reads predictions, with the last check. It
leaves when its value is below the threshold (argmax-stability: when it reaches it).
"""

import dataclasses

import jax
import jax.numpy as jnp

# Those that read predictions, each check of which costs coda and head, stand first.
READING = ('kl', 'entropy-diff', 'minp-kl', 'argmax-stability')
LATENT = ('latent-diff', 'cosine', 'latent-acceleration')
CRITERIA = (*READING, *LATENT, 'none')
# Thresholds of the paper and of the reference; 'none' has no use for one.
THRESHOLDS = dict(zip(CRITERIA, (5e-4, 1e-3, 1e-5, 5.0, 0.03, 1e-3, 0.03, 0.0), strict=True))
_FIRST_ENTROPY = 100.0  # no distribution has it, so the first check never leaves
_SMALL = 1e-10


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exits:
  """One rule per row. kind_B: index in CRITERIA. A check comes at min_depth, then every `every` iterations."""

  kind_B: jax.Array
  threshold_B: jax.Array
  min_depth_B: jax.Array
  every_B: jax.Array
  max_depth_B: jax.Array

  def due(self, t: jax.Array) -> jax.Array:
    """Which rows check after t iterations; reaching the largest depth counts as a check."""
    past_B = t - self.min_depth_B
    return ((past_B >= 0) & (past_B % self.every_B == 0)) | (t >= self.max_depth_B)

  @property
  def reads_B(self) -> jax.Array:
    return self.kind_B < len(READING)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
  """What the next check compares with."""

  log_p_BV: jax.Array
  entropy_B: jax.Array
  best_B: jax.Array
  stable_B: jax.Array  # checks in a row with the same best token
  move_BD: jax.Array  # s_t - s_{t-1}

  @staticmethod
  def empty(s_BD: jax.Array, vocab_size: int) -> 'Memory':
    B, D = s_BD.shape
    uniform_BV = jnp.full((B, vocab_size), -jnp.log(vocab_size))
    zero_B = jnp.zeros((B,), jnp.int32)
    return Memory(uniform_BV, jnp.full((B,), _FIRST_ENTROPY), zero_B - 1, zero_B, jnp.full((B, D), jnp.inf))


def look(memory: Memory, before_BD: jax.Array, s_BD: jax.Array) -> tuple[Memory, jax.Array]:
  """(memory, [B, latent criteria] values) of the iteration that led from one state to the next."""
  before_BD, s_BD = before_BD.astype(jnp.float32), s_BD.astype(jnp.float32)
  move_BD = s_BD - before_BD
  cosine_B = 1 - jnp.sum(s_BD * before_BD, axis=-1) / (_norm(s_BD) * _norm(before_BD))
  turn_B = _norm(move_BD - memory.move_BD) / _norm(s_BD)
  memory = dataclasses.replace(memory, move_BD=move_BD)
  return memory, jnp.stack([moved(before_BD, s_BD), cosine_B, turn_B], axis=-1)


def moved(before: jax.Array, s: jax.Array) -> jax.Array:
  """How far states [..., D] moved, relative to their length."""
  before, s = before.astype(jnp.float32), s.astype(jnp.float32)
  return _norm(s - before) / _norm(s)


def _norm(x: jax.Array) -> jax.Array:
  return jnp.maximum(jnp.linalg.norm(x, axis=-1), _SMALL)


def read(memory: Memory, logits_BV: jax.Array, due_B: jax.Array) -> tuple[Memory, jax.Array]:
  """(memory of the rows that check, [B, reading criteria] values)."""
  log_p_BV = jax.nn.log_softmax(logits_BV)
  entropy_B = _entropy(log_p_BV)
  best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  stable_B = jnp.where(best_B == memory.best_B, memory.stable_B + 1, 0)
  values = (
    _kl(memory.log_p_BV, log_p_BV),
    jnp.abs(entropy_B - memory.entropy_B),
    _kl(_at_least(memory.log_p_BV), _at_least(log_p_BV)),
    stable_B.astype(jnp.float32),
  )
  new = dataclasses.replace(memory, log_p_BV=log_p_BV, entropy_B=entropy_B, best_B=best_B, stable_B=stable_B)
  chosen = lambda a, b: jnp.where(due_B.reshape(-1, *[1] * (a.ndim - 1)), a, b)
  return jax.tree.map(chosen, new, memory), jnp.stack(values, axis=-1)


def leaves(exits: Exits, reading_values: jax.Array, latent_values: jax.Array) -> jax.Array:
  """Which rows their criterion sends out, from the values of `read` and `look` side by side."""
  never_B1 = jnp.full((len(exits.kind_B), 1), jnp.inf)
  values = jnp.concatenate([reading_values, latent_values, never_B1], axis=-1)
  value_B = jnp.take_along_axis(values, exits.kind_B[:, None], axis=-1)[:, 0]
  counts_B = exits.kind_B == CRITERIA.index('argmax-stability')
  return jnp.where(counts_B, value_B >= exits.threshold_B, value_B < exits.threshold_B)


def _entropy(log_p_BV: jax.Array) -> jax.Array:
  p_BV = jnp.exp(log_p_BV) + _SMALL
  return -jnp.sum(p_BV * jnp.log(p_BV), axis=-1)


def _kl(log_p_BV: jax.Array, log_q_BV: jax.Array) -> jax.Array:
  """KL(p | q) in nats."""
  return jnp.sum(jnp.exp(log_p_BV) * (log_p_BV - log_q_BV), axis=-1)


def _at_least(log_p_BV: jax.Array) -> jax.Array:
  """The distribution whose tail, under a tenth of its top, is made even: every entry there 1/V, then normalized."""
  tail_BV = log_p_BV < jnp.max(log_p_BV, axis=-1, keepdims=True) + jnp.log(0.1)
  return jax.nn.log_softmax(jnp.where(tail_BV, -jnp.log(log_p_BV.shape[-1]), log_p_BV))
