"""Where an engine runs and in which numbers: on a mesh it answers as on one device, in bfloat16 nearly so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_loop.inference.engine import Engine
from latent_loop.inference.speculate import Draft
from latent_loop.inference.wavefront import Wavefront
from latent_loop.model import build
from latent_loop.parallel import sharding
from tests.tiny import assert_same_answers, mesh_of, ragged_requests, random_params, tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def model():
  return tiny_model(**{'model.vocab_size': 6})


@pytest.fixture(scope='module')
def params(model):
  return jax.tree.map(jnp.asarray, random_params(model))


@pytest.fixture(scope='module')
def asked(model, params):
  """Requests, of which some stop early and some are sampled, and the answers of one device."""
  return ragged_requests(Engine(model, params, mesh_of()), temperature=(0.0, 1.0))


@pytest.mark.parametrize(
  'sizes, way', [((2, 1, 2), 'in step'), ((1, 2, 2), 'continuous'), ((2, 1, 2), 'speculate'), ((1, 1, 2), 'parallel')]
)
def test_a_mesh_answers_as_one_device_does(model, params, asked, sizes, way):
  """Rows over data and fsdp, heads and vocabulary over tensor."""
  (requests, want), options = asked, {}
  if way == 'speculate':  # sampled drafts have their own draws
    options = {'speculate': Draft(2, 3)}
    requests, want = requests[:4], want[:4]
  if way == 'parallel':  # its cache is shared, so it is compared with itself
    options = {'wavefront': Wavefront(4, 2), 'cache': 'ring:1'}
    want = Engine(model, params, mesh_of(), **options).answer(requests)
  mesh = mesh_of(*sizes)
  engine = Engine(model, jax.device_put(params, sharding.shardings(params, mesh)), mesh, **options)
  split = [leaf for leaf in jax.tree.leaves(engine.params) if not leaf.sharding.is_fully_replicated]
  assert len(split) > 10, 'the weights are not split'
  assert_same_answers(engine.answer_flying(requests, 3) if way == 'continuous' else engine.answer(requests), want)


def test_bfloat16_says_nearly_what_float32_says(model, params, asked):
  """Greedy rows, up to the first token that the two choose differently."""
  requests, want = asked
  half = build(dataclasses.replace(model.cfg, compute_dtype='bfloat16'), model.depth)
  got = Engine(half, params, mesh_of()).answer(requests)
  compared = 0
  for a, b in zip(got[:4], want[:4], strict=True):
    same = 0
    while same < min(len(a.tokens), len(b.tokens)) and a.tokens[same] == b.tokens[same]:
      same += 1
    np.testing.assert_allclose(a.log_probs[:same], b.log_probs[:same], rtol=0, atol=0.1)
    compared += same
  assert compared >= 10
  assert got != want, 'computed in float32'
