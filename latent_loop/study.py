"""Variants of one experiment, each with several seeds, trained side by side on one machine: what a claim rests on.

Every trial is a run of launch.train in a folder of its own, so a study that was cut off goes on where it was.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latent_loop import storage
from latent_loop.config import Config
from latent_loop.exit_codes import DONE, PREEMPTED
from latent_loop.interrupt import StopRequest
from latent_loop.metrics import read_lines
from latent_loop.price import price
from latent_loop.sealing import write_experiment
from latent_loop.workdir import check_owner

_ROOT = Path(__file__).parent.parent
_LOOK_SECS = 0.2
# Of depth_report.json.
_KEPT = ('loss_by_depth', 'accuracy_by_depth', 'residual_by_depth', 'token_correlation_by_depth')


@dataclasses.dataclass(frozen=True)
class Trial:
  """One variant with one seed."""

  variant: str
  config: Config
  folder: Path  # of its run; what it prints goes to a file beside it

  def commands(self, depths: Sequence[int]) -> list[list[str]]:
    """Arguments of Python: to train it, and to evaluate it."""
    beside = self.folder.with_name(f'{self.folder.name}.py')
    train = ['launch.train', f'--config={beside}', f'--workdir={self.folder}']
    evaluate = ['launch.evaluate', 'depths', f'--workdir={self.folder}', *(f'--depths={depth}' for depth in depths)]
    return [['-m', *train], ['-m', *evaluate]]

  def is_done(self, depths: Sequence[int]) -> bool:
    path = self.folder / 'depth_report.json'
    return path.exists() and {str(depth) for depth in depths} <= json.loads(path.read_text())['loss_by_depth'].keys()


def trials(variants: Mapping[str, Config], seeds: Sequence[int], workdir: Path) -> list[Trial]:
  """Every variant with the first seed, then with the next, so that whoever stops early has whole comparisons."""
  return [
    Trial(name, dataclasses.replace(config, name=f'{config.name}_{name}', seed=seed), workdir / f'{name}-{seed}')
    for seed in seeds
    for name, config in variants.items()
  ]


def run(todo: Sequence[Trial], depths: Sequence[int], processes: int, say: Callable[[str], None]) -> int:
  """Trains `processes` trials at once, each on its share of the cores, and evaluates each at `depths` too.

  Returns an exit code. After a trial that fails, and after a signal, nothing more is started. Raises BadInput for a
  folder of another config, before anything is started.
  """
  began, code = time.monotonic(), DONE
  waiting = [(trial, trial.commands(depths)) for trial in _not_done(todo, depths)]
  running: list[tuple[subprocess.Popen, Trial, list[list[str]]]] = []
  left = len(waiting)
  say(f'{len(todo)} trials, {left} to do')
  with StopRequest() as stop:
    try:
      while running or (waiting and code == DONE):
        if stop.requested() and code == DONE:
          code = PREEMPTED
          for process, *_ in running:
            process.terminate()
        while waiting and len(running) < processes and code == DONE:
          trial, (first, *rest) = waiting.pop(0)
          running.append((_start(trial, first, processes), trial, rest))
        time.sleep(_LOOK_SECS)
        for entry in [entry for entry in running if entry[0].poll() is not None]:
          running.remove(entry)
          process, trial, rest = entry
          if process.returncode != DONE:
            code = process.returncode if code == DONE else code
            say(f'{trial.folder.name}: ended with exit code {process.returncode}; its words are in {trial.folder}.log')
          elif rest and code == DONE:
            running.append((_start(trial, rest[0], processes), trial, rest[1:]))
          elif not rest:
            left -= 1
            say(f'{trial.folder.name}: done after {time.monotonic() - began:.0f} s, {left} left')
    finally:  # of an error here, too: they are in sessions of their own
      for process, *_ in running:
        process.terminate()
  return code


def _not_done(todo: Sequence[Trial], depths: Sequence[int]) -> list[Trial]:
  for trial in todo:
    if (trial.folder / 'config.json').exists():
      check_owner(trial.folder, trial.config, safe=())  # what may change in a run would change what is compared
  return [trial for trial in todo if not trial.is_done(depths)]


def _start(trial: Trial, command: list[str], processes: int) -> subprocess.Popen:
  trial.folder.parent.mkdir(parents=True, exist_ok=True)
  write_experiment(trial.config, trial.folder.with_name(f'{trial.folder.name}.py'))
  cores = len(os.sched_getaffinity(0))
  share = f'NPROC={max(cores // processes, 1)}'
  with open(trial.folder.with_name(f'{trial.folder.name}.log'), 'ab') as log:
    # A session of its own: Ctrl-C reaches this process only, which then stops all.
    return subprocess.Popen(
      ['env', share, sys.executable, *command], cwd=_ROOT, stdout=log, stderr=log, start_new_session=True
    )


def results(done: Sequence[Trial]) -> list[dict[str, Any]]:
  """What each trial cost and reached."""
  out = []
  for trial in done:
    cell = price(trial.config)
    report = json.loads((trial.folder / 'depth_report.json').read_text())
    logged = read_lines(trial.folder / 'metrics.jsonl')
    norms = [line['grad_norm'] for line in logged if isinstance(line.get('grad_norm'), float)]
    out.append(
      {
        'variant': trial.variant,
        'seed': trial.config.seed,
        'mean_depth': trial.config.depth.mean,
        'backprop_depth': trial.config.depth.backprop_depth,
        'parameters': cell.parameters,
        'tokens': cell.tokens,
        'training_flops': cell.flops,
        'tokens_per_second': statistics.median(line['tokens_per_second'] for line in logged),
        'largest_grad_norm': max(norms, default=None),
        'chance_accuracy': report['chance_accuracy'],
        **{name: report[name] for name in _KEPT},
      }
    )
  return out


def save(workdir: Path, name: str, rows: Sequence[dict[str, Any]]) -> Path:
  """study.json: {study, runs}."""
  path = workdir / 'study.json'
  storage.write(path, json.dumps({'study': name, 'runs': list(rows)}, indent=1) + '\n')
  return path


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
  """Losses by depth of every variant, mean over seeds and the largest distance from it, as lines of text."""
  depths = list(rows[0]['loss_by_depth'])
  lines = [f'{"loss at depth":<24}' + ''.join(f'{depth:>16}' for depth in depths) + '   training FLOPs']
  for variant in dict.fromkeys(row['variant'] for row in rows):
    its = [row for row in rows if row['variant'] == variant]
    losses = [[row['loss_by_depth'][depth] for row in its if depth in row['loss_by_depth']] for depth in depths]
    flops = statistics.mean(row['training_flops'] for row in its)
    lines.append(f'{variant:<24}' + ''.join(f'{_mean_and_spread(values):>16}' for values in losses) + f'   {flops:.3g}')
  return lines


def _mean_and_spread(values: list[float]) -> str:
  if not values:
    return '-'
  mean = statistics.mean(values)
  return f'{mean:.4f}' + (f' ±{max(abs(value - mean) for value in values):.4f}' if len(values) > 1 else '')
