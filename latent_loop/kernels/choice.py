"""Which implementation of attention a platform has."""

from latent_loop.config import ModelConfig
from latent_loop.errors import BadInput
from latent_loop.kernels.splash import LANES


def choose_attention(cfg: ModelConfig, seq_len: int, platform: str) -> str:
  """The implementation that config.model.attention means on `platform` ('cpu', 'gpu', 'tpu').

  'auto' is cuDNN's fused kernel on a GPU in bfloat16, splash on a TPU, XLA's own elsewhere and for sizes that the
  kernel does not have. Raises BadInput when the platform, the dtype or the sizes have not the one named.
  """
  fits = {
    'xla': True,
    # JAX refuses other sizes of heads, and odd lengths with a mask of documents.
    'cudnn': platform == 'gpu'
    and cfg.compute_dtype == 'bfloat16'
    and cfg.head_dim % 8 == 0
    and cfg.head_dim <= 128
    and seq_len % 2 == 0,
    'splash': platform == 'tpu' and seq_len % LANES == 0,
  }
  if cfg.attention == 'auto':
    return next(kind for kind in ('cudnn', 'splash', 'xla') if fits[kind])
  if not fits[cfg.attention]:
    raise BadInput(
      f'config.model.attention={cfg.attention!r} on {platform}, {cfg.compute_dtype}, heads of {cfg.head_dim}, '
      f"{seq_len} tokens: 'cudnn' needs a GPU, bfloat16, heads of a multiple of 8 up to 128 and an even number of "
      f"tokens, 'splash' a TPU and rows of a multiple of {LANES} tokens; use 'auto'"
    )
  return cfg.attention
