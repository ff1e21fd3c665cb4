"""The figure of exits.json: what stopping early costs by FLOPs, and where tokens of each kind or difficulty leave."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latent_loop.report import canvas

Run = Mapping[str, Any]


def short(run: Run) -> dict[str, Any]:
  """exits.json of a run with only those rules that no cheaper one of their criterion beats."""
  return {**run, 'criteria': {kind: _front(rows) for kind, rows in run['criteria'].items()}}


def _front(rows: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
  """Those that lose less than every cheaper one; six digits."""
  kept, best = [], float('inf')
  for row in sorted(rows, key=lambda row: (row['flops_per_token'], row['loss'])):
    if row['loss'] < best:
      best = row['loss']
      kept.append({name: float(f'{value:.6g}') if isinstance(value, float) else value for name, value in row.items()})
  return kept


def png_of(runs: Sequence[Run]) -> bytes:
  """A row for each experiment, all its seeds in it: quality against compute, and who leaves where."""
  experiments: dict[str, list[Run]] = {}
  for run in runs:
    experiments.setdefault(run['name'], []).append(run)
  figure, axes = canvas.blank(len(experiments), 2, (13, 4.4 * len(experiments)))
  for (left, right), (name, seeds) in zip(axes, experiments.items(), strict=True):
    _quality(left, name, seeds)
    _leaving(right, [run['groups'] for run in seeds if 'groups' in run])
  return canvas.png_of(figure)


def _quality(axes: Any, name: str, seeds: Sequence[Run]) -> None:
  """Loss over FLOPs by criterion, and of plain smaller depths; a line for each seed."""
  for i, kind in enumerate(seeds[0]['criteria']):
    for run in seeds:
      rows = _front(run['criteria'][kind])
      axes.plot(*_relative(run, rows), color=f'C{i}', linewidth=1, label=kind if run is seeds[0] else None)
  for run in seeds:
    label = 'one depth for all' if run is seeds[0] else None
    axes.plot(*_relative(run, run['fixed']), color='black', linestyle=':', marker='.', label=label)
  axes.axhline(0.01, color='gray', linewidth=0.8)
  axes.set(
    xlabel=f'FLOPs per token, of those at depth {seeds[0]["depth"]} for all',
    ylabel='loss above full depth, nats per token',
    title=f'{name}: quality against compute, seeds {", ".join(str(run["seed"]) for run in seeds)}',
  )
  axes.set_yscale('symlog', linthresh=0.01)
  axes.set_ylim(bottom=-0.003)
  axes.legend(fontsize='small')


def _relative(run: Run, rows: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
  full = run['full']
  return [row['flops_per_token'] / full['flops_per_token'] for row in rows], [
    row['loss'] - full['loss'] for row in rows
  ]


def _leaving(axes: Any, seeds: Sequence[Mapping[str, Any]]) -> None:
  """The share of each group that leaves after 1, 2, ... iterations, mean over seeds, and its mean depth."""
  if not seeds:
    axes.text(0.5, 0.5, 'no rule keeps to the loss of full depth', ha='center', transform=axes.transAxes)
    return
  names = [name for name in seeds[0]['of'] if all(name in run['of'] for run in seeds)]
  shares = lambda name: [np.array(run['of'][name]['left_at']) / run['of'][name]['tokens'] for run in seeds]
  share_GR = np.array([np.mean(shares(name), axis=0) for name in names])
  axes.imshow(share_GR, vmin=0, cmap='viridis', aspect='auto')
  depth = share_GR.shape[1]
  axes.set_xticks(range(depth), range(1, depth + 1))
  axes.set_yticks(range(len(names)), names)
  for y, name in enumerate(names):
    means = [run['of'][name]['mean_depth'] for run in seeds]
    spread = f' ({min(means):.1f} to {max(means):.1f})' if len(means) > 1 else ''
    axes.text(depth - 0.4, y, f'mean {np.mean(means):.1f}{spread}', va='center', fontsize=8)
  rules = ', '.join(dict.fromkeys(run['exit'] for run in seeds))
  axes.set(xlabel='iterations', title=f'share that leaves, by {rules}')
