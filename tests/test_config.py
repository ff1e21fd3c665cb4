"""Config: one home for defaults, sealed once, refused by path."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import pytest

from latent_loop import sealing
from latent_loop.config import Config
from latent_loop.errors import BadInput
from latent_loop.model import build, cost
from latent_loop.optim import make_optimizer
from latent_loop.parallel import sharding
from latent_loop.sealing import differences, from_json, seal, to_json, view
from latent_loop.step import init_state
from tests.tiny import tiny_config

EXPERIMENTS = sorted(p.stem for p in (Path(__file__).parent.parent / 'experiments').glob('*.py'))


def experiment(name: str) -> Config:
  return seal(importlib.import_module(f'experiments.{name}').get_config())


def test_view_and_seal_are_inverse():
  config = Config()
  assert seal(view(config)) == config
  assert from_json(to_json(config), 'x') == config


@pytest.mark.parametrize(
  'path,value,words',
  [
    ('model.width', 'wide', "config.model.width='wide'"),
    ('model.width', True, 'config.model.width=True'),
    ('model.block', 'sandwitch', 'choose one of sandwich, pre_norm'),
    ('model.width', 100, 'multiple of 8'),
    ('depth.backprop_depth', 99, 'between 1 and'),
    ('depth.curriculum', 'linear', 'set both, or neither'),
    ('optim.warmup_fraction', 1.5, 'warmup'),
    ('optim.no_decay', 'scale', 'not a tuple'),
    ('train.num_microbatches', 3, 'does not divide'),
    ('train.loss_chunk', 100, 'does not divide config.data.seq_len'),
    ('mesh.fsdp', 0, 'config.mesh'),
    ('data.weight_changes', [[0.5, 1]], 'the number of config.data.paths is 0'),
    ('guard.max_skips_in_row', 2**40, 'config.guard.max_skips_in_row=1099511627776'),
    ('seed', -1, 'config.seed=-1'),
  ],
)
def test_a_bad_value_is_refused_by_path(path, value, words):
  values = json.loads(to_json(Config()))
  *groups, name = path.split('.')
  group = values
  for part in groups:
    group = group[part]
  group[name] = value
  with pytest.raises(BadInput, match='.*') as error:
    seal(values)
  assert words in str(error.value)


def test_an_unknown_key_names_the_nearest():
  values = json.loads(to_json(Config()))
  values['model']['widht'] = 3
  with pytest.raises(BadInput, match="config.model.widht: unknown key; did you mean 'width'"):
    seal(values)
  with pytest.raises(BadInput, match="config.modle: unknown key; did you mean 'model'"):
    sealing.check_key('modle.width')
  sealing.check_key('model.width')


def test_a_missing_key_is_refused():
  values = json.loads(to_json(Config()))
  del values['train']['num_steps']
  with pytest.raises(BadInput, match='config.train.num_steps: missing'):
    seal(values)


def test_optional_fields_take_none_and_numbers():
  values = view(Config())
  values.optim.clip_norm = None
  values.optim.ema_decay = 0.5
  sealed = seal(values)
  assert sealed.optim.clip_norm is None and sealed.optim.ema_decay == 0.5


def test_differences_name_the_fields():
  new = dataclasses.replace(Config(), seed=3)
  assert differences(Config(), new) == {'seed': (0, 3)}


def test_a_roll_back_for_an_alarm_needs_checkpoints_from_before_it():
  """Evaluations of 4, 6 and 8 and saves of 2, 4, 6, 8: a run that an alarm of the last two stops returns to 4."""
  alarm = {'guard.rollback': 1, 'guard.on_alarm': 'stop', 'guard.alarm_patience': 2, 'eval.every_steps': 2}
  assert tiny_config(**alarm, **{'checkpoint.every_steps': 2, 'checkpoint.keep_last': 3}).guard.rollback == 1
  with pytest.raises(BadInput, match='ahead of the last alarm_patience .* raise config.checkpoint.keep_last=2 to 3'):
    tiny_config(**alarm, **{'checkpoint.every_steps': 2, 'checkpoint.keep_last': 2})


@pytest.mark.parametrize(
  'changes,words',
  [
    (((0.5, 1.0),), '(0.5, 1.0) is not the share'),
    (((0.5, 0.0, 0.0),), 'not all 0'),
    (((0.5, -1.0, 2.0),), '0 or more'),
    (((0.6, 1.0, 1.0), (0.5, 1.0, 2.0)), 'begin at [0.6, 0.5] of the steps; give increasing shares'),
    (((1.0, 1.0, 1.0),), 'begin at [1.0]'),
    (((0.5, 3.0, 0.0),), 'b would never be read'),
    (((0.5, 1.0, 1.0), (0.5001, 2.0, 1.0)), 'begin at steps [5, 5], and each needs a step of its own'),
    (((0.01, 1.0, 1.0),), 'begin at steps [0]'),
  ],
)
def test_changes_of_weights_that_cannot_be_are_refused(changes, words):
  values = json.loads(to_json(Config()))
  values['train']['num_steps'] = 10
  values['data'].update(source='prepared', paths=['a', 'b'], weights=[1, 0], weight_changes=changes)
  with pytest.raises(BadInput) as error:
    seal(values)
  assert 'config.data.weight' in str(error.value) and words in str(error.value)


@pytest.mark.parametrize('name', EXPERIMENTS)
def test_every_experiment_builds_at_full_size(name):
  config = experiment(name)
  assert config.name == name
  model = build(config.model, config.depth)
  optimizer = make_optimizer(config.optim, config.train.num_steps)
  shapes = jax.eval_shape(lambda: init_state(config, model, optimizer))
  paths = jax.tree_util.tree_leaves_with_path(shapes)
  assert all(sharding.spec_of(sharding.path_of(path)) is not None for path, leaf in paths if leaf.ndim)
  assert cost.count(model, config.data.seq_len).total_parameters > 0


def test_the_papers_model_has_the_papers_size_and_cost():
  config = experiment('huginn_3p5b')
  counts = cost.count(build(config.model, config.depth), config.data.seq_len)
  assert counts.total_parameters == 3_564_976_800
  assert counts.forward(32) == pytest.approx(120.06e9, rel=0.01)
  assert counts.train(24, 8) == pytest.approx(186.39e9, rel=0.01)
  assert counts.train(24, 8) + counts.recompute(8, config.loss_chunks) == pytest.approx(215.35e9, rel=0.01)


def test_the_baselines_are_matched():
  def of(name):
    config = experiment(name)
    counts = cost.count(build(config.model, config.depth), config.data.seq_len)
    k = config.depth.backprop_depth
    return counts.total_parameters, counts.train(config.depth.mean - k, k)

  (parameters, flops), same_params, same_flops = (
    of('tiny_text'),
    of('fixed_depth_same_params'),
    of('fixed_depth_same_flops'),
  )
  assert same_params[0] == parameters
  assert same_flops[1] == pytest.approx(flops, rel=0.02)
