"""Alarms: the paper's two failed runs are named while their loss is still finite, and a healthy run raises none."""

import dataclasses
import math

import jax
import pytest

from latent_loop import loop
from latent_loop.config import GuardConfig
from latent_loop.exit_codes import DONE, NON_FINITE
from latent_loop.trust import alarms
from tests.tiny import tiny_config

T = 40
CFG = GuardConfig(alarm_after_steps=100)


def numbers(step: int = 100, loss=(3.2, 2.9), correlation: float = 0.6, residual=(0.02, 0.004)) -> dict:
  """An evaluation at mean depth 6: loss at 1 and at the mean, correlation there, residual there and at the deepest."""
  by_depth = lambda one, mean, deepest: {'1': one, '6': mean, '24': deepest}
  return {
    'step': step,
    'mean_depth': 6,
    'loss_by_depth': by_depth(*loss, loss[1]),
    'token_correlation_by_depth': by_depth(0.3, correlation, correlation),
    'residual_by_depth': by_depth(1.2, *residual),
  }


COLLAPSED = {'correlation': 0.97 * (1 - 1 / T)}
IGNORED = {'loss': (2.9, 2.899)}
RUNS_AWAY = {'residual': (0.02, 0.3)}


@pytest.mark.parametrize(
  'fault, words',
  [(COLLAPSED, 'collapse: the states'), (IGNORED, 'the state is ignored'), (RUNS_AWAY, 'the state runs away')],
)
def test_a_fault_in_every_one_of_the_last_evaluations_is_named(fault, words):
  (sentence,) = alarms.sentences([numbers(100), numbers(200, **fault), numbers(300, **fault)], CFG, T)
  assert sentence.startswith('step 300: ') and words in sentence
  assert alarms.sentences([numbers(100), numbers(300, **fault)], CFG, T) == [], 'once is no alarm'
  assert alarms.sentences([numbers(200, **fault), numbers(300)], CFG, T) == [], 'it is over'


def test_what_the_beginning_of_a_run_looks_like_is_no_alarm():
  """Depth cannot pay before anything is learned; collapse is an alarm at any time."""
  early = [numbers(step, **IGNORED, **RUNS_AWAY) for step in (20, 40)]
  assert alarms.sentences(early, CFG, T) == []
  assert len(alarms.sentences([{**e, **numbers(e['step'], **COLLAPSED)} for e in early], CFG, T)) == 1


def test_noise_is_no_contraction():
  """Behind convergence the residual is rounding, and its ratio says nothing. What JSON cannot hold is no number."""
  assert alarms.contraction(numbers(residual=(1e-7, 9e-7))) is None
  assert alarms.contraction(numbers(residual=(0.02, None))) is None
  assert alarms.contraction(numbers(residual=(0.02, 0.02 * 0.9**18))) == pytest.approx(0.9)
  nothing = numbers(loss=(None, None), correlation=None)
  assert alarms.sentences([nothing, nothing], CFG, T) == []


def test_a_loss_above_the_guardrail_is_named_from_the_stated_token_on():
  cfg = dataclasses.replace(CFG, max_loss=4.0, max_loss_after_tokens=1000)
  assert alarms.loss_too_high(9, 999, 5.0, cfg) is None
  assert 'loss 5.0000 after 1,000 tokens is above config.guard.max_loss=4.0' in alarms.loss_too_high(9, 1000, 5.0, cfg)
  assert alarms.loss_too_high(9, 1000, 3.9, cfg) is None
  assert alarms.loss_too_high(9, 1000, 5.0, CFG) is None, 'off by default'


RUN = {
  'model.vocab_size': 264,
  'data.source': 'embedded_text',
  'data.seq_len': T,
  'train.loss_chunk': T,
  'train.num_steps': 40,
  'eval.every_steps': 10,
  'eval.num_batches': 1,
  'log.every_steps': 1,
  'guard.on_alarm': 'stop',
  'guard.alarm_after_steps': 10,
}


def run(workdir, monkeypatch, **overrides) -> int:
  """loop.run on one device, without the report at the end."""
  make_mesh = loop.meshes.make_mesh
  monkeypatch.setattr(loop.meshes, 'make_mesh', lambda cfg: make_mesh(cfg, jax.devices()[:1]))
  monkeypatch.setattr(loop, 'finish', lambda this: None)
  return loop.run(tiny_config(**{**RUN, **overrides}), workdir)


@pytest.mark.slow
def test_a_run_that_collapses_is_stopped_while_its_loss_is_finite(tmp_path, monkeypatch, capsys):
  """The paper's first failed run in small: an additive injection and a learning rate that is too high."""
  failing = {'model.injection': 'add', 'optim.learning_rate': 3e-2, 'guard.min_depth_gain': -9.0}
  assert run(tmp_path / 'run', monkeypatch, **failing) == NON_FINITE
  assert 'collapse: the states of the tokens of a row correlate by 0.97' in capsys.readouterr().out
  losses = [line['loss'] for line in loop.read_lines(tmp_path / 'run' / 'metrics.jsonl')]
  assert len(losses) < 40 and all(math.isfinite(loss) for loss in losses)


@pytest.mark.slow
def test_a_healthy_run_raises_no_alarm_about_depth_and_a_guardrail_warns(tmp_path, monkeypatch, capsys):
  guardrail = {'guard.on_alarm': 'warn', 'guard.max_loss': 0.1, 'guard.max_loss_after_tokens': 39 * 8 * T}
  assert run(tmp_path / 'run', monkeypatch, **guardrail) == DONE
  said = capsys.readouterr().out
  assert said.count('validation at step') == 3
  warnings = [line for line in said.splitlines() if line.startswith('warning: ')]
  assert [line[:24] for line in warnings] == ['warning: step 39: loss 3', 'warning: step 40: loss 3']
