"""How often a trained model answers a task whole and right, by difficulty and depth: does longer reach further?"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from latent_loop import data, storage, trained
from latent_loop.config import DataConfig
from latent_loop.errors import BadInput
from latent_loop.evals import exact
from latent_loop.model import cost
from latent_loop.storage import Path


def default_difficulties(cfg: DataConfig) -> tuple[int, ...]:
  """The hardest of training, one and a half times that, and twice."""
  most = cfg.max_difficulty
  return (most, most + (most + 1) // 2, 2 * most)


def write(this: trained.Trained, workdir: Path, difficulties: Sequence[int], depths: tuple[int, ...]) -> Path:
  """difficulties.json in the run's folder; raises BadInput where the run did not learn a task.

  Asked are validation instances, of those difficulties that training had; harder ones it never saw at all.
  """
  config = this.config
  if config.data.source not in data.tasks.TASKS:
    known = ', '.join(data.tasks.TASKS)
    raise BadInput(f'{workdir}: trained on {config.data.source}, which has no difficulties; give a run on {known}')
  evaluate = exact.make_right_eval(this.model, depths)
  found, count = {}, {}
  for difficulty in sorted(set(difficulties)):
    right_RX = _whole_answers(this, evaluate, difficulty)
    found[difficulty] = dict(zip(depths, right_RX.mean(axis=1).tolist(), strict=True))
    count[difficulty] = right_RX.shape[1]
  numbers = {
    'name': config.name,
    'seed': config.seed,
    'step': this.step,
    'task': config.data.source,
    'parameters': cost.count(this.model, config.data.seq_len).total_parameters,
    'depth_law': config.depth.kind,
    'mean_depth': config.depth.mean,
    'trained_difficulties': [config.data.min_difficulty, config.data.max_difficulty],
    'chance_accuracy': data.tasks.TASKS[config.data.source][1],
    'instances': count,
    'exact_match': found,
  }
  path = workdir / 'difficulties.json'
  storage.write(path, json.dumps(numbers, indent=1) + '\n')
  return path


def _whole_answers(this: trained.Trained, evaluate, difficulty: int) -> np.ndarray:
  """[R, X] over config.eval.num_batches batches of instances of one difficulty."""
  of_data = dataclasses.replace(this.config.data, min_difficulty=difficulty, max_difficulty=difficulty)
  config = dataclasses.replace(this.config, data=of_data)
  batches, passes = trained.validation_batches(config, this.mesh, data.make_source(config))
  out = []
  with jax.set_mesh(this.mesh):
    for i in range(passes):
      batch = batches.batch(i)
      key = jax.random.fold_in(jax.random.key(trained.VALIDATION_SEED), i)
      right_RBT = jax.device_get(evaluate(this.params, trained.place(batch, this.mesh), key))
      out.append(exact.whole_answers(right_RBT, batch))
  return np.concatenate(out, axis=1)


def table(numbers: dict[str, Any]) -> list[str]:
  """Exact match by difficulty and depth as lines of text."""
  by_difficulty = numbers['exact_match']
  depths = list(next(iter(by_difficulty.values())))
  mean, (low, high) = numbers['mean_depth'], numbers['trained_difficulties']
  lines = [
    f'exact match of whole answers; trained on difficulties {low} to {high} at mean depth {mean}; a byte guessed: '
    f'{numbers["chance_accuracy"]:.3f}',
    'difficulty  instances' + ''.join(f'{"r = " + str(depth):>9}' for depth in depths),
  ]
  for difficulty, by_depth in by_difficulty.items():
    cells = ''.join(f'{by_depth[depth]:>9.3f}' for depth in depths)
    lines.append(f'{difficulty:>10}  {numbers["instances"][difficulty]:>9}{cells}')
  return lines
