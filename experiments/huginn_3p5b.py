"""The paper's run: 3.5 B parameters, 795 B tokens (arXiv 2502.05171 section 4).

Cost: 47,360 steps of 16.8 M tokens at 186 GFLOP per token, about 1.5e23 FLOP.
Expected: validation loss falls with depth up to about 32; ARC-C 38 at depth 32 (their Table 1).
The tokens are the embedded text until a prepared corpus is named, so that the shape can be tried. As there, documents
of a row see each other. Two things of their loop are not repeated: it skips its very first update, and its warm-up
starts at a rate of exactly zero.
"""

from latent_loop.config import Config
from latent_loop.sealing import view


def get_config():
  config = view(Config())
  config.name = 'huginn_3p5b'
  config.seed = 233
  model = config.model
  model.vocab_size, model.width, model.num_heads, model.mlp_dim = 65536, 5280, 55, 17920
  model.num_prelude_layers, model.num_core_layers, model.num_coda_layers = 2, 4, 2
  model.compute_dtype = 'bfloat16'
  config.depth.mean, config.depth.backprop_depth = 32, 8
  config.data.seq_len, config.data.documents = 4096, 'together'
  config.train.batch_size, config.train.num_steps, config.train.loss_chunk = 4096, 47_360, 512
  optim = config.optim
  optim.kind, optim.learning_rate, optim.b1, optim.b2, optim.eps = 'adam_atan2', 4e-5, 0.9, 0.95, 1e-6
  optim.weight_decay, optim.clip_norm, optim.warmup_steps = 4e-5, 1.0, 4096
  config.mesh.data, config.mesh.fsdp = -1, 32
  config.checkpoint.every_steps, config.eval.every_steps = 500, 500
  return config
