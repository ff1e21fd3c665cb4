"""The question of automaton where most moves leave the state as it is: a ball under one of five cups."""

from experiments.automaton import get_config as automaton


def get_config():
  config = automaton()
  config.name = 'shell_game'
  config.data.source = 'shell_game'
  return config
