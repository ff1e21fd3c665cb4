"""Causal attention inside segments in matrix products, for every platform; laid out for a CPU."""

import functools

import jax
import jax.numpy as jnp

_LONG = 128  # tokens, from which on halves pay


def plain_attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, ids_BT: jax.Array | None) -> jax.Array:
  """Attention in matrix products; scores and softmax in float32. ids_BT: segments; None: all one.

  The first half of a long row skips the second. Heads are moved ahead of positions once; on a CPU faster than
  jax.nn.dot_product_attention (experiments/LOG.md).
  """
  T = q_BTNH.shape[1]
  q_BTNH = scaled(q_BTNH)  # ahead of the move, with which the compiler joins it
  halves = (slice(T // 2), slice(T // 2, T)) if T >= _LONG else (slice(T),)
  heads_first = lambda x_BTNH: [x_BTNH[:, half].swapaxes(1, 2) for half in halves]  # no half is copied twice
  parts = list(zip(heads_first(k_BTNH), heads_first(v_BTNH), strict=True))

  def seen(i: int, j: int) -> jax.Array | None:
    """Which keys of half j the queries of half i see; None: all."""
    masks = [jnp.tril(jnp.ones((T, T), bool))[halves[i], halves[j]][None, None]] if i == j else []
    masks += [] if ids_BT is None else [(ids_BT[:, halves[i], None] == ids_BT[:, None, halves[j]])[:, None]]
    return functools.reduce(jnp.logical_and, masks) if masks else None

  ys_BNTH = [
    masked_attention(q_BNTH, [(*parts[j], seen(i, j)) for j in range(i + 1)])
    for i, q_BNTH in enumerate(heads_first(q_BTNH))
  ]
  return jnp.concatenate(ys_BNTH, axis=2).swapaxes(1, 2)


def scaled(q: jax.Array) -> jax.Array:
  """Queries, heads last, over sqrt(H): fewer numbers than scores, which on a CPU would be one more pass."""
  return q * q.shape[-1] ** -0.5


def masked_attention(q_BNTH: jax.Array, parts: list[tuple[jax.Array, jax.Array, jax.Array | None]]) -> jax.Array:
  """softmax(q k^T) v of scaled queries; parts: (k_BNSH, v_BNSH, which are seen: [B or 1, 1, T, S], None: all)."""
  scores = []
  for k_BNSH, _, seen in parts:
    all_BNTS = jnp.einsum('BNTH,BNSH->BNTS', q_BNTH, k_BNSH, preferred_element_type=jnp.float32)
    scores.append(all_BNTS if seen is None else all_BNTS + jnp.where(seen, 0.0, -1e30))
  top_BNT1 = functools.reduce(jnp.maximum, [jnp.max(one, axis=-1, keepdims=True) for one in scores])
  weights = [jnp.exp(one - jax.lax.stop_gradient(top_BNT1)) for one in scores]
  total_BNT1 = sum(jnp.sum(one, axis=-1, keepdims=True) for one in weights)
  # Divided ahead of the cast: after it the gradient's two parts, rounded each by itself, would not cancel in bfloat16.
  weights = [(one / total_BNT1).astype(q_BNTH.dtype) for one in weights]
  return sum(jnp.einsum('BNTS,BNSH->BNTH', one, v) for one, (_, v, _) in zip(weights, parts, strict=True))
