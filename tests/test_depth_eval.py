"""Evaluation by depth: one unroll is as good as many, and every number means what its name says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_loop import data, trained
from latent_loop.errors import BadInput
from latent_loop.evals.depth import check_depths, default_depths, make_depth_eval, summarize, table, token_correlation
from latent_loop.model import build
from latent_loop.report import depth_report
from latent_loop.tokenizer import Bytes
from tests.tiny import B, D, T, mesh_of, random_batch, random_params, rows_of, tiny_config, tiny_model

DEPTHS, CHUNK, V = (2, 3, 6), 5, 300  # more tokens than bytes


@pytest.fixture(scope='module')
def given():
  """(model, params, batch, key)."""
  model = tiny_model(**{'model.vocab_size': V})
  return model, random_params(model), random_batch(vocab_size=V), jax.random.key(2)


@pytest.fixture(scope='module')
def sweep(given):
  return make_depth_eval(given[0], mesh_of(), DEPTHS, CHUNK)


@pytest.fixture(scope='module')
def swept(given, sweep):
  return jax.device_get(sweep(*given[1:]))


def test_one_unroll_equals_separate_evaluations(given, swept):
  """All but the KL divergence, whose reference is the deepest depth asked for."""
  model, params, batch, key = given
  mesh = mesh_of()
  evaluate = make_depth_eval(model, mesh, (1,), CHUNK).__wrapped__  # the depths are its last argument
  with jax.set_mesh(mesh):
    alone = [evaluate(params, batch, key, jnp.array([depth])) for depth in DEPTHS]
  for name in ('nll', 'accuracy', 'residual', 'token_correlation'):
    separate = np.array([float(getattr(means, name).value()[0]) for means in alone])
    np.testing.assert_allclose(getattr(swept, name).value(), separate, rtol=1e-5, err_msg=name)
  assert all(float(means.kl_to_deepest.value()[0]) == 0 for means in alone)


def test_every_number_follows_its_definition(given, swept):
  """Loss, accuracy, KL, residual, correlation and bits per byte again, in numpy, from the states of a Python loop."""
  model, params, batch, key = given
  rows, s_BTD = rows_of(batch), model.init_state(key, jnp.arange(B), T)
  apply_core, apply_coda = jax.jit(model.apply_core), jax.jit(model.apply_coda)
  e_BTD = jax.jit(model.embed_input)(params, batch.tokens_BT, rows)
  states = [np.asarray(s_BTD, np.float64)]
  log_p = {}
  for depth in range(1, max(DEPTHS) + 1):
    s_BTD = apply_core(params, s_BTD, e_BTD, rows)
    states.append(np.asarray(s_BTD, np.float64))
    logits_BTV = np.asarray(apply_coda(params, s_BTD, rows), np.float64) @ params['embed']['embedding'].T
    log_p[depth] = logits_BTV - np.log(np.sum(np.exp(logits_BTV), axis=-1, keepdims=True))
  weights_BT, real_BT = batch.weights_BT, batch.segment_ids_BT > 0
  mean = lambda values_BT, weights_BT: np.sum(values_BT * weights_BT) / np.sum(weights_BT)
  got = summarize(swept, DEPTHS)
  close = lambda name, depth, want: np.testing.assert_allclose(got[name][str(depth)], want, rtol=2e-4, atol=1e-7)
  for depth in DEPTHS:
    nll_BT = -np.take_along_axis(log_p[depth], batch.targets_BT[..., None], axis=-1)[..., 0]
    close('loss_by_depth', depth, mean(nll_BT, weights_BT))
    bytes_ = np.sum(weights_BT * (batch.targets_BT < 256))
    assert 0 < bytes_ < np.sum(weights_BT)
    close('bits_per_byte_by_depth', depth, np.sum(nll_BT * weights_BT) / math.log(2) / bytes_)
    close('accuracy_by_depth', depth, mean(log_p[depth].argmax(-1) == batch.targets_BT, weights_BT))
    deepest = log_p[max(DEPTHS)]
    close('kl_to_deepest_by_depth', depth, mean(np.sum(np.exp(deepest) * (deepest - log_p[depth]), -1), weights_BT))
    moved_BT = np.linalg.norm(states[depth] - states[depth - 1], axis=-1) / np.linalg.norm(states[depth], axis=-1)
    close('residual_by_depth', depth, mean(moved_BT, real_BT))
    correlations = [_correlation(*row) for row in zip(states[depth], real_BT, strict=True)]
    close('token_correlation_by_depth', depth, np.mean(correlations))
  assert got['kl_to_deepest_by_depth']['6'] == 0 < got['kl_to_deepest_by_depth']['2']


def _correlation(s_TD: np.ndarray, real_T: np.ndarray) -> float:
  """Sum of the correlations of all pairs of different tokens of a row, over the number of all pairs."""
  pairs = np.corrcoef(s_TD[real_T])
  return (pairs.sum() - np.trace(pairs)) / pairs.size


def test_batches_add_up(given, sweep, swept):
  """The sum of two batches weighs tokens, not batches."""
  _, params, _, key = given
  other = jax.device_get(sweep(params, random_batch(7, vocab_size=V), key))
  both = (swept + other).nll
  np.testing.assert_allclose(both.value(), (swept.nll.total + other.nll.total) / (swept.nll.weight + other.nll.weight))


def test_token_correlation_is_one_for_equal_tokens_and_zero_for_random_ones():
  """Padding is not looked at, and neither are scale and offset of a state."""
  rng, length, rows = np.random.default_rng(0), 400, 3
  random_BTD = rng.standard_normal((rows, length, D)).astype(np.float32)
  equal_BTD = random_BTD[:, :1] * rng.uniform(1, 3, (rows, length, 1)).astype(np.float32) + np.float32(2)
  real_BT = np.ones((rows, length), np.float32)
  correlation = lambda s_BTD, real_BT: float(token_correlation(jnp.asarray(s_BTD), jnp.asarray(real_BT)).value())
  np.testing.assert_allclose(correlation(equal_BTD, real_BT), 1 - 1 / length, rtol=1e-4)
  assert abs(correlation(random_BTD, real_BT)) < 0.01
  half_BT = real_BT * (np.arange(length) < length // 2)
  mixed_BTD = np.where(half_BT[..., None] > 0, equal_BTD, random_BTD)
  np.testing.assert_allclose(correlation(mixed_BTD, half_BT), 1 - 2 / length, rtol=1e-4)


def test_bits_per_byte_are_left_out_where_tokens_are_no_bytes(tmp_path):
  small = {'data.source': 'addition', 'data.seq_len': 40, 'data.max_difficulty': 2, 'train.loss_chunk': 20}
  config = tiny_config(**small, **{'model.vocab_size': 300, 'eval.num_batches': 1})
  source, params = data.make_source(config), random_params(tiny_model(**{'model.vocab_size': 300}))
  model = build(config.model, config.depth)
  evaluate = trained.make_evaluator(config, model, mesh_of(), source, (1, config.depth.mean))
  for size, known in ((Bytes.vocab_size, True), (300, False)):
    source.vocab_size = size
    numbers = evaluate(params, 0)
    assert ('bits_per_byte_by_depth' in numbers) == known
    assert ('-' in table(numbers)[1].split()) != known
    depth_report.write(tmp_path, 'x', numbers, [])
    assert ('bits per byte' in (tmp_path / 'depth_report.html').read_text()) == known


def test_depths_are_sorted_unique_and_checked():
  assert check_depths((8, 2, 2), 6) == (2, 8)
  assert default_depths(6) == (1, 2, 4, 6, 8, 16, 24)
  assert check_depths((4096,), 6) == (4096,) and check_depths((8000,), 2000) == (8000,)
  for depths, mean in (((0, 2), 6), ((-1,), 6), ((4, 4097), 6), ((8001,), 2000)):
    with pytest.raises(BadInput, match=f'--depths={[depth for depth in depths if depth not in (2, 4)][0]}: .* give'):
      check_depths(depths, mean)
