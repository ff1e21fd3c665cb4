"""Parcae-140m's shape and recipe (arXiv 2604.12946), for comparison with Huginn at equal tools.

Differs from theirs, so do not read it as a reproduction: their three value-embedding tables (75.5 M of
its 144 M parameters, no FLOPs) are left out; depth is drawn once per batch, not per sequence; the Muon
here is optax's, without row-wise variance and cautious decay.
"""

from latent_loop.config import Config
from latent_loop.sealing import view


def get_config():
  config = view(Config())
  config.name = 'parcae_140m'
  model = config.model
  model.vocab_size, model.width, model.num_heads, model.mlp_dim = 32768, 768, 6, 3072
  model.num_prelude_layers, model.num_core_layers, model.num_coda_layers = 2, 2, 2
  model.block, model.mlp, model.qk_bias, model.qk_norm = 'pre_norm', 'relu_squared', False, True
  model.injection, model.prelude_norm, model.core_exit = 'diagonal', True, 'projection'
  model.init, model.scale_embedding, model.norm_eps = 'scaled_zero', False, 1e-5
  model.compute_dtype = 'bfloat16'
  config.depth.kind, config.depth.mean, config.depth.backprop_depth = 'poisson', 8, 4
  config.data.seq_len, config.data.documents = 2048, 'together'
  optim = config.optim
  optim.kind, optim.learning_rate, optim.adam_learning_rate = 'muon', 8e-3, 8e-3
  optim.b1, optim.b2, optim.eps, optim.weight_decay = 0.8, 0.95, 1e-10, 0.2
  optim.no_decay = (*optim.no_decay, r'embed/embedding$')  # theirs decays what Muon updates, nothing else
  optim.cooldown_fraction = 0.5
  config.train.batch_size, config.train.num_steps, config.train.loss_chunk = 256, 21_300, 512
  config.checkpoint.every_steps, config.eval.every_steps = 1000, 1000
  return config
