"""The mesh and the rule table: every array has one place, and what does not fit is refused by name."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from latent_loop.config import MeshConfig
from latent_loop.errors import BadInput
from latent_loop.model import build
from latent_loop.optim import KINDS, make_optimizer
from latent_loop.parallel import mesh as meshes
from latent_loop.parallel import sharding
from latent_loop.parallel.sharding import path_of, spec_of
from latent_loop.step import init_state, make_sharded_state
from tests.tiny import mesh_of, tiny_config

# Together they hold every kind of every part of the model.
MODELS = [
  {},
  {'model.injection': 'add', 'model.block': 'pre_norm', 'model.qk_bias': False, 'model.prelude_norm': True},
  {'model.injection': 'diagonal', 'model.mlp': 'relu_squared', 'model.core_exit': 'projection'},
]


def state_shapes(**overrides):
  config = tiny_config(**overrides)
  model = build(config.model, config.depth)
  optimizer = make_optimizer(config.optim, config.train.num_steps)
  return jax.eval_shape(lambda: init_state(config, model, optimizer))


@pytest.mark.parametrize('model', MODELS, ids=['sandwich', 'pre_norm', 'parcae'])
@pytest.mark.parametrize('kind', KINDS)
def test_every_array_of_every_train_state_has_exactly_one_rule_and_moments_lie_with_their_parameters(kind, model):
  state = state_shapes(**model, **{'optim.kind': kind, 'optim.ema_decay': 0.9})
  specs = sharding.shardings(state, mesh_of(2, 2, 2))
  by_path = {path_of(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(specs)}
  params = {path.removeprefix('params/'): spec for path, spec in by_path.items() if path.startswith('params/')}
  copies = dict.fromkeys(params, 0)
  for path, spec in by_path.items():
    for name in params:
      if path.endswith('/' + name):
        assert spec == params[name], path
        copies[name] += 1
  assert all(count >= 3 for count in copies.values()), copies  # the parameter, its average, one moment or more


def test_widths_lie_on_fsdp_and_heads_and_hidden_units_on_tensor():
  specs = sharding.shardings(state_shapes().params, mesh_of(2, 2, 2))
  attn, mlp = specs['core'][0]['attn'], specs['core'][0]['mlp']
  assert attn['q']['kernel'].spec == P('fsdp', 'tensor', None)
  assert attn['out']['kernel'].spec == P('tensor', None, 'fsdp')
  assert mlp['up']['kernel'].spec == P('fsdp', 'tensor') and mlp['down']['kernel'].spec == P('tensor', 'fsdp')
  assert specs['embed']['embedding'].spec == P('tensor', 'fsdp')


def test_the_initial_state_really_lies_where_the_table_says():
  """The whole state is born under its shardings: moments made by a bare optimizer.init end up on one device."""
  config = tiny_config(**{'model.num_prelude_layers': 0, 'model.num_coda_layers': 0})
  model = build(config.model, config.depth)
  init, specs = make_sharded_state(config, model, make_optimizer(config.optim, 20), mesh_of(2, 2, 2))
  state = init()
  for (path, array), spec in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(specs), strict=True):
    assert array.sharding == spec, path_of(path)
  kernel = state.opt_state[1][0].mu['core'][0]['mlp']['up']['kernel']
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size


def test_a_renamed_array_is_refused_by_name():
  with pytest.raises(AssertionError, match=r'params/core/0/mlp/down/weight: 0 sharding rules'):
    spec_of('params/core/0/mlp/down/weight')


def test_an_array_that_two_rules_match_is_refused_by_name(monkeypatch):
  monkeypatch.setattr(sharding, 'RULES', (*sharding.RULES, (r'embedding$', P())))
  with pytest.raises(AssertionError, match=r'embed/embedding: 2 sharding rules'):
    spec_of('embed/embedding')


@pytest.mark.parametrize(
  'sizes, want',
  [((-1, 1, 1), (1, 8, 1, 1)), ((2, -1, 2), (1, 2, 2, 2)), ((1, 2, 4), (1, 1, 2, 4)), ((1, 2, 1, 4), (4, 1, 2, 1))],
)
def test_mesh_fills_in_the_axis_that_is_left(sizes, want):
  assert tuple(meshes.resolve(MeshConfig(*sizes), 8).values()) == want


@pytest.mark.parametrize('sizes', [(3, 1, 1), (4, 1, 1), (-1, 3, 1), (4, 4, 1)])
def test_mesh_that_does_not_fit_the_devices_is_bad_input(sizes):
  with pytest.raises(BadInput, match='does not fit 8 device'):
    meshes.resolve(MeshConfig(*sizes), 8)


@pytest.mark.parametrize('sizes', [(0, 1, 1), (-1, -1, 1), (-2, 1, 1)])
def test_mesh_sizes_that_no_number_of_devices_fits_are_bad_input(sizes):
  with pytest.raises(BadInput, match='config.mesh'):
    MeshConfig(*sizes)


@pytest.mark.parametrize('batch_size, microbatches, ok', [(8, 1, True), (8, 2, True), (6, 1, False), (12, 2, False)])
def test_batch_must_divide_over_devices_and_microbatches(batch_size, microbatches, ok):
  check = lambda: meshes.check_batch(batch_size, microbatches, mesh_of(2, 2, 2).shape)
  if ok:
    return check()
  with pytest.raises(BadInput, match=f'batch_size={batch_size} does not divide'):
    check()


def test_axis_that_does_not_divide_the_heads_is_bad_input_that_names_the_array():
  shapes = state_shapes(**{'model.num_heads': 3, 'model.vocab_size': 64}).params
  with pytest.raises(BadInput, match=r'config.mesh.tensor=2 does not divide \S*attn/k/bias of shape \(3, 16\)'):
    sharding.shardings(shapes, mesh_of(tensor=2))


def test_constraints_hold_inside_a_mesh_and_are_nothing_outside():
  x = np.ones((8, 3), np.float32)
  split = jax.jit(lambda x: sharding.constrain(x, ('data', 'fsdp'), None))
  assert len(split(x).sharding.device_set) == 1
  mesh = mesh_of(4, 2)
  with jax.set_mesh(mesh):
    assert split(x).sharding.is_equivalent_to(jax.NamedSharding(mesh, sharding.BATCH), 2)
