"""Does stopping early pay more where iterations dominate? tiny_text, wider, four core layers, and twice as deep.

Expected after its 200 steps: a validation loss near 1.52 nats per byte, and four times fewer iterations by a KL exit.
"""

from experiments.tiny_text import get_config as tiny_text


def get_config():
  config = tiny_text()
  config.name = 'deep_text'
  config.model.width, config.model.mlp_dim, config.model.num_core_layers = 192, 576, 4
  config.depth.mean = 16
  config.train.num_steps = 200
  config.checkpoint.every_steps, config.eval.every_steps = 50, 100
  return config
