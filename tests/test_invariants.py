"""Theorems: what must hold of the model, the step and the loop whatever the numbers are. All in float32."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from latent_loop import exit_codes, loop
from latent_loop.batch import Batch
from latent_loop.config import DepthConfig
from latent_loop.model import Model, build, depth
from latent_loop.model.layers import Rows
from latent_loop.optim import make_optimizer
from latent_loop.parallel import sharding
from latent_loop.step import chunked_loss, make_sharded_state, make_train_step
from latent_loop.trained import place
from tests.tiny import (
  B,
  D,
  K,
  T,
  V,
  assert_same_bits,
  leaves_by_path,
  mesh_of,
  random_batch,
  random_params,
  rows_of,
  start_state,
  tiny_config,
  tiny_model,
  worst_relative,
)

# --- the model -----------------------------------------------------------------------------------------


def random_state(seed: int = 0, rows: int = B, seq_len: int = T) -> jax.Array:
  return jnp.float32(np.random.default_rng(seed).standard_normal((rows, seq_len, D)))


@functools.cache
def pullback(model: Model):
  """(params, s, batch, n, k, c) -> (y, gradient of <y, c> in the parameters and in s), through the production loop."""

  @jax.jit
  def run(params, s_BTD, batch, n, k, c_BTD):
    forward = lambda params, s: model.forward(params, s, batch.tokens_BT, rows_of(batch), n, k)
    y_BTD, pull = jax.vjp(forward, params, s_BTD)
    return y_BTD, *pull(c_BTD)

  return run


@functools.cache
def jitted_parts(model: Model):
  return jax.jit(model.embed_input), jax.jit(model.apply_core), jax.jit(model.apply_coda)


def unrolled(model: Model, params, s_BTD, batch: Batch, n: int, k: int, cut: bool = True) -> jax.Array:
  """The definition: a Python loop over the core, the gradient cut after the first n."""
  embed_input, apply_core, apply_coda = jitted_parts(model)
  rows = rows_of(batch)
  e_BTD = embed_input(params, batch.tokens_BT, rows)
  for _ in range(n):
    s_BTD = apply_core(params, s_BTD, e_BTD, rows)
  s_BTD = jax.lax.stop_gradient(s_BTD) if cut else s_BTD
  for _ in range(k):
    s_BTD = apply_core(params, s_BTD, e_BTD, rows)
  return apply_coda(params, s_BTD, rows)


def unrolled_gradient(model: Model, params, s_BTD, batch: Batch, n: int, k: int, c_BTD, cut: bool = True):
  y_BTD, pull = jax.vjp(lambda p: unrolled(model, p, s_BTD, batch, n, k, cut), params)
  return y_BTD, pull(c_BTD)[0]


@pytest.mark.parametrize('n, k', [(2, 3), (4, 2), (0, 1), (0, 3)])
def test_gradient_is_that_of_the_unrolled_model_cut_at_the_same_place(n, k):
  """Also for k < backprop_depth, where iterations are masked; the state before the cut gets exactly none."""
  model, batch, s_BTD, c_BTD = tiny_model(), random_batch(), random_state(1), random_state(2)
  params = random_params(model)
  y_BTD, got, s_gradient = pullback(model)(params, s_BTD, batch, n, k, c_BTD)
  want_y, want = unrolled_gradient(model, params, s_BTD, batch, n, k, c_BTD)
  np.testing.assert_allclose(y_BTD, want_y, rtol=1e-4, atol=1e-5)
  assert worst_relative(got, want) < (2e-5, '')
  assert not np.any(s_gradient)


def test_gradient_is_full_backpropagation_without_cut_iterations_and_is_not_with_them():
  model, batch, s_BTD, c_BTD = tiny_model(), random_batch(), random_state(1), random_state(2)
  params = random_params(model)
  _, whole, _ = pullback(model)(params, s_BTD, batch, 0, K, c_BTD)
  _, want = unrolled_gradient(model, params, s_BTD, batch, 0, K, c_BTD, cut=False)
  assert worst_relative(whole, want) < (2e-5, '')
  _, truncated, _ = pullback(model)(params, s_BTD, batch, 2, K, c_BTD)
  _, want = unrolled_gradient(model, params, s_BTD, batch, 2, K, c_BTD, cut=False)
  assert worst_relative(truncated, want)[0] > 0.01


@pytest.mark.parametrize('place', [0, 4, T - 1])
def test_causality_by_gradient(place):
  """The gradient of y at one place in the embedding of every later token, and of every other document, is exactly 0."""
  model = tiny_model()
  tokens_BT = np.stack([np.random.default_rng(row).permutation(V)[:T] for row in range(B)]).astype(np.int32)
  segment_ids_BT = np.broadcast_to(np.repeat([1, 2], [3, T - 3]), (B, T))
  positions_BT = np.broadcast_to(np.r_[np.arange(3), np.arange(T - 3)], (B, T))
  batch = Batch(tokens_BT, tokens_BT, np.ones((B, T), np.float32), positions_BT, segment_ids_BT)
  c_BTD = np.zeros((B, T, D), np.float32)
  c_BTD[1, place] = random_state(3)[1, place]
  _, gradient, _ = pullback(model)(random_params(model), random_state(1), batch, 2, 2, jnp.asarray(c_BTD))
  size_V = np.linalg.norm(gradient['embed']['embedding'], axis=-1)
  seen_T = (np.arange(T) <= place) & (segment_ids_BT[1] == segment_ids_BT[1, place])
  assert np.all(size_V[tokens_BT[1][seen_T]] > 0)
  unseen = np.setdiff1d(np.arange(V), tokens_BT[1][seen_T])
  assert not np.any(size_V[unseen]), 'the later places of its own row, other documents, and all other rows'


def test_causality_by_value():
  """Other tokens after a place change no bit at it: this reaches the iterations without gradient too."""
  model, batch = tiny_model(), random_batch()
  params, changed = random_params(model), batch.tokens_BT.copy()
  changed[:, 6:] = (changed[:, 6:] + 1) % V
  run = lambda tokens: pullback(model)(
    params, random_state(1), Batch(**{**vars(batch), 'tokens_BT': tokens}), 5, 1, random_state(2)
  )[0]
  before, after = np.asarray(run(batch.tokens_BT)), np.asarray(run(changed))
  assert before[:, :6].tobytes() == after[:, :6].tobytes()
  assert np.all(np.any(before[:, 6:] != after[:, 6:], axis=-1))


@functools.cache
def jitted_advance(model: Model):
  return jax.jit(model.advance)


@pytest.mark.parametrize('a, b', [(0, 4), (1, 3), (5, 2)])
def test_depth_splits(a, b):
  """R applied a times and then b times is R applied a + b times, to the bit."""
  model, rows, s_BTD, e_BTD = tiny_model(), rows_of(random_batch()), random_state(1), random_state(2)
  params, advance = random_params(model), jitted_advance(model)
  parts = advance(params, advance(params, s_BTD, e_BTD, rows, a), e_BTD, rows, b)
  np.testing.assert_array_equal(parts, advance(params, s_BTD, e_BTD, rows, a + b))


def test_advance_compiles_once_for_every_depth():
  model, rows, s_BTD = tiny_model(), rows_of(random_batch()), random_state(1)
  params, advance = random_params(model), jitted_advance(model)
  ends = [advance(params, s_BTD, s_BTD, rows, count) for count in range(12)]
  assert advance._cache_size() == 1
  assert len({np.asarray(s_BTD).tobytes() for s_BTD in ends}) == 12


def test_rematerialization_changes_nothing():
  """remat none = iteration = block, value and gradient, also where fewer iterations are drawn than are compiled."""
  batch, s_BTD, c_BTD = random_batch(), random_state(1), random_state(2)
  models = {remat: tiny_model(**{'model.remat': remat}) for remat in ('none', 'iteration', 'block')}
  run = {remat: pullback(model) for remat, model in models.items()}
  for n, k in ((2, K), (0, 1)):
    results = {
      remat: run[remat](random_params(model), s_BTD, batch, n, k, c_BTD)[:2] for remat, model in models.items()
    }
    for remat in ('iteration', 'block'):
      assert worst_relative(results[remat], results['none']) < (5e-6, ''), (remat, n, k)


def temporaries(remat: str, kind: str) -> int:
  """Bytes that a step needs beside its arguments, with depths drawn by `kind`."""
  step, state, batch, key = step_and_inputs(
    tiny_config(**{'model.remat': remat, 'depth.kind': kind, 'train.num_microbatches': 1})
  )
  return step.lower(state, batch, key).compile().memory_analysis().temp_size_in_bytes


def test_a_drawn_depth_takes_no_more_memory_than_a_fixed_one_and_rematerialization_takes_less():
  """Behind branches, what the backward pass might read took almost three times as much; with them remat saved a sixth
  for iterations and nothing for blocks."""
  drawn = temporaries('none', 'poisson_lognormal')
  assert drawn < 1.1 * temporaries('none', 'fixed')
  assert all(temporaries(remat, 'poisson_lognormal') < 0.7 * drawn for remat in ('iteration', 'block'))


def test_rotary_angles_are_computed_once_in_a_step():
  """Not in every layer, iteration and pass: on a CPU a tenth of an iteration went there."""
  step, state, batch, key = step_and_inputs(tiny_config(**{'train.num_microbatches': 1}))
  text = step.lower(state, batch, key).compile().as_text()
  assert len(re.findall(r' cosine\(', text)) == 1


def step_and_inputs(config):
  model, mesh = build(config.model, config.depth), mesh_of(1, 1, 1)
  optimizer = make_optimizer(config.optim, config.train.num_steps)
  _, specs = make_sharded_state(config, model, optimizer, mesh)
  step = make_train_step(config, model, optimizer, mesh, specs)
  return step, start_state(config, model, optimizer), random_batch(rows=config.train.batch_size), jax.random.key(7)


# --- documents, padding, noise --------------------------------------------------------------------------


def token_losses(model: Model, params, s_BTD, tokens_BT, targets_BT, rows: Rows) -> jax.Array:
  y_BTD = model.forward(params, s_BTD, tokens_BT, rows, jnp.int32(1), jnp.int32(2))
  return optax.softmax_cross_entropy_with_integer_labels(model.scores(params, y_BTD), targets_BT)


def test_a_document_does_not_know_its_neighbors():
  """Loss of each token in a packed row = its loss alone in a row of just its document, with the same s_0."""
  model, lengths = tiny_model(), (3, 5, 2)
  params, rng = random_params(model), np.random.default_rng(0)
  tokens_BT, targets_BT = rng.integers(0, V, (2, 2, T))
  positions_BT = np.broadcast_to(np.concatenate([np.arange(length) for length in lengths]), (2, T))
  segment_ids_BT = np.broadcast_to(np.repeat([1, 2, 3], lengths), (2, T))
  s_BTD = random_state(1, rows=2)
  run = jax.jit(functools.partial(token_losses, model))
  packed = run(params, s_BTD, tokens_BT, targets_BT, Rows(jnp.asarray(positions_BT), jnp.asarray(segment_ids_BT)))
  start = 0
  for length in lengths[:2]:
    own = slice(start, start + length)
    rows = Rows(jnp.broadcast_to(jnp.arange(length)[None], (2, length)), None)
    alone = run(params, s_BTD[:, own], tokens_BT[:, own], targets_BT[:, own], rows)
    np.testing.assert_allclose(packed[:, own], alone, rtol=2e-5)
    start += length


def test_padding_is_neutral():
  """Padding at the end of rows and a row of nothing else: same loss, same gradients, whatever the padding token."""
  model = tiny_model(**{'model.num_prelude_layers': 0, 'model.num_coda_layers': 0})
  cfg = tiny_config(**{'train.loss_chunk': T, 'train.z_loss': 0.01}).train
  params, short = random_params(model), T - 3
  plain = random_batch(4, rows=3, seq_len=short)

  @jax.jit
  def loss_and_gradient(params, s_BTD, batch):
    def loss(params):
      y_BTD = model.forward(params, s_BTD, batch.tokens_BT, rows_of(batch), jnp.int32(1), jnp.int32(2))
      return chunked_loss(model, params, y_BTD, batch, cfg).value()

    return jax.value_and_grad(loss)(params)

  def padded(token: int) -> Batch:
    wide = {name: np.pad(x, ((0, 1), (0, T - short))) for name, x in vars(plain).items()}
    added = np.pad(np.zeros_like(plain.tokens_BT), ((0, 1), (0, T - short)), constant_values=1) == 1
    wide['tokens_BT'] = np.where(added, token, wide['tokens_BT'])
    wide['targets_BT'] = np.where(added, token, wide['targets_BT'])
    return Batch(**wide)

  s_BTD = random_state(1, rows=4)
  want = loss_and_gradient(params, s_BTD[:3, :short], plain)
  for token in (0, 7, V - 1):
    got = loss_and_gradient(params, s_BTD, padded(token))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert worst_relative(got[1], want[1]) < (1e-5, ''), token


def test_initial_state_depends_only_on_key_and_global_index():
  """Rows of a batch of 8 are the rows of batches of 2 with those ids; a shorter row is the beginning of a longer."""
  draw, key = jax.jit(tiny_model().init_state, static_argnums=2), jax.random.key(5)
  whole = np.asarray(draw(key, jnp.arange(B), T))
  for first in range(0, B, 2):
    np.testing.assert_array_equal(draw(key, jnp.arange(first, first + 2), T), whole[first : first + 2])
  np.testing.assert_array_equal(draw(key, jnp.array([6]), T - 4)[0], whole[6, : T - 4])
  assert len({row.tobytes() for row in whole}) == B
  assert not np.array_equal(draw(jax.random.key(6), jnp.arange(2), T)[0], whole[0])


@pytest.mark.parametrize('sizes', [(4, 2, 1), (2, 1, 4)])
def test_initial_state_is_the_same_on_every_mesh(sizes):
  model, key, mesh = tiny_model(), jax.random.key(5), mesh_of(*sizes)
  draw = lambda: model.init_state(key, jnp.arange(B), T)
  sharded = jax.jit(draw, out_shardings=NamedSharding(mesh, sharding.BATCH))()
  np.testing.assert_array_equal(sharded, jax.jit(draw)())


# --- the loss --------------------------------------------------------------------------------------------


@jax.jit
def whole_loss(embedding_VD, y_BTD, batch, z_loss):
  """(loss on whole logits, its gradient in the embedding and in y)."""

  def loss(embedding_VD, y_BTD):
    logits_BTV = jnp.einsum('BTD,VD->BTV', y_BTD, embedding_VD)
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch.targets_BT)
    loss_BT += z_loss * jax.nn.logsumexp(logits_BTV, axis=-1) ** 2
    return jnp.sum(loss_BT * batch.weights_BT) / jnp.sum(batch.weights_BT)

  return jax.value_and_grad(loss, (0, 1))(embedding_VD, y_BTD)


@pytest.mark.parametrize('chunk, z_loss', [(2, 0.03), (5, 0.0), (5, 0.03), (100, 0.03)])
def test_chunked_loss_is_the_loss_on_whole_logits(chunk, z_loss):
  """Value and gradients, in the output state and in the tied embedding, at every chunk size."""
  model, batch, y_BTD = tiny_model(), random_batch(), random_state(1)
  params, cfg = random_params(model), tiny_config(**{'train.loss_chunk': chunk, 'train.z_loss': z_loss}).train

  def chunked(embedding_VD, y_BTD):
    return chunked_loss(model, {**params, 'embed': {'embedding': embedding_VD}}, y_BTD, batch, cfg).value()

  embedding_VD = params['embed']['embedding']
  value, gradients = jax.jit(jax.value_and_grad(chunked, (0, 1)))(embedding_VD, y_BTD)
  want_value, want_gradients = whole_loss(embedding_VD, y_BTD, batch, z_loss)
  np.testing.assert_allclose(value, want_value, rtol=1e-6)
  assert worst_relative(gradients, want_gradients) < (1e-5, '')


# --- the step --------------------------------------------------------------------------------------------

# eps bounds how much AdamW can enlarge the noise of a gradient near 0; at this rate a wrong gradient of the
# usual size moves a parameter by 1e-2, ten thousand times the tolerance on the next parameters.
STEP = {
  'model.num_prelude_layers': 0,  # the same block as the core's, and a third of the time to compile
  'model.num_coda_layers': 0,
  'optim.learning_rate': 1e-2,
  'optim.eps': 1e-3,
  'optim.ema_decay': 0.9,
  'train.z_loss': 1e-3,
}


def record() -> optax.GradientTransformation:
  """Passes gradients on and keeps them in the optimizer state, where a test can read them."""
  return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, s, p=None: (g, g))


@functools.cache
def step_on(data: int = 1, fsdp: int = 1, tensor: int = 1, num_microbatches: int = 1):
  """(the production step on a mesh, its first state on the host, shardings, mesh)."""
  config = tiny_config(**STEP, **{'train.num_microbatches': num_microbatches})
  model, mesh = build(config.model, config.depth), mesh_of(data, fsdp, tensor)
  optimizer = optax.chain(record(), make_optimizer(config.optim, config.train.num_steps))
  state = start_state(config, model, optimizer)
  specs = sharding.shardings(jax.eval_shape(lambda: state), mesh)
  return make_train_step(config, model, optimizer, mesh, specs), state, specs, mesh


def take_steps(made, count: int, first_batch: int = 0) -> list:
  """(metrics, state on the host) after each of `count` steps on different batches."""
  step, state, specs, mesh = made
  state, results = jax.device_put(state, specs), []
  for i in range(count):
    state, metrics = step(state, place(random_batch(first_batch + i), mesh), jax.random.key(11))
    results.append(jax.device_get((metrics, state)))  # waits: steps in flight deadlock on virtual devices
  return results


@functools.cache
def reference_steps():
  return take_steps(step_on(), 2)


def assert_same_steps(got: list, want: list) -> None:
  for (metrics, state), (want_metrics, want_state) in zip(got, want, strict=True):
    assert (metrics['n'], metrics['k']) == (want_metrics['n'], want_metrics['k'])
    for name in ('loss', 'grad_norm', 'learning_rate'):
      np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-6, err_msg=name)
    assert worst_relative(state.opt_state[0], want_state.opt_state[0]) < (1e-5, ''), 'gradients'
    for part in ('params', 'ema'):
      params, want_params = leaves_by_path(getattr(state, part)), leaves_by_path(getattr(want_state, part))
      for name in want_params:
        np.testing.assert_allclose(params[name], want_params[name], rtol=0, atol=1e-6, err_msg=f'{part}/{name}')


@pytest.mark.parametrize(
  'sizes',
  [(8, 1, 1), (2, 2, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(1, 8, 1), (2, 1, 4)])],
  ids=lambda s: 'x'.join(map(str, s)),
)
def test_one_device_is_eight(sizes):
  """Loss, every gradient, the next parameters and their average, two steps on, are those of one device."""
  want = reference_steps()
  assert max(metrics['n'] for metrics, _ in want) > 0
  moved = worst_relative(want[0][1].params, step_on()[1].params)[0]
  assert moved > 1e-3, 'the check of the next parameters must not be empty'
  made = step_on(*sizes)
  assert_same_steps(take_steps(made, 2), want)
  assert made[0].compiled_count() == 1


def test_accumulation_over_microbatches_is_the_whole_batch():
  """Four interleaved parts on each of two devices = one batch on one."""
  assert_same_steps(take_steps(step_on(data=2, num_microbatches=4), 2), reference_steps())


def test_train_step_compiles_once_over_ten_depths():
  """And the depths are those of the step and the key, whatever is in the batches."""
  made = step_on()
  depths = [(int(metrics['n']), int(metrics['k'])) for metrics, _ in take_steps(made, 30)]
  assert len({n + k for n, k in depths}) >= 10, depths
  assert made[0].compiled_count() == 1
  assert [(metrics['n'], metrics['k']) for metrics, _ in take_steps(made, 5, first_batch=50)] == depths[:5]


def test_step_is_a_function_of_its_arguments():
  """Twice the same call, twice the same bits."""
  for (metrics, state), (again_metrics, again_state) in zip(take_steps(step_on(), 2), reference_steps(), strict=True):
    assert_same_bits(state, again_state)
    assert_same_bits(metrics, again_metrics)


def test_step_donates_the_old_state():
  step, host, specs, mesh = step_on()
  state = jax.device_put(host, specs)
  new, _ = step(state, place(random_batch(), mesh), jax.random.key(11))
  used = (state.params, state.ema, state.step, state.opt_state[1:])  # [0] is the test's own record
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(used))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


# --- how deep ---------------------------------------------------------------------------------------------

LAWS = {  # law -> (mean, variance) of the depth at mean 6 and sigma 0.5, from the textbook
  'poisson_lognormal': (1 + 6.0, 6 + 36 * (np.exp(0.25) - 1)),
  'poisson': (6 + np.exp(-6), 6 + 36 + np.exp(-6) - (6 + np.exp(-6)) ** 2),
  'uniform': (6.0, (11**2 - 1) / 12),
  'fixed': (6.0, 0.0),
}


@functools.cache
def drawer(cfg: DepthConfig):
  return jax.jit(jax.vmap(lambda key, step: depth.draw(cfg, jax.random.fold_in(key, step), step), (None, 0)))


def draw_many(cfg: DepthConfig, steps=range(20_000), seed: int = 0) -> np.ndarray:
  """Rows n and k, a column for each step, drawn as the train step draws."""
  return np.array(drawer(cfg)(jax.random.key(seed), jnp.asarray(steps, jnp.int32)))


@pytest.mark.parametrize('kind', depth.LAWS)
def test_depth_law_has_the_moments_of_the_textbook(kind):
  """Mean and variance of 20 000 draws within three standard errors; every n and k in its range."""
  cfg = DepthConfig(kind=kind, mean=6, backprop_depth=4)
  n, k = draw_many(cfg, seed=1)
  r, count, (mean, variance) = (n + k).astype(np.float64), len(n), LAWS[kind]
  assert abs(r.mean() - mean) <= 3 * np.sqrt(variance / count) + 1e-9
  spread = np.sqrt(max(np.mean((r - mean) ** 4) - variance**2, 0) / count)
  assert abs(r.var() - variance) <= 3 * spread + 1e-9
  np.testing.assert_allclose(depth.expected(cfg), mean, rtol=1e-12)
  assert np.all(n >= 0) and np.all((1 <= k) & (k <= 4))
  assert np.all(k[n > 0] == 4), 'iterations go without gradient only when k is full'


def test_depth_is_a_function_of_key_and_step():
  cfg = DepthConfig(mean=6, backprop_depth=4)
  first = draw_many(cfg)
  np.testing.assert_array_equal(first, draw_many(cfg))
  np.testing.assert_array_equal(first[:, ::-1], draw_many(cfg, range(20_000)[::-1]))
  assert not np.array_equal(first, draw_many(cfg, seed=1))


@pytest.mark.parametrize('curriculum', ['linear', 'one_minus_sqrt'])
def test_curriculum_starts_shallow_and_ends_at_the_full_law(curriculum):
  """From the last step of the curriculum on, draw for draw what the law without one gives."""
  full, steps = DepthConfig(kind='uniform', mean=6, backprop_depth=4), 10_000
  n, k = grown = draw_many(dataclasses.replace(full, curriculum=curriculum, curriculum_steps=steps))
  np.testing.assert_array_equal(grown[:, steps - 1 :], draw_many(full)[:, steps - 1 :])
  means = (n + k)[:steps].reshape(5, -1).mean(axis=1)
  assert means[0] < means[2] < means[4], means
  assert n[:400].mean() + k[:400].mean() < 3 and np.all(k[:400] == 1)


def test_curriculum_grows_mean_and_k_together():
  """Linear over 8 steps to mean 40 and k = 8: an eighth of both more at each step, complete at the eighth."""
  cfg = DepthConfig(kind='fixed', mean=40, backprop_depth=8, curriculum='linear', curriculum_steps=8)
  n, k = draw_many(cfg, range(10))
  np.testing.assert_array_equal(k, [1, 2, 3, 4, 5, 6, 7, 8, 8, 8])
  np.testing.assert_array_equal(n, 4 * k)


_PRINT_DRAWS = """
import jax, json
from latent_loop.config import DepthConfig
from latent_loop.model import depth
cfg, key = DepthConfig(mean=6, backprop_depth=4), jax.random.key(0)
draw = jax.jit(lambda step: depth.draw(cfg, jax.random.fold_in(key, step), step))
print(json.dumps([[int(x) for x in draw(step)] for step in range(20)]))
"""


def test_depths_are_the_same_in_another_process():
  """A fresh interpreter, with one device, draws what this one draws."""
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')
  environment = {**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(Path(__file__).parents[1])}
  command = [sys.executable, '-c', _PRINT_DRAWS]
  done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
  assert done.returncode == 0, done.stderr
  np.testing.assert_array_equal(json.loads(done.stdout), draw_many(DepthConfig(mean=6, backprop_depth=4))[:, :20].T)


# --- the loop ----------------------------------------------------------------------------------------------

RUN = {
  'model.vocab_size': 264,
  'model.num_prelude_layers': 0,
  'model.num_coda_layers': 0,
  'optim.ema_decay': 0.9,
  'data.source': 'addition',
  'data.max_difficulty': 2,
  'data.seq_len': 20,
  'train.num_steps': 8,
  'mesh.data': 2,
  'mesh.fsdp': 2,
  'mesh.tensor': 2,
  'checkpoint.every_steps': 3,
  'checkpoint.keep_last': 9,
  'log.every_steps': 1,
}


_made: dict = {}


def once(make):
  """`make`, called the first time only: all runs of this module have one config, hence the same programs."""

  def made(*args):
    if make.__name__ not in _made:
      _made[make.__name__] = make(*args)
    return _made[make.__name__]

  return made


def start(workdir: Path, at: int | None = None, act=None) -> int | None:
  """loop.run; `act` is called ahead of step `at`. None: it was killed."""
  prepare, make_step, runs = loop.prepare, once(loop.make_train_step), []

  def prepare_and_remember(*args):
    runs.append(prepare(*args))
    return runs[-1]

  def make_spoiled_step(*args):
    step = make_step(*args)

    def run(state, batch, key):
      if int(state.step) == at:
        act()
      return step(state, batch, key)

    return run

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'prepare', prepare_and_remember)
    patch.setattr(loop, 'make_sharded_state', once(loop.make_sharded_state))
    patch.setattr(loop, 'make_train_step', make_spoiled_step)
    patch.setattr(loop, 'finish', lambda this: None)
    try:
      return loop.run(tiny_config(**RUN), workdir)
    except KeyboardInterrupt:
      runs[-1].checkpoints.close()  # in a real process the save under way dies, or has ended
      return None


def history(workdir: Path) -> list:
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return [[line[name] for name in ('step', 'loss', 'grad_norm', 'n', 'k', 'batch_hash')] for line in lines]


def kill():
  raise KeyboardInterrupt


def terminate():
  signal.raise_signal(signal.SIGTERM)


def test_resuming_equals_never_stopping(tmp_path):
  """Killed just after a save, killed between two saves, stopped by a signal, at last left alone: parameters,
  optimizer, average and every logged number are those of a run without interruption, to the bit."""
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  assert start(whole) == exit_codes.DONE
  assert [line[0] for line in history(whole)] == list(range(1, 9))
  assert start(broken, 3, kill) is None
  assert [line[0] for line in history(broken)] == [1, 2, 3]
  assert start(broken, 5, kill) is None
  assert start(broken, 4, terminate) == exit_codes.PREEMPTED
  assert (broken / 'checkpoints' / '5').is_dir()
  assert start(broken) == exit_codes.DONE
  assert history(broken) == history(whole)
  ends = [loop.prepare(tiny_config(**RUN), workdir) for workdir in (broken, whole)]
  assert [end.start for end in ends] == [8, 8]
  assert_same_bits(ends[0].state, ends[1].state)
  for end in ends:
    end.checkpoints.close()


def test_a_save_comes_before_the_evaluation_of_its_step(tmp_path, monkeypatch):
  """An evaluation that runs out of memory must not cost the steps before it."""
  monkeypatch.setitem(RUN, 'eval.every_steps', 3)
  monkeypatch.setattr(loop, 'evaluate', lambda *args: kill())
  assert start(tmp_path / 'run') is None
  assert sorted(path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()) == ['3']


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(tmp_path, monkeypatch):
  """Killed between the save of a step and its evaluation, and stopped by a signal at such a step."""
  monkeypatch.setitem(RUN, 'eval.every_steps', 3)
  done, evaluating = [], lambda this, step: done.append(step) or {'step': step}
  monkeypatch.setattr(loop.alarms, 'sentences', lambda *args: [])
  monkeypatch.setattr(loop.alarms, 'readable', lambda numbers: True)  # these are no whole evaluations
  monkeypatch.setattr(loop, 'evaluate', lambda *args: kill())
  assert start(tmp_path / 'run') is None
  monkeypatch.setattr(loop, 'evaluate', evaluating)
  assert start(tmp_path / 'run', 5, terminate) == exit_codes.PREEMPTED
  assert done == [3]
  shutil.copytree(tmp_path / 'run', tmp_path / 'evaluated')
  (tmp_path / 'evaluated' / 'evals.jsonl').write_text('{"step": 6}\n')
  assert start(tmp_path / 'evaluated') == exit_codes.DONE and done == [3], 'no second time'
  assert start(tmp_path / 'run') == exit_codes.DONE and done == [3, 6]
