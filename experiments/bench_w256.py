"""The model that speed is compared on: large enough for matrix products, small enough for one CPU thread.

Asked on one CPU thread, and not reached yet: at least 1.25 times the PyTorch twin at (n, k) = (0, 4), 1.35 times at
(8, 4) and (28, 4); see experiments/LOG.md.
"""

from latent_loop.config import Config
from latent_loop.sealing import view


def get_config():
  config = view(Config())
  config.name = 'bench_w256'
  model = config.model
  model.vocab_size, model.width, model.num_heads, model.mlp_dim = 2048, 256, 4, 1024
  model.num_prelude_layers, model.num_core_layers, model.num_coda_layers = 2, 4, 2
  model.remat = 'none'  # 4 graded iterations of 1024 tokens: all activations fit
  config.depth.mean, config.depth.backprop_depth = 32, 4
  config.data.seq_len, config.data.documents = 256, 'together'  # as the twin, which has no document masks
  config.optim.learning_rate, config.optim.clip_norm = 1e-4, None
  config.train.batch_size = 4
  return config
