"""Baseline of tiny_text: the same training FLOPs per token in distinct layers, each run once.

11 core layers of MLP width 396 cost what 4 iterations without and 4 with gradient of tiny_text's two cost.
"""

from experiments.fixed_depth_same_params import get_config as fixed_depth


def get_config():
  config = fixed_depth()
  config.name = 'fixed_depth_same_flops'
  config.model.num_core_layers, config.model.mlp_dim = 11, 396
  return config
