"""The small run that trials start many times."""

from typing import Any

from latent_loop.config import Config
from latent_loop.sealing import seal, view

_SMALL = {
  'model.vocab_size': 264,
  'model.width': 48,
  'model.num_heads': 4,
  'model.mlp_dim': 40,
  'model.num_core_layers': 1,
  'depth.mean': 2,
  'depth.backprop_depth': 1,
  'data.source': 'addition',
  'data.max_difficulty': 2,
  'data.seq_len': 20,
  'train.batch_size': 8,
  'train.loss_chunk': 20,
  'optim.ema_decay': 0.9,
  'eval.num_batches': 1,
  'eval.sample_tokens': 0,
  'log.every_steps': 1,
}


def small_config(**overrides: Any) -> Config:
  """A sealed config; overrides by dotted path."""
  config = view(Config())
  config.update_from_flattened_dict({**_SMALL, **overrides})
  return seal(config)
