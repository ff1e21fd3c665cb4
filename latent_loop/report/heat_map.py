"""Exact match by difficulty and depth as heat maps: a row for each task, its looped model beside its baselines."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

Runs = Sequence[dict[str, Any]]  # difficulties.json of each


def by_task(runs: Runs) -> dict[str, tuple[list[list[dict[str, Any]]], list[list[dict[str, Any]]]]]:
  """Task -> (experiments that loop, experiments of fixed depth); an experiment is a list of runs, one a seed."""
  experiments: dict[str, list[dict[str, Any]]] = {}
  for run in runs:
    experiments.setdefault(run['name'], []).append(run)
  out: dict[str, Any] = {}
  for same in experiments.values():
    loops, fixed = out.setdefault(same[0]['task'], ([], []))
    (fixed if same[0]['depth_law'] == 'fixed' else loops).append(same)
  return out


def values_of(same: list[dict[str, Any]], depths: Sequence[str]) -> np.ndarray:
  """[seeds, difficulties, depths] of one experiment."""
  return np.array([[[row[depth] for depth in depths] for row in run['exact_match'].values()] for run in same])


def png_of(runs: Runs) -> bytes:
  """The picture; a cell holds the mean over seeds in percent, and the worst and the best seed below it."""
  from matplotlib.figure import Figure  # most of a second, which programs that draw nothing need not wait

  tasks = by_task(runs)
  figure = Figure(figsize=(12, 4.2 * len(tasks)), layout='constrained')
  axes = figure.subplots(len(tasks), 2, squeeze=False, width_ratios=(3, 1))
  for row, (task, (loops, fixed)) in zip(axes, tasks.items(), strict=True):
    for same in loops:  # a task has one
      depths = list(next(iter(same[0]['exact_match'].values())))
      first, (low, high) = same[0], same[0]['trained_difficulties']
      _cells(row[0], values_of(same, depths), depths, same, high)
      row[0].axvline(depths.index(str(first['mean_depth'])) - 0.5, color='white', linestyle=':')
      row[0].set(
        xlabel=f'test-time depth (dotted: the mean of training, {first["mean_depth"]})',
        ylabel=f'difficulty (trained: {low} to {high})',
        title=f'{task}: exact match in %, {len(same)} seeds, chance {100 * first["chance_accuracy"]:.0f} %',
      )
    if fixed:
      values = np.concatenate([values_of(same, [str(same[0]['mean_depth'])]) for same in fixed], axis=2)
      labels = [same[0]['name'].removeprefix(f'{task}_').replace('_', '\n') for same in fixed]
      _cells(row[1], values, labels, fixed[0], high)
      row[1].set(title='fixed depth')
  png = io.BytesIO()
  figure.savefig(png, format='png', dpi=110)
  return png.getvalue()


def _cells(axes: Any, values: np.ndarray, labels: list[str], same: list[dict[str, Any]], high: int) -> None:
  """values: [seeds, difficulties, columns]; a line parts the difficulties of training from harder ones."""
  difficulties = list(same[0]['exact_match'])
  axes.imshow(values.mean(axis=0), vmin=0, vmax=1, cmap='viridis', aspect='auto')
  axes.set_xticks(range(len(labels)), labels)
  axes.set_yticks(range(len(difficulties)), difficulties)
  axes.axhline(sum(int(d) <= high for d in difficulties) - 0.5, color='white')
  for (y, x), mean in np.ndenumerate(values.mean(axis=0)):
    worst, best = 100 * values[:, y, x].min(), 100 * values[:, y, x].max()
    spread = '' if len(values) == 1 else f'\n{worst:.0f}-{best:.0f}'
    axes.text(x, y, f'{100 * mean:.1f}{spread}', ha='center', va='center', fontsize=8, color='wk'[int(mean > 0.6)])
