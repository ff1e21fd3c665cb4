"""A grid of small runs under a budget of training FLOPs, and the power law that their losses follow."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from latent_loop import loop
from latent_loop.config import Config, ModelConfig
from latent_loop.errors import BadInput
from latent_loop.exit_codes import DONE
from latent_loop.price import Priced, price
from latent_loop.storage import Path, write
from latent_loop.workdir import SAFE, check_owner

_RESAMPLES = 1000
_LAW = ('parameters', 'tokens', 'mean_depth')  # what the loss is a power of


def grid(base: Config, widths: Sequence[int], mean_depths: Sequence[int], tokens: Sequence[int]) -> list[Priced]:
  """Every combination, cheapest first; empty = what `base` has. Raises BadInput for one that is no config."""
  per_step = base.train.batch_size * base.data.seq_len
  cells = {}
  for width in widths or [base.model.width]:
    for mean in mean_depths or [base.depth.mean]:
      for count in tokens or [base.train.num_steps * per_step]:
        if count < per_step:
          raise BadInput(f'--tokens={count}: less than one step of {per_step} tokens; give more')
        steps = round(count / per_step)
        try:
          config = dataclasses.replace(
            base,
            model=_as_wide(base.model, width),
            depth=dataclasses.replace(base.depth, mean=mean, backprop_depth=min(base.depth.backprop_depth, mean)),
            train=dataclasses.replace(base.train, num_steps=steps),
          )
        except BadInput as error:
          raise BadInput(f'width {width}, mean depth {mean}, {count} tokens ({steps} steps): {error}') from error
        config = dataclasses.replace(config, name=f'{base.name}_w{width}_d{mean}_s{config.train.num_steps}')
        cells[config.name] = price(config)
  return sorted(cells.values(), key=lambda cell: cell.flops)


def _as_wide(model: ModelConfig, width: int) -> ModelConfig:
  """`model` at this width: heads of the same size, an MLP in the same proportion."""
  if width < 1 or width % model.head_dim:
    raise BadInput(f'--width={width}: not a multiple of the head size {model.head_dim}; give one')
  heads, mlp = width // model.head_dim, round(model.mlp_dim * width / model.width)
  return dataclasses.replace(model, width=width, num_heads=heads, mlp_dim=mlp)


def name_of(cell: Priced) -> str:
  """Of the run's folder."""
  return f'w{cell.config.model.width}_d{cell.config.depth.mean}_s{cell.config.train.num_steps}'


def within(cells: Sequence[Priced], budget: float) -> tuple[list[Priced], list[Priced]]:
  """(the cells to run, those left out): cheapest first, as long as the sum of their FLOPs keeps to the budget."""
  spent = np.cumsum([cell.flops for cell in cells])
  fit = int(np.searchsorted(spent, budget, side='right'))
  if not fit:
    raise BadInput(f'--max_flops={budget:.3g}: the cheapest run of the grid costs {cells[0].flops:.3g}; give more')
  return list(cells[:fit]), list(cells[fit:])


def run(cells: Sequence[Priced], workdir: Path) -> Iterator[tuple[Priced, int, dict[str, Any]]]:
  """(cell, exit code, result) of each; a run that is finished is not run again, one that was cut off goes on.

  Ends after the first that is not DONE, whose result is empty. Raises BadInput, before the first, where one was begun
  with other values that its loss or its price depends on.
  """
  for cell in cells:
    if (workdir / name_of(cell) / 'config.json').is_file():
      check_owner(workdir / name_of(cell), cell.config, [name for name in SAFE if name not in ('depth.', 'eval.')])
  for cell in cells:
    place = workdir / name_of(cell)
    code = loop.run(cell.config, place)
    yield cell, code, _result(cell, place) if code == DONE else {}
    if code != DONE:
      return


def _result(cell: Priced, place: Path) -> dict[str, Any]:
  report = json.loads((place / 'depth_report.json').read_text())
  by_depth = report['loss_by_depth']
  return {
    'width': cell.config.model.width,
    'mean_depth': cell.config.depth.mean,
    'tokens': cell.tokens,
    'parameters': cell.parameters,
    'training_flops': cell.flops,
    'loss': by_depth[str(cell.config.depth.mean)],
    'loss_by_depth': by_depth,
  }


def fit(results: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any] | None:
  """log loss = constant + sum over what varies of exponent x log value, by least squares; None with too few runs.

  A local law: it has no floor, so it says how fast the loss falls within the grid, not where it ends. `low` and
  `high` hold 90 % of the exponents of resampled grids (bootstrap over runs); `error` is the mean relative error of each
  run's loss as the other runs predict it.
  """
  names = [name for name in _LAW if len({r[name] for r in results}) > 1]
  x_RP = np.stack([np.ones(len(results)), *(np.log([r[name] for r in results]) for name in names)], axis=1)
  y_R = np.log([r['loss'] for r in results])
  runs, unknowns = x_RP.shape
  if runs < unknowns + 2 or np.linalg.matrix_rank(x_RP) < unknowns:
    return None
  solve = lambda rows: np.linalg.lstsq(x_RP[rows], y_R[rows], rcond=None)[0]
  rng, everyone = np.random.default_rng(seed), np.arange(runs)
  resampled = (rng.integers(0, runs, runs) for _ in range(_RESAMPLES))
  exponents = np.array([solve(rows) for rows in resampled if np.linalg.matrix_rank(x_RP[rows]) == unknowns])
  left_out = [abs(np.expm1(x_RP[i] @ solve(everyone[everyone != i]) - y_R[i])) for i in everyone]
  low_P, high_P = np.quantile(exponents, (0.05, 0.95), axis=0)
  best_P = solve(everyone)
  law = {
    name: {'exponent': float(best_P[i]), 'low': float(low_P[i]), 'high': float(high_P[i])}
    for i, name in enumerate(names, start=1)
  }
  return {'constant': float(np.exp(best_P[0])), 'law': law, 'runs': runs, 'error': float(np.mean(left_out))}


def save(workdir: Path, results: Sequence[dict[str, Any]], law: dict[str, Any] | None) -> Path:
  """sweep.json: {runs, law}."""
  path = workdir / 'sweep.json'
  write(path, json.dumps({'runs': list(results), 'law': law}, indent=2) + '\n')
  return path


def table(results: Sequence[dict[str, Any]], law: dict[str, Any] | None) -> list[str]:
  """The runs and the law as lines of text."""
  lines = ['width  depth      tokens  parameters     FLOPs    loss']
  for r in results:
    lines.append(
      f'{r["width"]:>5}  {r["mean_depth"]:>5}  {r["tokens"]:>10,}  {r["parameters"]:>10,}  {r["training_flops"]:.2e}  '
      f'{r["loss"]:.4f}'
    )
  if law is None:
    return [*lines, 'too few runs for a law; it needs two more than it has unknowns']
  for name, e in law['law'].items():
    lines.append(f'loss ~ {name}^{e["exponent"]:.4f}   (90 % of resampled grids: {e["low"]:.4f} to {e["high"]:.4f})')
  return [*lines, f'a run left out is predicted to {100 * law["error"]:.1f} %']
