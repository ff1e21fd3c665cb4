"""Does what holds on 0.7 M tokens of bytes hold on a hundred megabytes of code and documentation as BPE tokens?

Prepare its data, data/small_text, first: bash launch/prepare_small_text.sh. Two million parameters on two cores.
"""

from latent_loop.config import Config
from latent_loop.sealing import view


def get_config():
  config = view(Config())
  config.name = 'small_text'
  model = config.model
  model.vocab_size, model.width, model.mlp_dim, model.remat = 4096, 192, 576, 'none'
  config.depth.mean, config.depth.backprop_depth = 8, 4
  data = config.data
  data.source, data.paths, data.seq_len, data.packing = 'prepared', ('data/small_text',), 256, 'best_fit'
  optim = config.optim
  optim.kind, optim.learning_rate, optim.adam_learning_rate = 'muon', 1e-2, 4e-3
  optim.warmup_steps, optim.cooldown_fraction = 20, 0.3
  config.train.batch_size, config.train.num_steps, config.train.loss_chunk = 16, 400, 128
  config.checkpoint.every_steps, config.eval.every_steps = 100, 100
  return config
