"""Baseline of shell_game: the same training FLOPs in distinct layers, each run once.

10 layers of MLP width 119 cost what shell_game's 3 cost at the depths that its steps draw.
"""

from experiments.shell_game_same_params import get_config as fixed_depth


def get_config():
  config = fixed_depth()
  config.name = 'shell_game_same_flops'
  config.model.num_core_layers, config.model.mlp_dim = 8, 119
  return config
