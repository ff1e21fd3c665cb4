"""Which implementation of attention a platform has."""

from latent_loop.config import ModelConfig
from latent_loop.errors import BadInput
from latent_loop.kernels.splash import LANES


def choose_attention(cfg: ModelConfig, seq_len: int, platform: str) -> str:
  """The implementation that config.model.attention means on `platform` ('cpu', 'gpu', 'tpu').

  'auto' is cuDNN's fused kernel on a GPU in bfloat16, splash on a TPU, XLA's own elsewhere. Raises BadInput when
  the platform, the dtype or the length has not the one named.
  """
  fits = {
    'xla': True,
    'cudnn': platform == 'gpu' and cfg.compute_dtype == 'bfloat16',
    'splash': platform == 'tpu' and seq_len % LANES == 0,
  }
  if cfg.attention == 'auto':
    return next(kind for kind in ('cudnn', 'splash', 'xla') if fits[kind])
  if not fits[cfg.attention]:
    raise BadInput(
      f"config.model.attention={cfg.attention!r} on {platform}, {cfg.compute_dtype}, {seq_len} tokens: 'cudnn' needs a "
      f"GPU and bfloat16, 'splash' a TPU and rows of a multiple of {LANES} tokens; use 'auto'"
    )
  return cfg.attention
