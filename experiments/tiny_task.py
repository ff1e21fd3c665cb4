"""Does thinking longer solve what a fixed depth cannot? (placeholder of the skeleton, tuned on its own branch)"""

from latent_loop.config import Config
from latent_loop.sealing import view


def get_config():
  config = view(Config())
  config.name = 'tiny_task'
  config.data.source = 'pointer_chasing'
  return config
