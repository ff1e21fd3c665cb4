"""Optimizers, schedules and weight-decay groups against numbers and lists written down by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_loop.model import build
from latent_loop.optim import decay_mask, make_optimizer, make_schedule, muon_dimensions, reference_tensor
from latent_loop.optim.adam_atan2 import scale_by_adam_atan2
from latent_loop.parallel import sharding
from latent_loop.parallel.sharding import path_of
from latent_loop.step import make_train_step
from latent_loop.trained import place
from tests.tiny import leaves_by_path, mesh_of, random_batch, random_params, start_state, tiny_config, tiny_model


def shapes(**overrides):
  return jax.eval_shape(tiny_model(**overrides).init, jax.random.key(0))


def paths_where(tree, wanted) -> set[str]:
  is_leaf = lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)
  return {path_of(p) for p, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf) if wanted(leaf)}


def test_adam_atan2_first_steps_are_those_of_the_reference():
  """Constant gradient, lr 1, eps 1e-6: the step sizes that the published training code takes."""
  optimizer = scale_by_adam_atan2(0.9, 0.95, 1e-6, group=str)
  grads = {'w': jnp.array([1e-3, -2.0, 5.0, 1e-9])}
  state, update = optimizer.init(grads), jax.jit(optimizer.update)
  usual = [2.19988, 1.59293, 1.33247, 1.18255, 1.08412]
  tiny = [2.236e-3, 1.643e-3, 1.394e-3, 1.252e-3, 1.161e-3]
  for usual_size, tiny_size in zip(usual, tiny, strict=True):
    updates, state = update(grads, state)
    np.testing.assert_allclose(updates['w'][:3], usual_size * np.array([1, -1, 1]), rtol=1e-5)
    np.testing.assert_allclose(updates['w'][3], tiny_size, rtol=1e-3)


def test_adam_atan2_divides_a_surprising_gradient_by_its_rms():
  """After a steady 1, a gradient of 100 in one tensor is clipped by sqrt(g^2 / v); the other tensor is not."""
  optimizer = scale_by_adam_atan2(0.9, 0.95, 1e-6, group=str)
  one = {'a': jnp.ones(3), 'b': jnp.ones(2)}
  update = jax.jit(optimizer.update)
  _, state = update(one, optimizer.init(one))
  updates, _ = update({'a': jnp.full(3, 100.0), 'b': jnp.ones(2)}, state)
  v, m = 0.95 + 0.05 * 100**2, 1 + 0.1 * 99
  want = np.arctan2(m, np.sqrt(v) / np.sqrt(1 - 0.95**2)) / (1 - 0.9**2) / np.sqrt(100**2 / v)
  np.testing.assert_allclose(updates['a'], want, rtol=1e-5)
  np.testing.assert_allclose(updates['b'], 1.59293, rtol=1e-5)


def test_adam_atan2_at_the_peak_rate_shrinks_a_weight_by_exactly_weight_decay():
  cfg = tiny_config(
    **{'optim.kind': 'adam_atan2', 'optim.weight_decay': 4e-3, 'optim.learning_rate': 0.02, 'optim.clip_norm': None}
  ).optim
  params = {'kernel': jnp.array([3.0, -2.0]), 'scale': jnp.array([1.5])}
  params = {'mlp': params}  # the patterns of no_decay begin with a slash
  optimizer = make_optimizer(cfg, num_steps=5)
  updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
  np.testing.assert_allclose(updates['mlp']['kernel'], -4e-3 * params['mlp']['kernel'], rtol=1e-5)
  np.testing.assert_array_equal(updates['mlp']['scale'], 0)


def test_weight_decay_spares_exactly_norms_biases_injection_vectors_and_the_projected_exit():
  params = shapes(**{'model.injection': 'diagonal', 'model.core_exit': 'projection', 'model.prelude_norm': True})
  spared = paths_where(decay_mask(tiny_config().optim, params), lambda decays: not decays)
  blocks = ['prelude/0', 'core/0', 'coda/0']
  want = {f'{block}/norm_{i}/scale' for block in blocks for i in (1, 2, 3, 4)}
  want |= {f'{block}/attn/{name}/bias' for block in blocks for name in 'qk'}
  want |= {'final_norm/scale', 'prelude_norm/scale', 'injection/log_a', 'injection/dt_bias', 'injection/b'}
  want |= {'core_exit/kernel'}
  assert spared == want


def test_weight_decay_reaches_the_linear_injection_and_the_embedding():
  decayed = paths_where(decay_mask(tiny_config().optim, shapes()), lambda decays: decays)
  names = ['attn/q', 'attn/k', 'attn/v', 'attn/out', 'mlp/gate', 'mlp/up', 'mlp/down']
  blocks = ['prelude/0', 'core/0', 'coda/0']
  want = {f'{block}/{name}/kernel' for block in blocks for name in names}
  assert decayed == want | {'injection/kernel', 'embed/embedding'}


@pytest.mark.parametrize(
  'given',
  [
    {'optim.warmup_steps': 4, 'optim.cooldown_steps': 5},
    {'optim.warmup_fraction': 0.2, 'optim.cooldown_fraction': 0.25},
  ],
)
def test_schedule_warms_up_holds_and_cools_down_in_steps_and_in_fractions(given):
  cfg = tiny_config(**given, **{'optim.learning_rate': 2.0, 'optim.final_lr_fraction': 0.1}).optim
  rates = [float(make_schedule(cfg, 20)(step)) for step in range(21)]
  want = [0.5, 1.0, 1.5] + [2.0] * 12 + [2.0, 1.64, 1.28, 0.92, 0.56, 0.2]  # step 19 is the last; 20 never runs
  np.testing.assert_allclose(rates, want, rtol=1e-6)


def test_schedule_without_warmup_and_cooldown_is_constant():
  schedule = make_schedule(tiny_config(**{'optim.learning_rate': 0.3}).optim, 20)
  np.testing.assert_allclose([schedule(0), schedule(7), schedule(19)], 0.3, rtol=1e-6)


def test_muon_takes_every_kernel_as_the_matrix_it_is_and_leaves_the_rest_to_adamw():
  """Inputs and outputs of each kernel's matrix, as in the einsum that applies it."""
  params = shapes(**{'model.injection': 'linear', 'model.core_exit': 'projection'})
  numbers = muon_dimensions(params)
  adam = paths_where(numbers, lambda n: n is None)
  assert adam == {path for path in paths_where(params, lambda _: True) if not path.endswith('/kernel')}
  core, axes = numbers['core'][0], lambda n: (n.reduction_axis, n.output_axis)
  assert axes(core['attn']['q']['kernel']) == ((0,), (1, 2))  # BTD,DNH->BTNH
  assert axes(core['attn']['out']['kernel']) == ((0, 1), (2,))  # BTNH,NHD->BTD
  assert axes(core['mlp']['down']['kernel']) == ((0,), (1,))
  assert axes(numbers['injection']['kernel']) == axes(numbers['core_exit']['kernel']) == ((0,), (1,))


