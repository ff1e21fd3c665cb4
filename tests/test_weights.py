"""Gather once: the step's collectives stand where the config says, and cost what depth does not change."""

import functools

import jax
import numpy as np
import pytest

from latent_loop.model import build
from latent_loop.model.depth_loop import LOOP_SCOPE
from latent_loop.optim import make_optimizer
from latent_loop.parallel import sharding
from latent_loop.planner import hlo
from latent_loop.step import make_sharded_state, make_train_step
from tests.tiny import B, D, T, mesh_of, random_batch, start_state, tiny_config, worst_relative

# No norms, no clipping: what the optimizer adds is not the subject.
PLAIN = {'optim.clip_norm': None, 'train.num_microbatches': 1}
MODES = ('gather_once', 'gather_per_microbatch', 'gather_per_iteration')
SPLITS = {'data': (8, 1, 1), 'fsdp': (1, 8, 1), 'data_x_fsdp': (2, 4, 1)}
CASES = [pytest.param(name, marks=() if name == 'data_x_fsdp' else pytest.mark.slow) for name in SPLITS]


def step_of(sizes, overrides):
  config = tiny_config(**{**PLAIN, **overrides})
  model, mesh = build(config.model, config.depth), mesh_of(*sizes)
  optimizer = make_optimizer(config.optim, config.train.num_steps)
  _, specs = make_sharded_state(config, model, optimizer, mesh)
  step = make_train_step(config, model, optimizer, mesh, specs)
  rows = config.train.batch_size
  batch = jax.device_put(random_batch(rows=rows), jax.NamedSharding(mesh, sharding.BATCH))
  return step, (jax.device_put(start_state(config, model, optimizer), specs), batch, jax.random.key(7)), mesh


@functools.cache
def compiled(sizes, **overrides):
  step, args, mesh = step_of(sizes, overrides)
  program = step.lower(*args).compile()
  return program, hlo.collectives(program.as_text(), mesh)


def in_loops(found):
  return [c for c in found if c.inside(LOOP_SCOPE) and c.size_bytes > 1024]


def total(found, n):
  return sum(c.bytes_per_step(n) for c in found)


@pytest.mark.parametrize('split', CASES)
def test_gather_once_leaves_no_collective_in_the_depth_loops_and_no_byte_to_depth(split):
  _, found = compiled(SPLITS[split])
  assert in_loops(found) == []
  assert total(found, 4) == total(found, 64) > 0


def test_gather_per_iteration_is_the_control():
  _, found = compiled(SPLITS['data_x_fsdp'], **{'mesh.weights': 'gather_per_iteration'})
  kinds = {c.kind for c in in_loops(found)}
  assert {'all-gather', 'reduce-scatter'} <= kinds
  _, once = compiled(SPLITS['data_x_fsdp'])
  assert total(found, 64) > total(found, 4) > total(once, 4)


@pytest.mark.slow
def test_with_microbatches_whole_weights_are_gathered_once_or_once_each():
  count = 2
  sizes = {'train.num_microbatches': count, 'train.batch_size': 2 * B}
  _, once = compiled(SPLITS['data_x_fsdp'], **sizes)
  _, each = compiled(SPLITS['data_x_fsdp'], **sizes, **{'mesh.weights': 'gather_per_microbatch'})
  gathered = lambda found: total([c for c in found if c.kind == 'all-gather'], 0)
  assert in_loops(once) == in_loops(each) == []
  assert gathered(each) == count * gathered(once) > 0


@pytest.mark.slow
def test_a_tensor_axis_reduces_activations_inside_the_loops_and_weights_outside():
  _, found = compiled((2, 2, 2))
  inside = in_loops(found)
  assert inside and all(c.axes == ('tensor',) and c.kind == 'all-reduce' for c in inside)


@pytest.mark.slow
def test_memory_grows_by_a_state_per_iteration_with_gradient_and_not_with_depth():
  """The slope between k = 4 and k = 8, whatever the mean; the batch lies on one device."""
  temp = lambda k, mean: (
    compiled((1, 1, 1), **{'depth.backprop_depth': k, 'depth.mean': mean})[0].memory_analysis().temp_size_in_bytes
  )
  state = B * T * D * 4
  slope = (temp(8, 8) - temp(4, 8)) / 4
  assert 0.9 * state < slope < 1.5 * state
  assert temp(4, 64) == temp(4, 8)


@pytest.mark.slow
@pytest.mark.parametrize('mode', MODES[1:])
def test_modes_compute_the_same_step(mode):
  want_step, args, _ = step_of(SPLITS['data_x_fsdp'], {'mesh.weights': 'gather_once'})
  got_step, same, _ = step_of(SPLITS['data_x_fsdp'], {'mesh.weights': mode})
  (want_state, want), (got_state, got) = want_step(*args), got_step(*same)
  np.testing.assert_allclose(got['loss'], want['loss'], rtol=1e-6)
  mu = lambda state: state.opt_state[0][0].mu  # of the first step: the gradient, times a constant
  assert worst_relative(mu(got_state), mu(want_state))[0] < 1e-5
  for _ in range(4):
    (want_state, want), (got_state, got) = want_step(want_state, *args[1:]), got_step(got_state, *same[1:])
    np.testing.assert_allclose(got['loss'], want['loss'], rtol=1e-5)
