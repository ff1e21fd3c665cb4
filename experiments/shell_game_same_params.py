"""Baseline of shell_game: the same parameters, each layer run once."""

from experiments.automaton_same_params import get_config as automaton


def get_config():
  config = automaton()
  config.name = 'shell_game_same_params'
  config.data.source = 'shell_game'
  return config
