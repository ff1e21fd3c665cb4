"""Causal attention inside segments as cuDNN's fused kernel for NVIDIA GPUs, in bfloat16."""

import jax

from latent_loop.kernels.heads import on_own_heads


def cudnn(
  q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, ids_BT: jax.Array | None, on_own_rows: bool
) -> jax.Array:
  """Softmax attention with float32 statistics. Without segments cuDNN needs no mask, with them a bias of [B, T, T].

  on_own_rows: whether the code being traced runs on each device's own rows; there JAX fails to split the kernel.
  """

  def attend(q_BTNH, k_BTNH, v_BTNH, ids_BT):
    mask = None if ids_BT is None else (ids_BT[:, :, None] == ids_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, mask=mask, is_causal=True, implementation='cudnn')

  return (on_own_heads(attend) if on_own_rows else attend)(q_BTNH, k_BTNH, v_BTNH, ids_BT)
