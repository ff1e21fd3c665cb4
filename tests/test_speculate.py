"""Self-speculative decoding changes how fast tokens come, not which: greedy exactly, sampled in distribution."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from latent_loop.benchmark import Compiles
from latent_loop.errors import BadInput
from latent_loop.inference.engine import Engine, ExitRule, Request
from latent_loop.inference.speculate import Draft
from tests.tiny import assert_same_answers, mesh_of, ragged_requests, random_params, tiny_model

DEPTH, VOCAB, MANY = 6, 5, 2048


@pytest.fixture(scope='module')
def model():
  return tiny_model(**{'model.vocab_size': VOCAB})


@pytest.fixture(scope='module')
def params(model):
  return jax.tree.map(jnp.asarray, random_params(model))


@pytest.fixture(scope='module')
def plain(model, params):
  return Engine(model, params, mesh_of())


@pytest.fixture(scope='module')
def drafting(model, params):
  """An engine by its draft; lookahead 3 in every test, so one program serves them."""
  return lambda iterations: Engine(model, params, mesh_of(), speculate=Draft(iterations, 3))


@pytest.fixture(scope='module')
def greedy(plain):
  """Requests, of which some stop early, and their plain answers."""
  return ragged_requests(plain)


@pytest.mark.parametrize('iterations', [1, 3, 6, 7])
def test_speculative_greedy_is_plain_greedy(drafting, greedy, iterations):
  """With rows of different depths, limits, stops and penalties, whatever the draft."""
  requests, want = greedy
  got = drafting(iterations).answer(requests)
  assert_same_answers(got, want)
  assert {a.finish for a in got} == {'stop', 'length'}
  for request, answer in zip(requests, got, strict=True):
    assert len(answer.tokens) <= request.max_new_tokens and 0 <= answer.accepted <= answer.drafts
    if request.depth <= iterations:  # a draft as deep as the verifier is the verifier
      assert answer.accepted == answer.drafts
  if iterations == 1:
    assert 0 < sum(a.accepted for a in got) < sum(a.drafts for a in got)


@pytest.mark.slow  # two programs more to compile
def test_one_row_alone_is_plain_greedy(drafting, greedy):
  requests, want = greedy
  assert_same_answers(drafting(2).answer(requests[:1]), want[:1])


def test_one_program_serves_all_drafts_of_a_lookahead(drafting, greedy):
  engine = drafting(4)
  with Compiles() as compiles:
    *_, last = engine.stream(greedy[0], every=2)
  assert compiles.count == 0
  assert_same_answers(last, greedy[1])


@pytest.fixture(scope='module')
def rules():
  """Two sampling rules side by side, on rows that differ in their seeds alone."""
  one = Request((3, 1, 4), DEPTH, max_new_tokens=4, temperature=1.0, state_scale=0.0)
  other = dataclasses.replace(one, temperature=0.7, top_k=3, min_p=0.05, repetition_penalty=1.3)
  return lambda first: [dataclasses.replace((one, other)[i % 2], seed=first + i) for i in range(MANY)]


@pytest.mark.slow  # three programs more to compile
def test_sampled_speculation_passes_a_chi_square_test_against_plain_sampling(plain, drafting, rules):
  """Joint counts of the three tokens behind the first, which drafts, replacements and bonus tokens all make."""
  want, got = plain.answer(rules(0)), drafting(1).answer(rules(MANY))
  rate = sum(a.accepted for a in got) / sum(a.drafts for a in got)
  assert 0.2 < rate < 0.95, 'draft and verifier agree too much or too little for this test to see anything'
  for part in range(2):
    count = lambda answers, part=part: collections.Counter(tuple(a.tokens[1:]) for a in answers[part::2])
    counts = count(want), count(got)
    common = [cell for cell in counts[0] | counts[1] if counts[0][cell] + counts[1][cell] >= 20]
    table = [[c[cell] for cell in common] + [sum(c.values()) - sum(c[cell] for cell in common)] for c in counts]
    table = np.array(table)[:, np.sum(table, axis=0) > 0]
    assert len(common) > 20 and stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize(
  'make,words',
  [
    (lambda: Draft.parse('4'), '--speculate=4: not DRAFT:LOOKAHEAD'),
    (lambda: Draft.parse('a:b'), 'such as 4:8'),
    (lambda: Draft.parse('4:' + 5000 * '1'), 'not DRAFT:LOOKAHEAD'),
    (lambda: Draft.parse('0:8'), 'iterations=0'),
    (lambda: Draft(1, 0), 'lookahead=0'),
  ],
)
def test_a_draft_that_cannot_be_is_refused(make, words):
  with pytest.raises(BadInput, match=words):
    make()


@pytest.mark.parametrize(
  'cache,options',
  [('ring:2', {}), ('first:2', {}), ('full', {'exit': ExitRule('kl')}), ('full', {'warm_start': True})],
)
def test_what_speculation_cannot_do_exactly_is_refused(model, params, cache, options):
  engine = Engine(model, params, mesh_of(), cache, speculate=Draft(2, 3))
  with pytest.raises(BadInput, match='--speculate'):
    engine.answer([Request((1,), DEPTH, **options)])