def test_muon_steps_are_orthogonal_matrices_whatever_the_gradient_and_adamw_has_its_own_rate():
  """Each kernel's step, read as the matrix it is, has singular values near one another times the rate."""
  given = {'optim.kind': 'muon', 'optim.learning_rate': 0.05, 'optim.adam_learning_rate': 0.01, 'optim.clip_norm': None}
  optimizer = make_optimizer(tiny_config(**given, **{'optim.weight_decay': 0.0}).optim, num_steps=20)
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.float32(rng.standard_normal(shape))
  attn = {'q': {'kernel': normal(6, 2, 5)}, 'out': {'kernel': normal(2, 5, 6)}}
  params = {'attn': attn, 'norm_1': {'scale': normal(6)}}
  updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.exp, params), optimizer.init(params), params)
  for matrix in (updates['attn']['q']['kernel'].reshape(6, 10), updates['attn']['out']['kernel'].reshape(10, 6)):
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert 0.03 < singular.min() and singular.max() < 0.1, singular  # Newton-Schulz stops at 0.7 to 1.2 of 1
  rate = np.abs(updates['norm_1']['scale'])
  assert 0.005 < rate.min() and rate.max() < 0.02, rate


def test_muon_train_step_lowers_the_loss_and_the_moving_average_follows_the_parameters():
  """Through the production step, on a model of one block: two steps on one batch."""
  config = tiny_config(
    **{
      'model.num_prelude_layers': 0,
      'model.num_coda_layers': 0,
      'model.state_init': 'zero',
      'depth.kind': 'fixed',
      'depth.mean': 3,
      'optim.kind': 'muon',
      'optim.learning_rate': 0.02,
      'optim.ema_decay': 0.75,
    }
  )
  step, state = one_device_step(config)
  losses, average = [], leaves_by_path(state.params)
  for _ in range(3):
    state, metrics = step(state)
    losses.append(float(metrics['loss']))
    params = leaves_by_path(state.params)
    average = {name: 0.75 * average[name] + 0.25 * params[name] for name in params}
  assert losses[2] < losses[1] < losses[0], losses
  for name, value in leaves_by_path(state.ema).items():
    np.testing.assert_allclose(value, average[name], rtol=1e-5, atol=1e-7, err_msg=name)


