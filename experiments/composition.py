"""The question of automaton where the state is not given but made: products of permutations of three things."""

from experiments.automaton import get_config as automaton


def get_config():
  config = automaton()
  config.name = 'composition'
  config.data.source = 'permutation_composition'
  return config
