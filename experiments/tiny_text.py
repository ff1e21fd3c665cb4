"""Does a depth-recurrent model learn real text on a laptop, and does depth pay?

The standard library's own text, as bytes; minutes on two cores.
"""

from latent_loop.config import Config, view


def get_config():
  config = view(Config())
  config.name = 'tiny_text'
  config.model.num_core_layers = 2
  config.depth.mean, config.depth.backprop_depth = 8, 4
  config.optim.learning_rate = 2e-3
  config.optim.warmup_steps = 30
  config.optim.cooldown_fraction = 0.3
  config.train.num_steps = 900
  return config
