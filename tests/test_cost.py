"""FLOPs by formula against the matrix products of the program itself, counted in its jaxpr."""

import math
import types

import jax
import numpy as np
import pytest

from latent_loop.model import Model, cost
from latent_loop.parallel import chips
from latent_loop.step import chunked_loss
from tests.tiny import D, F, H, K, N, T, V, random_batch, rows_of, tiny_config, tiny_model

ROWS = 2
KINDS = {
  'huginn': {'model.num_core_layers': 2},
  'parcae': {'model.injection': 'diagonal', 'model.mlp': 'relu_squared', 'model.core_exit': 'projection'},
  'bare': {'model.injection': 'add', 'model.num_prelude_layers': 0, 'model.num_coda_layers': 2},
}


def dot_flops(jaxpr) -> int:
  """Two per multiply-add of every dot_general, scans times their length, the dearer branch of a condition."""
  total = 0
  for eqn in jaxpr.eqns:
    assert eqn.primitive.name != 'while', 'a loop of unknown length cannot be counted'
    inner = [dot_flops(sub) for value in eqn.params.values() for sub in _jaxprs(value)]
    if eqn.primitive.name == 'dot_general':
      contracted = eqn.params['dimension_numbers'][0][0]
      total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    elif eqn.primitive.name == 'cond':
      total += max(inner)
    else:
      total += sum(inner) * eqn.params.get('length', 1)
  return total


def _jaxprs(value):
  values = value if isinstance(value, (tuple, list)) else (value,)
  return [getattr(v, 'jaxpr', v) for v in values if hasattr(getattr(v, 'jaxpr', v), 'eqns')]


def flops_per_token(function, *args) -> float:
  return dot_flops(jax.make_jaxpr(function)(*args).jaxpr) / (ROWS * T)


def params_and_inputs(model: Model):
  batch = random_batch(rows=ROWS)
  params = jax.eval_shape(model.init, jax.random.key(0))
  return params, jax.ShapeDtypeStruct((ROWS, T, D), np.float32), batch


def unrolled(model: Model, params, s_BTD, batch, n: int, k: int):
  rows = rows_of(batch)
  e_BTD = model.embed_input(params, batch.tokens_BT, rows)
  for _ in range(n):
    s_BTD = model.apply_core(*jax.lax.stop_gradient((params, s_BTD, e_BTD)), rows)
  for _ in range(k):
    s_BTD = model.apply_core(params, s_BTD, e_BTD, rows)
  return model.apply_coda(params, s_BTD, rows)


@pytest.mark.parametrize('kind', KINDS)
def test_forward_flops_are_those_of_the_unrolled_program(kind):
  model = tiny_model(**KINDS[kind], **{'model.remat': 'none'})
  params, s_BTD, batch = params_and_inputs(model)
  counted = cost.count(model, T)
  for depth in (1, 3):
    logits = lambda params, s, depth=depth: model.scores(params, unrolled(model, params, s, batch, 0, depth))
    assert flops_per_token(logits, params, s_BTD) == counted.forward(depth)


@pytest.mark.parametrize('n, k', [(0, 1), (3, 2)])
@pytest.mark.parametrize('kind', KINDS)
def test_training_flops_are_those_of_the_unrolled_programs_gradient(kind, n, k):
  """Exactly, at remat none."""
  model = tiny_model(**KINDS[kind], **{'model.remat': 'none'})
  params, s_BTD, batch = params_and_inputs(model)
  loss = lambda params, s: model.scores(params, unrolled(model, params, s, batch, n, k)).sum()
  assert flops_per_token(jax.value_and_grad(loss), params, s_BTD) == cost.count(model, T).train(n, k)


@pytest.mark.parametrize('weights', ['gather_once', 'gather_per_iteration'])
@pytest.mark.parametrize('remat', ['none', 'iteration', 'block'])
def test_recomputed_flops_are_those_of_the_production_program(remat, weights):
  """The real loop and the real loss: what their jaxpr holds beyond `train` is `recompute`, less what is `spared`."""
  fetch = (lambda params, s_BTD: params) if weights == 'gather_per_iteration' else None
  model = tiny_model(**KINDS['huginn'], **{'model.remat': remat})
  params, s_BTD, batch = params_and_inputs(model)
  n, cfg, counted = 4, tiny_config().train, cost.count(model, T)
  counted = counted.gathering_per_iteration() if fetch else counted

  def loss(params, s_BTD):
    y_BTD = model.forward(params, s_BTD, batch.tokens_BT, rows_of(batch), n, K, fetch)
    return chunked_loss(model, params, y_BTD, batch, cfg).value()

  assert flops_per_token(jax.value_and_grad(loss), params, s_BTD) == counted.computed(n, K, tiny_config().loss_chunks)


@pytest.mark.parametrize('kind', KINDS)
def test_parameters_by_part_add_up_to_the_sizes_of_the_arrays(kind):
  model = tiny_model(**KINDS[kind])
  params, counted = params_and_inputs(model)[0], cost.count(model, T)
  for part, tree in params.items():
    assert counted.parameters.get(part, 0) == sum(leaf.size for leaf in jax.tree.leaves(tree)), part
  assert counted.total_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_parameters_of_the_huginn_parts_by_hand():
  counted = cost.count(tiny_model(**KINDS['huginn']), T)
  block = 4 * D * N * H + 2 * N * H + 3 * D * F + 4 * D
  want = {'embed': V * D, 'prelude': block, 'injection': 2 * D * D, 'core': 2 * block, 'coda': block, 'final_norm': D}
  assert counted.parameters == want


def test_peak_is_known_for_known_devices_only():
  assert chips.chip_of('NVIDIA H100 80GB HBM3').flops == 989e12
  assert chips.chip_of('TPU v5 lite').name == 'v5e' and chips.chip_of('TPU v5').name == 'v5p'
  assert chips.chip_of('cpu') is None


def test_devices_that_are_one_chip_count_once():
  at = lambda kind, platform, **more: types.SimpleNamespace(device_kind=kind, platform=platform, **more)
  cores = [at('TPU v4', 'tpu', slice_index=i, coords=[x, 0, 0]) for i in (0, 1) for x in (0, 1) for _ in 'ab']
  assert chips.count_chips(cores) == 4 and chips.peak_flops(cores) == 4 * 275e12
  assert chips.peak_flops([at('AMD Instinct MI250X', 'gpu', coords=[i]) for i in range(8)]) == 4 * 383e12
  # Processes of one machine may each count from 0.
  assert chips.peak_flops([at('NVIDIA H200', 'gpu', slice_index=0, coords=[0]) for _ in range(8)]) == 8 * 989e12