def one_device_step(config):
  """(state -> (state, metrics) on one batch, the first state)."""
  model, mesh = build(config.model, config.depth), mesh_of()
  optimizer = make_optimizer(config.optim, config.train.num_steps)
  state = start_state(config, model, optimizer)
  specs = sharding.shardings(jax.eval_shape(lambda: state), mesh)
  step = make_train_step(config, model, optimizer, mesh, specs)
  batch, key = place(random_batch(), mesh), jax.random.key(3)
  return lambda state: step(state, batch, key), jax.device_put(state, specs)


@pytest.mark.parametrize('kind', ['adamw', 'adam_atan2', 'muon'])
def test_without_gradient_only_what_decays_moves(kind):
  """Through the whole optimizer: what no_decay names stays to the bit, everything else shrinks."""
  config = tiny_config(**{'optim.kind': kind, 'optim.weight_decay': 0.1, 'model.injection': 'diagonal'})
  params = random_params(build(config.model, config.depth))
  optimizer = make_optimizer(config.optim, config.train.num_steps)
  no_gradient = jax.tree.map(jnp.zeros_like, params)
  updates = jax.jit(lambda params: optimizer.update(no_gradient, optimizer.init(params), params)[0])(params)
  moved, decays = leaves_by_path(updates), leaves_by_path(decay_mask(config.optim, params))
  assert {name for name, update in moved.items() if np.any(update)} == {name for name in decays if decays[name]}


def test_parameters_that_are_one_tensor_in_the_reference_are_clipped_together():
  """A surprising gradient for the keys slows queries and values too, and no other layer."""
  optimizer = scale_by_adam_atan2(0.9, 0.95, 1e-6, reference_tensor)
  name = lambda layer, part: f'core/{layer}/attn/{part}/kernel'
  params = {name(layer, part): jnp.ones((2, 3)) for layer in (0, 1) for part in 'qkv'}
  ones = jax.tree.map(jnp.ones_like, params)
  _, state = optimizer.update(ones, optimizer.init(params))
  updates, _ = optimizer.update({**ones, name(0, 'k'): jnp.full((2, 3), 100.0)}, state)
  assert np.all(updates[name(0, 'q')] < 0.9 * updates[name(1, 'q')])
  np.testing.assert_array_equal(updates[name(0, 'q')], updates[name(0, 'v')])
  assert reference_tensor('core/0/mlp/gate/kernel') == reference_tensor('core/0/mlp/up/kernel')
  assert reference_tensor('core/0/mlp/down/kernel') == 'core/0/mlp/down/kernel'
