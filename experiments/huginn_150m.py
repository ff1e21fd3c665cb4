"""Huginn at about 150 M parameters, for one accelerator or a few: the small recipe that users ask for."""

from experiments.huginn_3p5b import get_config as huginn_3p5b


def get_config():
  config = huginn_3p5b()
  config.name = 'huginn_150m'
  model = config.model
  model.vocab_size, model.width, model.num_heads, model.mlp_dim = 32768, 1024, 8, 3072
  config.data.seq_len = 2048
  config.optim.learning_rate, config.optim.warmup_steps = 4e-4, 1000
  config.train.batch_size, config.train.num_steps = 256, 20_000
  config.mesh.fsdp = 1
  return config
