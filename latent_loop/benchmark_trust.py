"""What trust costs: the guards in every step, the checksums of a save, and how long a save holds the steps up."""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax

from latent_loop.benchmark import Effort, Line, Point, at_depth, machine, timed, train_point
from latent_loop.checkpoint import Checkpoints, content
from latent_loop.config import Config
from latent_loop.parallel import mesh as meshes
from latent_loop.parallel.sharding import ROW_AXES
from latent_loop.trust import guards

_STEPS_BETWEEN_SAVES = 4  # of the loop that is timed; enough for a save to end
_FEW_TOKENS = 16  # of a row, where the guards are timed
_LEAST_STALL_SECS = 0.05  # what a save may take however short a step is


def trust(config: Config, depth: tuple[int, int], folder: Path, effort: Effort) -> Iterator[Line]:
  """Lines of guards, checksums and saves (into `folder`), against the step at this (n, k); raises BadInput.

  The step without guards is the same step, with the choice between the old and the new state taken out.
  """
  config, mesh = at_depth(config, *depth), meshes.make_mesh(config.mesh)
  meshes.check_batch(config.train.batch_size, config.train.num_microbatches, mesh.shape)
  yield machine(config)
  point, state = train_point(config, mesh, None)
  least = _least(config, math.prod(mesh.shape[axis] for axis in ROW_AXES))
  guarded, state = train_point(least, mesh, state)
  with mock.patch.object(guards, 'choose', lambda finite, new, old, skips, most: (new, skips)):
    bare, state = train_point(least, mesh, state)
  step = yield from _guards(point, guarded, bare, effort)
  yield from _checksums(state, step, config.checkpoint.every_steps, effort)
  yield from _saves(point, state, config, folder, effort)


def _least(config: Config, rows: int) -> Config:
  """`config` with the same parameters and the fewest tokens and iterations."""
  seq_len = min(_FEW_TOKENS, config.data.seq_len)
  train = dataclasses.replace(config.train, batch_size=rows, num_microbatches=1, loss_chunk=seq_len)
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=seq_len), train=train)
  return at_depth(config, 0, 1)


def _guards(point: Point, guarded: Point, bare: Point, effort: Effort) -> Iterator[Line]:
  """What `guarded` takes longer than `bare`, as a share of `point`. Returns the seconds of `point`.

  The guards work on the train state, whatever the batch and the depth, so they are timed where the rest is least: a
  hundredth of a whole step is less than its noise. In pairs, each of which sees one state of the machine; which of the
  two comes first alternates. What that leaves open is in the interval.
  """
  step = statistics.median(timed(point.call, effort.repeats + 1)[1:])
  both = []
  for i in range(effort.rounds * effort.repeats):
    order = (guarded, bare) if i % 2 == 0 else (bare, guarded)
    seconds = [timed(one.call, 1)[0] for one in order]
    both.append(tuple(seconds if i % 2 == 0 else reversed(seconds)))
  longer = [a - b for a, b in both]
  yield {
    'mode': 'guards',
    **point.depth,
    'tokens': point.tokens,
    'seconds_median': step,
    'seconds_of_guards': statistics.median(longer),
    'share_of_step': statistics.median(longer) / step,
    'share_interval': [bound / step for bound in interval(longer)],
    'pairs': len(both),
    'seconds': both,
  }
  return step


def interval(values: list[float]) -> tuple[float, float]:
  """Where the median that `values` are drawn around lies with 95 % confidence, whatever their distribution.

  As many of n values lie below it as coins of n show heads; the smallest and the largest when those are too few.
  """
  n, ordered, left_out, below = len(values), sorted(values), 0, 0.0
  while (below := below + math.comb(n, left_out) / 2**n) <= 0.025:
    left_out += 1
  first = max(left_out - 1, 0)
  return ordered[first], ordered[n - 1 - first]


def _checksums(state: list, step: float, every_steps: int, effort: Effort) -> Iterator[Line]:
  """Of the whole train state, and the look for values that are not finite: what a save adds on the devices."""
  names = list(content.named(state[0]))
  work = lambda: (content.finish(names, content.start(state[0])), guards.not_finite(state[0]))
  seconds = statistics.median(timed(work, effort.repeats + 1)[1:])
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(state[0]) if hasattr(leaf, 'nbytes'))
  yield {
    'mode': 'checksums',
    'state_bytes': total,
    'seconds_median': seconds,
    'every_steps': every_steps,
    'share_of_step': seconds / (every_steps * step),
  }


def _saves(point: Point, state: list, config: Config, folder: Path, effort: Effort) -> Iterator[Line]:
  """A loop of steps with a save after every few, as launch.train makes it: look, start to save, go on."""
  between, stalls, during = [], [], []
  with Checkpoints(folder, dataclasses.replace(config.checkpoint, keep_last=1)) as checkpoints:
    for i in itertools.count(1):
      seconds = timed(point.call, 1)[0]
      (during if i > 1 and i % _STEPS_BETWEEN_SAVES == 1 else between).append(seconds)
      if len(during) == effort.repeats:
        break
      if i % _STEPS_BETWEEN_SAVES == 0:
        start = time.perf_counter()
        assert not guards.not_finite(state[0]), 'a benchmark of steps that went wrong'
        checkpoints.save(i, state[0], {})
        stalls.append(time.perf_counter() - start)
  plain = statistics.median(between)
  slower = [max(seconds - plain, 0.0) for seconds in during]
  yield {
    'mode': 'saves',
    'step_seconds_median': plain,
    'call_seconds': stalls,  # the first compiles
    'step_behind_seconds': during,
    'stall_seconds_median': statistics.median(a + b for a, b in zip(stalls, slower, strict=True)),
    'allowed_seconds': max(plain, _LEAST_STALL_SECS),
  }
