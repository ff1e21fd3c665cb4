"""Exact match by difficulty and depth as heat maps: a row for each task, its looped model beside its baselines."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from latent_loop.errors import BadInput
from latent_loop.report import canvas

Run = dict[str, Any]  # difficulties.json of a run


def check(run: Any) -> None:
  """Raises BadInput when `run` is not what launch.evaluate difficulties writes."""
  try:
    values = column([run], str(run['mean_depth'])).astype(float)
    low, high = map(int, run['trained_difficulties'])
    text = f'{run["task"]} {run["name"]} {run["seed"]} {run["depth_law"]} {run["chance_accuracy"]:f}'
    good = values.ndim == 2 and values.size and low <= high and text.isprintable()
  except (AttributeError, KeyError, TypeError, ValueError):
    good = False
  if not good:
    raise BadInput('not what launch.evaluate difficulties writes, or not at the mean depth; write it again')


def experiments_of(runs: Sequence[Run]) -> dict[str, list[list[Run]]]:
  """Task -> its experiments, the one that loops first; an experiment is a list of runs that differ in their seed."""
  tasks: dict[str, dict[str, list[Run]]] = {}
  asked: dict[str, set[str]] = {}
  for run in sorted(runs, key=lambda run: run['depth_law'] == 'fixed'):
    tasks.setdefault(run['task'], {}).setdefault(run['name'], []).append(run)
    asked.setdefault(run['task'], set()).add(str([(d, *by_depth) for d, by_depth in run['exact_match'].items()]))
  for task, kinds in asked.items():
    if len(kinds) > 1:
      raise BadInput(f'the runs on {task} were asked different difficulties or depths; evaluate them again, alike')
  return {task: list(experiments.values()) for task, experiments in tasks.items()}


def column(experiment: Sequence[Run], depth: str) -> np.ndarray:
  """[seeds, difficulties] at one depth."""
  return np.array([[by_depth[depth] for by_depth in run['exact_match'].values()] for run in experiment])


def png_of(runs: Sequence[Run]) -> bytes:
  """The picture; a cell holds the mean over seeds in percent, and the worst and the best seed below it."""
  for run in runs:
    check(run)
  tasks = experiments_of(runs)
  figure, axes = canvas.blank(len(tasks), 2, (12, 4.2 * len(tasks)), width_ratios=(4, 1))
  for (left, right), (task, (looped, *fixed)) in zip(axes, tasks.items(), strict=True):
    first = looped[0]
    name, mean, (low, high) = first['name'], str(first['mean_depth']), first['trained_difficulties']
    depths = list(next(iter(first['exact_match'].values())))
    difficulties = list(first['exact_match'])
    _draw(left, {depth: column(looped, depth) for depth in depths}, difficulties, high)
    left.set(
      xlabel=f'test-time depth; the mean of training is {mean}',
      ylabel=f'difficulty; trained: {low} to {high}',
      title=f'{task}: exact match in %, seeds {", ".join(str(run["seed"]) for run in looped)}, '
      f'chance {100 * first["chance_accuracy"]:.0f} %',
    )
    if fixed:
      baselines = {same[0]['name'].removeprefix(f'{name}_').replace('_', '\n'): same for same in fixed}
      own_depth = {label: column(same, str(same[0]['mean_depth'])) for label, same in baselines.items()}
      _draw(right, own_depth, difficulties, high)
    right.set(title='fixed depth')
  return canvas.png_of(figure)


def _draw(axes: Any, columns: dict[str, np.ndarray], difficulties: list[str], hardest: int) -> None:
  """columns: label -> [seeds, difficulties]; a line parts the difficulties of training from harder ones."""
  means = np.array([values.mean(axis=0) for values in columns.values()]).reshape(-1, len(difficulties)).T
  axes.imshow(means, vmin=0, vmax=1, cmap='viridis', aspect='auto')
  axes.set_xticks(range(len(columns)), columns)
  axes.set_yticks(range(len(difficulties)), difficulties)
  axes.axhline(sum(int(d) <= hardest for d in difficulties) - 0.5, color='white')
  for x, values in enumerate(columns.values()):
    for y, (mean, worst, best) in enumerate(zip(means[:, x], values.min(axis=0), values.max(axis=0), strict=True)):
      spread = '' if len(values) == 1 else f'\n{100 * worst:.0f} to {100 * best:.0f}'
      text = f'{100 * mean:.1f}{spread}'
      axes.text(x, y, text, ha='center', va='center', fontsize=8, color='black' if mean > 0.6 else 'white')
