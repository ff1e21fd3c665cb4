"""Does stopping early pay more where iterations dominate? tiny_text, wider, four core layers, and twice as deep.

The standard library's own text, as bytes. Expected: after 200 steps a validation loss near that of tiny_text after
its 360, and a larger share of the speed-up that counted FLOPs allow (python -m launch.bench exits).
"""

from latent_loop.config import Config
from latent_loop.sealing import view


def get_config():
  config = view(Config())
  config.name = 'deep_text'
  model = config.model
  model.width, model.num_heads, model.mlp_dim, model.num_core_layers = 192, 4, 576, 4
  model.remat = 'none'  # small enough to keep every activation
  config.depth.mean, config.depth.backprop_depth = 16, 4
  config.data.seq_len = 128
  optim = config.optim
  optim.kind, optim.learning_rate, optim.adam_learning_rate = 'muon', 1e-2, 4e-3
  optim.warmup_steps, optim.cooldown_fraction = 20, 0.3
  config.train.batch_size, config.train.num_steps, config.train.loss_chunk = 16, 200, 128
  config.checkpoint.every_steps, config.eval.every_steps = 50, 100
  return config
