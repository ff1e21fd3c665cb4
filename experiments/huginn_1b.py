"""Huginn at about 1.3 B parameters, for a slice of a pod. Same recipe as huginn_3p5b, higher rate."""

from experiments.huginn_3p5b import get_config as huginn_3p5b


def get_config():
  config = huginn_3p5b()
  config.name = 'huginn_1b'
  config.model.width, config.model.num_heads, config.model.mlp_dim = 3072, 24, 8192
  config.optim.learning_rate = 1e-4
  config.train.batch_size, config.train.num_steps = 512, 50_000
  config.mesh.fsdp = 8
  return config
