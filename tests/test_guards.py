"""Guards: what is not finite is skipped, counted, named and never saved."""

import contextlib
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
from latent_loop.chaos.kill import TIMINGS
from latent_loop.checkpoint import Checkpoints
from latent_loop.data.pipeline import Batches
from latent_loop.errors import BadInput
from latent_loop.exit_codes import DONE, NON_FINITE, PREEMPTED
from latent_loop.metrics import JsonLines, read_lines
from latent_loop.model import build
from latent_loop.optim import make_optimizer
from latent_loop.step import make_sharded_state, make_train_step
from latent_loop.trained import place
from latent_loop.trust import diagnosis, guards, rollback
from latent_loop.trust.rollback import Rollback
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


def run(workdir: Path, monkeypatch, bad_batches=(), act=None, config=CONFIG, at=lambda step: step, **more) -> int:
  """loop.run with a NaN in the weights of `bad_batches` of the stream; act(step, state) -> the state a step leaves.

  at: which batch to take for that of a step.
  """
  build_batch, build_hash, make_mesh = Batches.batch, Batches.hash, loop.meshes.make_mesh
  init, specs, step_once = programs(ONE)

  def batch(self, step):
    made = build_batch(self, at(step))
    if rollback.place(at(step), self.rollbacks) in bad_batches:
      made.weights_BT[0, 3] = np.nan
    return made

  def step(state, batch, key):
    number = int(state.step)
    state, metrics = step_once(state, batch, key)
    state = act(number, state) if act else state
    return state, {**metrics, 'param_norm': optax.tree.norm(state.params)}

  with monkeypatch.context() as patch:
    patch.setattr(loop.meshes, 'make_mesh', lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    patch.setattr(Batches, 'batch', batch)
    patch.setattr(Batches, 'hash', lambda self, step: build_hash(self, at(step)))
    patch.setattr(loop, 'make_sharded_state', lambda *_: (init, specs))
    patch.setattr(loop, 'make_train_step', lambda *_: step)
    patch.setattr(loop, 'finish', lambda this: None)
    return loop.run(config, workdir, **more)


def lines_of(workdir: Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def saved(workdir: Path) -> list[int]:
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name != 'set_aside')


def set_aside(workdir: Path) -> list[str]:
  return sorted(path.name for path in (workdir / 'checkpoints' / 'set_aside').iterdir())


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


# --- roll-backs -------------------------------------------------------------------------------------------


class Killed(BaseException):
  """In the place of a SIGKILL: nothing of the loop catches it."""


def kill(*args) -> None:
  raise Killed


def guarded(**values):
  """CONFIG with other values of config.guard."""
  return dataclasses.replace(CONFIG, guard=dataclasses.replace(CONFIG.guard, **values))


def numbers_of(workdir: Path) -> list[dict]:
  """What is logged and does not depend on the clock."""
  return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines_of(workdir)]


@pytest.fixture(scope='module')
def without_the_window(tmp_path_factory):
  """(logged numbers, last state) of a run whose stream lacks batches 4 to 7."""
  with pytest.MonkeyPatch.context() as patch:
    return rolled(tmp_path_factory.mktemp('reference') / 'run', patch, at=lambda step: step + 4 * (step >= 4))


def rolled(workdir, monkeypatch, **more):
  ends = {}
  keep = lambda step, state: ends.update({step: state}) or state
  assert run(workdir, monkeypatch, act=keep, **more) == DONE
  return numbers_of(workdir), jax.device_get(ends[7])


@pytest.mark.parametrize('killed', ['never', 'ahead of the record', 'behind the record', 'later'])
def test_a_roll_back_is_a_run_over_a_stream_without_the_batches_that_went_wrong(
  tmp_path, monkeypatch, capsys, without_the_window, killed
):
  """Batches 5, 6 and 7 are bad. Step 6 was saved between them, so the last good one is 4; steps 4, ... read 8, ..."""
  folder, config = tmp_path / 'run', guarded(rollback=1)
  with monkeypatch.context() as patch, contextlib.suppress(Killed):
    if killed == 'ahead of the record':
      patch.setattr(rollback, 'write', kill)
    if killed == 'behind the record':
      patch.setattr(loop, 'restore_again', kill)
    later = lambda step, state: (
      kill() if killed == 'later' and step == 7 and (folder / rollback.NAME).exists() else state
    )
    if killed != 'never':
      run(folder, monkeypatch, bad_batches=(5, 6, 7), act=later, config=config)
      pytest.fail('nobody killed it')
  numbers, state = rolled(folder, monkeypatch, bad_batches=(5, 6, 7), config=config)
  assert numbers == without_the_window[0]
  assert_same_bits(state, without_the_window[1])
  assert saved(folder) == [2, 4, 6, 8] and set_aside(folder)[0] == '6-0'
  (back,) = rollback.read(folder)
  assert (back.step, back.batch) == (4, 8) and 'step 8: loss nan' in back.reason
  said = 'returning to step 4, roll-back 1 of 1; the data goes on at batch 8 of its stream, 4 batches are skipped'
  assert said in capsys.readouterr().out


