"""The board: requests come and go while others think on, and each gets what the engine gives it alone."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from latent_loop.benchmark import Compiles
from latent_loop.errors import BadInput
from latent_loop.inference.board import Board
from latent_loop.inference.engine import Engine, ExitRule, Request
from latent_loop.inference.speculate import Draft
from tests.tiny import V, assert_same_answers, mesh_of, random_params, tiny_model

DEPTH, NEW, TOTAL, SLOTS = 5, 7, 40, 3
REQUESTS = [
  Request((3, 1, 4), DEPTH, NEW, seed=1),
  Request((1,), 2, NEW, ExitRule('kl', 0.02), seed=2),
  Request((5, 9, 2, 6, 5), DEPTH, NEW, ExitRule('latent-diff', 0.6, every=2), temperature=1.0, seed=3),
  Request((3, 5), DEPTH, 1, seed=4),  # done with its first token
  Request((8, 9, 7, 9), DEPTH, NEW, temperature=0.5, top_k=5, warm_start=True, seed=5),
  Request(tuple(range(16)), DEPTH, NEW, ExitRule('cosine', 0.02), seed=6),  # its class is full: no place is left over
  Request(tuple(range(9, 29)), 4, 3, repetition_penalty=3.0, min_p=0.1, temperature=1.0, seed=7),  # another class
  Request((2, 6, 4), DEPTH, NEW, ExitRule('argmax-stability', 2), top_p=0.8, temperature=2.0, seed=8),
]


@pytest.fixture(scope='module')
def engine():
  model = tiny_model(**{'model.num_core_layers': 2})
  return Engine(model, jax.tree.map(jnp.asarray, random_params(model)), mesh_of(), most_tokens=64)


@pytest.fixture(scope='module')
def board(engine):
  return Board(engine, SLOTS, DEPTH, TOTAL)


@pytest.fixture(scope='module')
def want(engine):
  return engine.answer(REQUESTS)


def serve(board, requests, iterations=2):
  """Each is admitted as soon as a slot is free."""
  answers, waiting, which = [None] * len(requests), list(range(len(requests))), {}
  while waiting or which:
    for slot in board.free[: len(waiting)]:
      i = waiting.pop(0)
      answers[i] = board.admit(slot, requests[i])
      if answers[i].finish is None:
        which[slot] = i
    for slot, answer in board.advance(iterations).items():
      answers[which[slot]] = answer
      if answer.finish is not None:
        del which[slot]
  return answers


@pytest.mark.slow
def test_a_request_gets_what_it_gets_alone_whoever_comes_and_goes(board, want):
  assert_same_answers(serve(board, REQUESTS), want)
  assert_same_answers(serve(board, REQUESTS[::-1], iterations=3), want[::-1])
  assert board.free == list(range(SLOTS))


@pytest.mark.slow
def test_what_an_earlier_row_left_does_not_reach_a_later_one_even_if_it_is_not_finite(engine, board, want):
  ruin = jax.jit(lambda cache: jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache))
  decoding = dataclasses.replace(board._flight.decoding, cache=ruin(board._flight.decoding.cache))
  board._flight = dataclasses.replace(board._flight, decoding=decoding)
  assert_same_answers(serve(board, REQUESTS), want)


@pytest.mark.slow
def test_one_that_is_released_leaves_the_others_undisturbed_and_its_slot_clean(board, want):
  kept, gone = REQUESTS[4], REQUESTS[2]
  board.admit(0, kept), board.admit(1, gone), board.advance(4)
  board.release(1)
  assert board.free == [1, 2] and board._flight.decoding.running_B.tolist() == [True, False, False]
  board.admit(1, REQUESTS[7])
  answers = board.advance(1000)
  assert_same_answers([answers[0], answers[1]], [want[4], want[7]])
  assert board.free == [0, 1, 2] and board.advance(5) == {}


@pytest.mark.slow
def test_one_program_serves_all_prompts_of_a_class(board, want):
  serve(board, REQUESTS)
  with Compiles() as compiles:
    serve(board, [dataclasses.replace(r, seed=r.seed + 9, temperature=0.3, depth=3) for r in REQUESTS])
  assert compiles.count == 0


@pytest.mark.parametrize(
  'request_,words',
  [
    (Request((1,) * 34, DEPTH, NEW), 'a prompt of 34 tokens and max_new_tokens=7 are more than the 40'),
    (Request((1,), DEPTH + 1, NEW), 'depth=6 is above 5'),
    (Request((V,), DEPTH, NEW), f'knows 0 to {V - 1}'),
    (Request((1,), DEPTH, NEW, stops=(1, 2, 3, 4, 5)), '5 stop tokens'),
  ],
)
def test_what_does_not_fit_is_refused_and_takes_no_slot(board, request_, words):
  with pytest.raises(BadInput, match=words):
    board.admit(0, request_)
  assert board.free == [0, 1, 2]


def test_a_board_that_cannot_be_is_refused_before_it_is_made(engine):
  with pytest.raises(BadInput, match='max_total_tokens=65 is too far beyond'):
    Board(engine, SLOTS, DEPTH, 65)
  with pytest.raises(BadInput, match='the cache of keys and values would take'):
    Board(engine, 2**20, 2**20, 64)
  other = Engine(engine.model, engine.params, engine.mesh, speculate=Draft(2, 3))
  for make in (lambda: Board(other, SLOTS, DEPTH, 16), lambda: other.answer_flying(REQUESTS, 2)):
    with pytest.raises(BadInput, match='--speculate and --parallel'):
      make()
