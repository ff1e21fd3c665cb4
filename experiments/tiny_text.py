"""Does a depth-recurrent model learn real text on a laptop, and does depth pay?

The standard library's own text, as bytes: 0.7 M tokens, minutes on two cores. Expected: validation loss
near 1.36 nats per byte at the mean depth, well below its value at depth 1, and flat from there to four times
the mean.
"""

from latent_loop.config import Config
from latent_loop.sealing import view


def get_config():
  config = view(Config())
  config.name = 'tiny_text'
  config.model.remat = 'none'  # small enough to keep every activation
  config.depth.mean, config.depth.backprop_depth = 8, 4
  config.data.seq_len = 128
  optim = config.optim
  optim.kind, optim.learning_rate, optim.adam_learning_rate = 'muon', 1e-2, 4e-3
  optim.warmup_steps, optim.cooldown_fraction = 20, 0.3
  config.train.batch_size, config.train.num_steps, config.train.loss_chunk = 16, 360, 128
  config.checkpoint.every_steps, config.eval.every_steps = 60, 120
  return config
