"""Baseline of tiny_text: the same parameters, each layer run once. What does the loop add?"""

from experiments.tiny_text import get_config as tiny_text


def get_config():
  config = tiny_text()
  config.name = 'fixed_depth_same_params'
  config.depth.kind, config.depth.mean, config.depth.backprop_depth = 'fixed', 1, 1
  return config
