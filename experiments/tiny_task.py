"""Does thinking longer help where the answer needs it?

Words of a non-commutative group, to be multiplied out; a few minutes on two cores. One iteration gets
the short words right, the mean depth nearly all.
"""

from latent_loop.config import Config
from latent_loop.sealing import view


def get_config():
  config = view(Config())
  config.name = 'tiny_task'
  config.data.source = 'permutation_composition'
  config.data.seq_len = 64
  config.data.max_difficulty = 6
  config.model.width, config.model.mlp_dim, config.model.num_heads = 64, 128, 2
  config.model.num_prelude_layers, config.model.num_core_layers, config.model.num_coda_layers = 1, 1, 0
  config.model.state_init = 'zero'
  config.model.remat = 'none'
  config.depth.mean, config.depth.backprop_depth = 4, 4
  config.optim.kind = 'muon'
  config.optim.learning_rate, config.optim.adam_learning_rate = 2e-2, 4e-3
  config.optim.weight_decay = 0.01
  config.optim.warmup_steps = 20
  config.optim.cooldown_fraction = 0.3
  config.train.batch_size = 32
  config.train.num_steps = 900
  config.train.loss_chunk = 64
  config.checkpoint.every_steps = 300
  config.eval.every_steps = 1000
  config.eval.sample_tokens = 4
  return config