def test_no_more_roll_backs_than_allowed(tmp_path, monkeypatch, capsys):
  """Batches 9 to 11 are bad too, and meet the run that returned once; with one more allowed it gets past them."""
  folder, bad = tmp_path / 'run', (5, 6, 7, 9, 10, 11)
  assert run(folder, monkeypatch, bad_batches=bad, config=guarded(rollback=1)) == NON_FINITE
  assert capsys.readouterr().out.count('Nothing of it was saved. The same command would come here again') == 1
  assert run(folder, monkeypatch, bad_batches=bad, config=guarded(rollback=2)) == DONE
  assert [(back.step, back.batch) for back in rollback.read(folder)] == [(4, 8), (4, 12)]
  assert [line['skipped'] for line in lines_of(folder)] == [0] * 8
  assert_finite_on_disk(folder)
  early = tmp_path / 'early'
  assert run(early, monkeypatch, bad_batches=(1, 2, 3), config=guarded(rollback=1)) == NON_FINITE
  assert 'no step before 2 is kept that config.guard.rollback could return to. The same' in capsys.readouterr().out
  assert not (early / rollback.NAME).exists() and saved(early) == [2]


def test_an_alarm_that_stops_returns_to_ahead_of_its_patience(tmp_path, monkeypatch):
  """The evaluations of steps 4 and 6 raise it: the last good step is 2, and what came later is evaluated again."""
  folder, raised = tmp_path / 'run', []

  def evaluate(this, step):
    numbers = {'step': step, 'batch': this.batches.hash(step)}
    evals = JsonLines(this.workdir / 'evals.jsonl', keep_through=99)
    evals.write(step, numbers)
    evals.close()
    return numbers

  def sentences(history, *args):
    raised.append([numbers['step'] for numbers in history])
    return ['collapse'] * (len(raised) == 3)

  monkeypatch.setattr(loop, 'evaluate', evaluate)
  monkeypatch.setattr(loop.alarms, 'sentences', sentences)
  guard = dataclasses.replace(CONFIG.guard, rollback=1, on_alarm='stop')
  often = dataclasses.replace(CONFIG.checkpoint, every_steps=1)  # step 3 is of after the last healthy evaluation
  config = dataclasses.replace(
    CONFIG, guard=guard, checkpoint=often, eval=dataclasses.replace(CONFIG.eval, every_steps=2)
  )
  assert run(folder, monkeypatch, config=config) == DONE
  assert [(back.step, back.batch, back.reason) for back in rollback.read(folder)] == [(2, 6, 'collapse')]
  assert raised == [[2], [2, 4], [2, 4, 6], [2, 4], [2, 4, 6]]
  assert [line['step'] for line in read_lines(folder / 'evals.jsonl')] == [2, 4, 6]
  assert set_aside(folder) == ['3-0', '4-0', '5-0', '6-0']
  assert [line['step'] for line in lines_of(folder)] == list(range(1, 9))


def test_which_batch_a_step_reads_after_roll_backs():
  """A later roll-back decides over earlier ones at its step and behind it; one in front of them undoes them."""
  backs = [Rollback(4, 7, ''), Rollback(8, 13, ''), Rollback(8, 15, '')]
  read = [rollback.place(step, backs) for step in range(10)]
  assert read == [0, 1, 2, 3, 7, 8, 9, 10, 15, 16]
  named = [batch for _, skipped in rollback.skipped(backs) for batch in skipped]
  assert sorted(read + named) == list(range(17))
  backs.append(Rollback(2, 20, ''))
  assert [rollback.place(step, backs) for step in range(5)] == [0, 1, 20, 21, 22]
  assert [(back.step, skipped) for back, skipped in rollback.skipped(backs)] == [(2, range(2, 20))]


@pytest.mark.parametrize(
  'text', ['[{"step": 4, "ba', '[{"step": 4}]', '[4]', '[{"step": 4, "batch": 4, "reason": ""}]']
)
def test_a_damaged_record_of_roll_backs_is_refused(tmp_path, text):
  (tmp_path / rollback.NAME).write_text(text)
  with pytest.raises(BadInput, match='rollbacks.json: truncated or altered'):
    rollback.read(tmp_path)
