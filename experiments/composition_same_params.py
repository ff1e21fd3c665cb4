"""Baseline of composition: the same parameters, each layer run once."""

from experiments.composition import get_config as composition


def get_config():
  config = composition()
  config.name = 'composition_same_params'
  config.depth.kind, config.depth.mean, config.depth.backprop_depth = 'fixed', 1, 1
  return config
