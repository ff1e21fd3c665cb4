"""Baseline of automaton: the same parameters, each layer run once."""

from experiments.automaton import get_config as automaton


def get_config():
  config = automaton()
  config.name = 'automaton_same_params'
  config.depth.kind, config.depth.mean, config.depth.backprop_depth = 'fixed', 1, 1
  return config
