"""A plain decoder of Llama's kind on tiny_text's data: what experiments/retrofit.py begins from, and its control.

Pre-norm blocks, each applied once, so that launch.convert to_hf writes it as a Llama:
  python -m launch.train --config=experiments/plain_text.py --workdir=runs/plain_text
  python -m launch.convert to_hf --workdir=runs/plain_text --output=runs/plain_llama
"""

from experiments.tiny_text import get_config as tiny_text


def get_config():
  config = tiny_text()
  config.name = 'plain_text'
  model = config.model
  model.width, model.mlp_dim = 64, 192
  model.num_prelude_layers, model.num_core_layers, model.num_coda_layers = 1, 2, 1
  model.block, model.qk_bias, model.core_exit, model.scale_embedding = 'pre_norm', False, 'none', False
  model.injection, model.state_init = 'add', 'zero'
  config.depth.kind, config.depth.mean, config.depth.backprop_depth = 'fixed', 1, 1
  config.train.num_steps = 600
  config.checkpoint.every_steps, config.eval.every_steps = 200, 200
  return config
