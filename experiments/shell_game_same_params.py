"""Baseline of shell_game: the same parameters, each layer run once."""

from experiments.shell_game import get_config as shell_game


def get_config():
  config = shell_game()
  config.name = 'shell_game_same_params'
  config.depth.kind, config.depth.mean, config.depth.backprop_depth = 'fixed', 1, 1
  return config
