"""Baseline of shell_game: the same training FLOPs in distinct layers, each run once, as for automaton."""

from experiments.automaton_same_flops import get_config as automaton


def get_config():
  config = automaton()
  config.name = 'shell_game_same_flops'
  config.data.source = 'shell_game'
  return config
