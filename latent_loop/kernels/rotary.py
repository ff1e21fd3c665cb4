"""Rotary embedding (2104.09864) in the order of operations that is fast on a CPU, too."""

import jax
import jax.numpy as jnp

Turn = tuple[jax.Array, jax.Array]


def turn_of(positions: jax.Array, head_dim: int, base: float) -> Turn:
  """Cosines and sines of the rotary embedding at positions [..., T]: [..., T, 1, H/2] in float32."""
  half = head_dim // 2
  frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies.reshape((1,) * (positions.ndim + 1) + (half,))
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, turn: Turn) -> jax.Array:
  """Rotary embedding of pairs (i, i + H/2), in float32.

  The reference rotates interleaved pairs (2i, 2i + 1); interop/ permutes query and key weights between
  the two layouts, which leaves every attention score the same. Halves avoid a minor axis of size 2.
  """
  cos_BT1H, sin_BT1H = turn
  x_BTN2H = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], 2, -1)
  a_BTNH, b_BTNH = x_BTN2H[..., 0, :], x_BTN2H[..., 1, :]
  # Joined on an axis of their own: on a CPU twice as fast as a reversal of it, or as joining the halves themselves.
  pair = (a_BTNH * cos_BT1H - b_BTNH * sin_BT1H, b_BTNH * cos_BT1H + a_BTNH * sin_BT1H)
  return jnp.stack(pair, axis=3).reshape(x_BTNH.shape).astype(x_BTNH.dtype)
