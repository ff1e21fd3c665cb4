"""The small run that trials start many times, and an experiment file of it for a process of its own."""

from pathlib import Path
from typing import Any

from latent_loop.config import Config
from latent_loop.sealing import seal, to_json, view

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


def write_experiment(config: Config, path: Path) -> Path:
  """An experiment file of `config`, for --config."""
  path.write_text(
    'from latent_loop.sealing import from_json, view\n\n\n'
    f'def get_config():\n  return view(from_json({to_json(config)!r}, {str(path)!r}))\n'
  )
  return path
