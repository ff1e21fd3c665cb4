"""The parallel sampler: with nothing settling early it is plain decoding; whatever settles, rows are rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_loop.benchmark import Compiles
from latent_loop.errors import BadInput
from latent_loop.inference.engine import Engine, ExitRule, Request, asks_of
from latent_loop.inference.speculate import Draft
from latent_loop.inference.wavefront import Wavefront, seen_so_far
from tests.tiny import D, assert_same_answers, mesh_of, ragged_requests, random_params, tiny_model

VOCAB, WIDTH = 5, 3
PLAIN = Wavefront(WIDTH, inner=4, threshold=0.0)


@pytest.fixture(scope='module')
def engine_of():
  model = tiny_model(**{'model.vocab_size': VOCAB})
  params = random_params(model)
  params['injection']['kernel'][:D] *= 0.3  # the state's half: iterations come to rest at one point
  params = jax.tree.map(jnp.asarray, params)
  return lambda wavefront, cache='ring:1', **options: Engine(
    model, params, mesh_of(), cache, wavefront=wavefront, **options
  )


@pytest.fixture(scope='module')
def plain(engine_of):
  """Requests of all kinds, of which some stop early, and their plain answers."""
  return ragged_requests(engine_of(None), temperature=(0.0, 1.0))


@pytest.mark.parametrize('inner,momentum', [(1, 0.0), (4, 0.3), (9, 0.0)])
def test_a_front_in_which_nothing_settles_early_is_plain_decoding(engine_of, plain, inner, momentum):
  """Greedy and sampled rows of different depths, limits, stops and penalties, whatever a step is."""
  got = engine_of(dataclasses.replace(PLAIN, inner=inner, momentum=momentum)).answer(plain[0])
  assert_same_answers(got, plain[1])
  assert {a.finish for a in got} == {'stop', 'length'}
  for request, answer in zip(plain[0], got, strict=True):
    assert answer.steps == (len(answer.tokens) - 1) * -(-request.depth // inner)


RESTING = Wavefront(WIDTH, inner=2, threshold=1e-4)


@pytest.fixture(scope='module')
def resting(engine_of, plain):
  """Requests, and their answers after each step of a front that waits for rest."""
  requests = [dataclasses.replace(r, depth=96, max_new_tokens=16, stops=()) for r in plain[0]]
  return requests, list(engine_of(RESTING).stream(requests))


def test_a_front_that_waits_for_rest_says_what_plain_decoding_says_at_rest(engine_of, resting):
  """Where iterations come to rest at one point, the way there does not matter."""
  requests, parts = resting
  for a, b in zip(parts[-1], engine_of(None).answer(requests), strict=True):
    assert a.tokens == b.tokens and a.steps < 3 * 15
    np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=0, atol=1e-4)
  gains = {
    len(new.tokens) - len(old.tokens)
    for a, b in zip(parts, parts[1:], strict=False)
    for old, new in zip(a, b, strict=True)
  }
  assert gains == {0, 1, 2, 3}, 'as many leave together as have settled'


def test_a_stop_ends_a_row_at_once_and_its_neighbors_go_on(engine_of, resting):
  """Also where others left together with it."""
  requests, parts = resting
  engine, whole = engine_of(RESTING), parts[-1]
  for stop in range(VOCAB):
    got = engine.answer([*(dataclasses.replace(r, stops=(stop,)) for r in requests[:5]), *requests[5:]])
    for answer, want in zip(got[:5], whole[:5], strict=True):
      end = want.tokens.index(stop) + 1 if stop in want.tokens else 16
      assert answer.tokens == want.tokens[:end] and answer.finish == ('stop' if stop in want.tokens else 'length')
    assert_same_answers(got[5:], whole[5:])


LOOSE = Wavefront(WIDTH, inner=2, threshold=0.5, momentum=0.2, noise=0.1)


@pytest.fixture(scope='module')
def loose(engine_of, plain):
  requests = [dataclasses.replace(r, depth=6, stops=()) for r in plain[0]]
  return requests, engine_of(LOOSE).answer(requests)


def test_what_settles_leaves_early(loose):
  requests, answers = loose
  for request, answer in zip(requests, answers, strict=True):
    assert len(answer.tokens) == request.max_new_tokens and answer.finish == 'length'
  assert LOOSE.inner * sum(a.steps for a in answers) < 6 * sum(len(a.tokens) - 1 for a in answers)
  assert len({depth for a in answers for depth in a.depths[1:]}) > 1


def test_a_row_of_a_front_does_not_know_its_neighbors(engine_of, loose):
  requests, together = loose
  engine = engine_of(LOOSE)
  for i in (2, 6):
    alone = engine.answer([*requests[:1] * i, requests[i], *requests[:1] * (7 - i)])[i]
    assert_same_answers([alone], [together[i]])


def test_a_position_leaves_only_with_the_token_that_it_was_computed_from(engine_of, plain):
  """Everything counts as settled here; the second position of each front holds a guess, right for one token only."""
  engine = engine_of(Wavefront(WIDTH, inner=2, threshold=1e9))
  requests = [dataclasses.replace(r, depth=6, max_new_tokens=9, stops=()) for r in plain[0]]
  asks = asks_of(requests)
  with jax.set_mesh(engine.mesh):
    for guess in range(VOCAB):
      front, step = engine._way(engine._begin(requests, asks), asks, None, np.int32(1))
      tokens_BW = front.tokens_BW.at[:, 1].set(guess)
      after = step(dataclasses.replace(front, tokens_BW=tokens_BW, size_B=front.size_B + 1)).decoding
      right_B = after.tokens_BM[:, 1] == guess
      np.testing.assert_array_equal(after.count_B, 2 + right_B)


def test_a_guess_counts_as_seen_from_its_position_on():
  seen_BWV = seen_so_far(jnp.array([[0, 1, 0, 0], [0, 0, 0, 0]], bool), jnp.array([[2, 2, 0], [3, 1, 3]]))
  want = [[(1, 2), (1, 2), (0, 1, 2)], [(3,), (1, 3), (1, 3)]]
  assert [[tuple(np.flatnonzero(seen_V)) for seen_V in row] for row in np.asarray(seen_BWV)] == want


def test_one_program_serves_all_settings_of_a_width(engine_of, loose):
  engine = engine_of(dataclasses.replace(LOOSE, inner=3, threshold=0.1, noise=0.0))
  with Compiles() as compiles:
    *parts, last = engine.stream(loose[0], every=2)
  assert compiles.count == 0 and len(parts) > 1
  for answers in parts:
    for part, whole in zip(answers, last, strict=True):
      assert part.tokens == whole.tokens[: len(part.tokens)]


@pytest.mark.slow  # another program to compile
def test_a_front_of_one_position_moves(engine_of, plain):
  """Where the reference's never freezes anything."""
  narrow = dataclasses.replace(PLAIN, width=1)
  assert_same_answers(engine_of(narrow).answer(plain[0]), plain[1])


@pytest.mark.parametrize(
  'make,words',
  [
    (lambda: Wavefront(width=0), 'width=0'),
    (lambda: Wavefront(momentum=2.0), 'momentum=2.0'),
    (lambda: Wavefront(threshold=float('nan')), 'threshold=nan'),
  ],
)
def test_a_front_that_cannot_be_is_refused(make, words):
  with pytest.raises(BadInput, match=words):
    make()


@pytest.mark.parametrize(
  'cache,options,words',
  [
    ('full', {}, '--cache=full: .* use --cache=ring:1'),
    ('ring:1', {'exit': ExitRule('kl')}, 'leave out --exit'),
    ('ring:1', {'warm_start': True}, '--warm_start'),
  ],
)
def test_what_does_not_go_with_a_front_is_refused(engine_of, cache, options, words):
  with pytest.raises(BadInput, match=words):
    engine_of(PLAIN, cache).answer([Request((1,), 6, **options)])
  with pytest.raises(BadInput, match='leave one of them out'):
    engine_of(PLAIN, cache, speculate=Draft(1, 2))
