"""Causal attention inside segments as JAX's splash kernel for TPUs: no [T, T] scores, masked blocks skipped."""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from latent_loop.kernels.heads import on_own_heads

LANES = 128  # sequences must be a multiple
_BLOCK = 512


def splash(
  q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, segment_ids_BT: jax.Array | None, interpret: bool
) -> jax.Array:
  """Softmax attention with float32 statistics; heads may be split over the mesh's tensor axis.

  interpret: run the kernel's steps in plain JAX, on any device, for tests.
  """
  scale = q_BTNH.shape[-1] ** -0.5

  def attend(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT):
    _, T, N, _ = q_BTNH.shape
    block = _BLOCK if T % _BLOCK == 0 else LANES
    names = ('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv', 'block_q_dq', 'block_kv_dq')
    sizes = kernel.BlockSizes(**dict.fromkeys(names, block))
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * N)
    one = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    heads_first = [x_BTNH.swapaxes(1, 2) for x_BTNH in (q_BTNH * scale, k_BTNH, v_BTNH)]
    if segment_ids_BT is None:
      return jax.vmap(one)(*heads_first).swapaxes(1, 2)
    ids = kernel.SegmentIds(q=segment_ids_BT, kv=segment_ids_BT)
    return jax.vmap(one)(*heads_first, ids).swapaxes(1, 2)

  return on_own_heads(attend)(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT)
