"""Guards: what is not finite is skipped, counted, named and never saved."""

import dataclasses
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_loop import loop
from latent_loop.checkpoint import Checkpoints
from latent_loop.data.pipeline import Batches
from latent_loop.exit_codes import NON_FINITE, PREEMPTED
from latent_loop.model import build
from latent_loop.optim import make_optimizer
from latent_loop.step import make_sharded_state, make_train_step
from latent_loop.trained import place
from latent_loop.trust import diagnosis, guards
from tests import tiny
from tests.tiny import (
  assert_same_bits,
  leaves_by_path,
  mesh_of,
  random_params,
  start_state,
  tiny_config,
)

CONFIG = tiny_config(
  **{
    'model.vocab_size': 264,
    'model.num_prelude_layers': 0,
    'model.num_coda_layers': 0,
    'depth.backprop_depth': 1,
    'optim.ema_decay': 0.9,
    'optim.warmup_steps': 8,
    'data.source': 'addition',
    'data.max_difficulty': 2,
    'data.seq_len': 20,
    'train.num_steps': 8,
    'train.num_microbatches': 2,
    'checkpoint.every_steps': 2,
    'checkpoint.keep_last': 9,
    'log.every_steps': 1,
    'eval.num_batches': 1,
  }
)
MESHES = pytest.mark.parametrize(
  'sizes', [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=lambda s: 'x'.join(map(str, s))
)
random_batch = functools.partial(tiny.random_batch, seq_len=20)


@functools.cache
def programs(sizes):
  """(function that makes the first state, shardings, step) of CONFIG: all tests on a mesh compile once."""
  model, optimizer = build(CONFIG.model, CONFIG.depth), make_optimizer(CONFIG.optim, CONFIG.train.num_steps)
  init, specs = make_sharded_state(CONFIG, model, optimizer, mesh_of(*sizes))
  return init, specs, make_train_step(CONFIG, model, optimizer, mesh_of(*sizes), specs)


ONE = (1, 1, 1)


def step_on(sizes=ONE):
  """((state, batch) -> (state, metrics), all on the host; the first state; the compiled step)."""
  _, specs, step = programs(sizes)

  def take(state, batch):
    new = step(jax.device_put(state, specs), place(batch, mesh_of(*sizes)), jax.random.key(11))
    return jax.device_get(new)

  optimizer = make_optimizer(CONFIG.optim, CONFIG.train.num_steps)
  return take, start_state(CONFIG, build(CONFIG.model, CONFIG.depth), optimizer), step


def with_nan_weight(seed: int):
  batch = random_batch(seed)
  batch.weights_BT[5, 2] = np.nan
  return batch


def with_huge_weight(seed: int):
  """A loss that is finite in float32 under a gradient whose norm is not."""
  batch = random_batch(seed)
  batch.weights_BT[:] = np.where(np.arange(batch.weights_BT.shape[1]) % 2, 1e30, -1e30)
  return batch


def kept(state):
  return state.params, state.opt_state, state.ema


@MESHES
def test_an_update_that_is_not_finite_is_not_made(sizes):
  """Parameters, moments, counts and average keep their bits; the next step is the one that would have come anyway."""
  take, first, step = step_on(sizes)
  one, _ = take(first, random_batch(0))
  skipped, metrics = take(one, with_nan_weight(1))
  assert not np.isfinite(metrics['loss'])
  assert_same_bits(kept(skipped), kept(one))
  assert (skipped.step, skipped.skips.total, skipped.skips.in_row) == (2, 1, 1)
  assert np.isfinite(metrics['param_norm'])
  after, metrics = take(skipped, random_batch(2))
  assert (after.step, after.skips.total, after.skips.in_row) == (3, 1, 0)
  want, want_metrics = take(dataclasses.replace(one, step=np.int32(2)), random_batch(2))
  assert_same_bits(kept(after), kept(want))
  assert (metrics['n'], metrics['k']) == (want_metrics['n'], want_metrics['k']), 'the depth is that of the step'
  assert step.compiled_count() == 1


def test_the_learning_rate_counts_updates_not_batches():
  """What the metrics say is what the optimizer used, also behind a skip, in the middle of a warm-up."""
  take, first, _ = step_on()
  state, rates = first, []
  for batch in (random_batch(0), with_nan_weight(1), random_batch(2)):
    state, metrics = take(state, batch)
    rates.append(float(metrics['learning_rate']))
  np.testing.assert_allclose(rates, [2e-3 / 8, 2 * 2e-3 / 8, 2 * 2e-3 / 8], rtol=1e-6)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_skipped_too():
  take, first, _ = step_on()
  new, metrics = take(first, with_huge_weight(0))
  assert np.isfinite(metrics['loss']) and not np.isfinite(metrics['grad_norm'])
  assert_same_bits(kept(new), kept(first))
  assert new.skips.total == 1


def test_behind_the_last_skip_nothing_changes_any_more():
  """The host reads one step late: a step that was already under way must leave the state to be looked at."""
  take, first, _ = step_on()
  state = first
  for i in range(3):
    state, _ = take(state, with_nan_weight(i))
  assert state.skips.in_row == 3
  state, metrics = take(state, random_batch(9))
  assert np.isfinite(metrics['loss']) and state.skips.in_row == 4
  assert_same_bits(kept(state), kept(first))


# --- where it began ------------------------------------------------------------------------------------


@pytest.mark.slow
@MESHES
def test_the_first_place_that_is_not_finite_is_found(sizes):
  """A core that multiplies its state by 1e9 overflows float32 in an iteration that one can count."""
  model, mesh = build(CONFIG.model, CONFIG.depth), mesh_of(*sizes)
  params = random_params(model)
  grows = dataclasses.replace(model)
  object.__setattr__(grows, 'apply_core', lambda params, s_BTD, e_BTD, rows: s_BTD * 1e9)
  batch = place(random_batch(), mesh)
  where = lambda model, params, batch=batch: diagnosis.first_place(CONFIG, model, mesh, params, batch, 3, 7)
  assert where(grows, params) == 'iteration 5 of 7'
  assert where(model, params) == 'the gradient: the forward pass is finite'
  assert where(model, params, place(with_nan_weight(0), mesh)) == 'the loss'
  params['embed']['embedding'][:] = np.nan
  assert where(model, params) == 'the embedded input, ahead of the loop'


# --- a whole run ---------------------------------------------------------------------------------------


def run(workdir: Path, monkeypatch, bad_batches=(), act=None, **more) -> int:
  """loop.run with a NaN in the weights of `bad_batches`; act(step, state) -> the state that a step leaves."""
  build_batch, make_mesh, (init, specs, step_once) = Batches.batch, loop.meshes.make_mesh, programs(ONE)

  def batch(self, step):
    made = build_batch(self, step)
    if step in bad_batches:
      made.weights_BT[0, 3] = np.nan
    return made

  def step(state, batch, key):
    number = int(state.step)
    state, metrics = step_once(state, batch, key)
    state = act(number, state) if act else state
    return state, {**metrics, 'param_norm': optax.tree.norm(state.params)}

  monkeypatch.setattr(loop.meshes, 'make_mesh', lambda cfg: make_mesh(cfg, jax.devices()[:1]))
  monkeypatch.setattr(Batches, 'batch', batch)
  monkeypatch.setattr(loop, 'make_sharded_state', lambda *_: (init, specs))
  monkeypatch.setattr(loop, 'make_train_step', lambda *_: step)
  monkeypatch.setattr(loop, 'finish', lambda this: None)
  return loop.run(CONFIG, workdir, **more)


def lines_of(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def saved(workdir: Path) -> list[int]:
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())


def assert_finite_on_disk(workdir: Path) -> None:
  init, specs, _ = programs(ONE)
  with Checkpoints(workdir, CONFIG.checkpoint, read_only=True) as checkpoints:
    for step in saved(workdir):
      state = checkpoints.restore(step, jax.eval_shape(init), specs, fingerprint=None)
      assert all(np.all(np.isfinite(x)) for x in leaves_by_path(state).values()), step


def test_a_bad_batch_costs_one_update_and_three_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
  """Batch 1 is bad alone; 4, 5 and 6 are bad in a row. Nothing that is not finite reaches the disk."""
  assert run(tmp_path / 'run', monkeypatch, bad_batches=(1, 4, 5, 6)) == NON_FINITE
  said = capsys.readouterr().out
  records = lines_of(tmp_path / 'run')
  assert [r['skipped'] for r in records] == [0, 1, 1, 1, 2, 3, 4]
  assert [r['skipped_in_row'] for r in records] == [0, 1, 0, 0, 1, 2, 3]
  assert [r['loss'] is None for r in records] == [False, True, False, False, True, True, True]
  last = records[-1]
  assert 'skipped (1 in a row, 1 in all)' in said
  assert f'step 7: loss nan and gradient norm nan at depth {last["n"]}+{last["k"]}, batch {last["batch_hash"]}' in said
  assert 'the first value that is not finite is in the loss' in said
  assert saved(tmp_path / 'run') == [2, 4, 6]
  assert_finite_on_disk(tmp_path / 'run')


@pytest.mark.parametrize('part', ['params', 'opt_state'])
def test_a_state_that_is_not_finite_is_named_and_never_saved(tmp_path, monkeypatch, capsys, part):
  """A NaN that no step put there (a broken chip, a bug) ends the run at once, be it in a parameter or in a moment."""

  def spoil(step, state):
    if step != 3:
      return state
    leaf = max(jax.tree.leaves(getattr(state, part)), key=lambda x: x.size)
    replace = lambda x: jnp.full_like(x, jnp.nan) if x is leaf else x
    return dataclasses.replace(state, **{part: jax.tree.map(replace, getattr(state, part))})

  assert run(tmp_path / 'run', monkeypatch, act=spoil) == NON_FINITE
  assert f'the train state is not finite in {part}/' in capsys.readouterr().out
  assert saved(tmp_path / 'run') == [2]
  assert_finite_on_disk(tmp_path / 'run')


def test_a_time_limit_saves_ahead_of_it(tmp_path, monkeypatch, capsys):
  assert run(tmp_path / 'run', monkeypatch, deadline=time.monotonic()) == PREEMPTED
  assert saved(tmp_path / 'run') == [1]
  assert 'stopped at step 1, saved; start the same command again' in capsys.readouterr().out


def test_arrays_that_are_not_finite_are_named():
  tree = {'a': jnp.zeros(3), 'b': {'c': jnp.array([1.0, jnp.inf]), 'd': jnp.arange(2)}, 'e': jnp.float32(jnp.nan)}
  assert guards.not_finite(tree) == ['b/c', 'e']
