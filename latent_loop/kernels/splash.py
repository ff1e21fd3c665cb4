"""Causal attention inside segments as JAX's splash kernel for TPUs: no [T, T] scores, masked blocks skipped."""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

LANES = 128  # sequences must be a multiple
_BLOCK = 512


def splash(
  q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, segment_ids_BT: jax.Array | None, interpret: bool
) -> jax.Array:
  """Softmax attention with float32 statistics; heads may be split over the mesh's tensor axis.

  interpret: run the kernel's steps in plain JAX, on any device, for tests.
  """
  heads_first = lambda x_BTNH: x_BTNH.swapaxes(1, 2)
  scale = q_BTNH.shape[-1] ** -0.5
  q_BNTH, k_BNTH, v_BNTH = heads_first(q_BTNH * scale), heads_first(k_BTNH), heads_first(v_BTNH)

  def attend(q_BNTH, k_BNTH, v_BNTH, segment_ids_BT):
    _, N, T, _ = q_BNTH.shape
    block = _BLOCK if T % _BLOCK == 0 else LANES
    names = ('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv', 'block_q_dq', 'block_kv_dq')
    sizes = kernel.BlockSizes(**dict.fromkeys(names, block))
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * N)
    one = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    if segment_ids_BT is None:
      return jax.vmap(one)(q_BNTH, k_BNTH, v_BNTH)
    ids = kernel.SegmentIds(q=segment_ids_BT, kv=segment_ids_BT)
    return jax.vmap(one)(q_BNTH, k_BNTH, v_BNTH, ids)

  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:  # a kernel cannot be split by the compiler: each shard over tensor runs it on its own heads
    heads = P(None, 'tensor')
    attend = jax.shard_map(
      attend,
      mesh=mesh,
      in_specs=(heads, heads, heads, P()),
      out_specs=heads,
      axis_names={'tensor'},
      check_vma=False,
    )
  return attend(q_BNTH, k_BNTH, v_BNTH, segment_ids_BT).swapaxes(1, 2)
