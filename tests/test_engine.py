"""The inference engine: a cache changes nothing, rows do not know of each other, a token stops when it should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_loop.benchmark import Compiles
from latent_loop.errors import BadInput
from latent_loop.inference import continuous
from latent_loop.inference import exits as rules
from latent_loop.inference.cache import Slots, cache_bytes, fill_deeper, new_cache
from latent_loop.inference.decode import start_states
from latent_loop.inference.engine import Answer, Engine, ExitRule, Request, asks_of, parse_cache
from latent_loop.inference.sampling import Sampling, restrict
from latent_loop.inference.text import in_json, request_of, text_of
from latent_loop.model.layers import Rows
from latent_loop.tokenizer import Bytes
from tests.tiny import V, mesh_of, random_params, tiny_model

DEPTH, NEW = 5, 7
PROMPTS = [(3, 1, 4), (1,), (5, 9, 2, 6, 5), (3, 5), (8, 9, 7, 9), (3, 2), (3, 8, 4, 6), (2, 6, 4)]


@pytest.fixture(scope='module')
def model():
  return tiny_model(**{'model.num_core_layers': 2})


@pytest.fixture(scope='module')
def params(model):
  return jax.tree.map(jnp.asarray, random_params(model))


@pytest.fixture(scope='module')
def engine(model, params):
  return Engine(model, params, mesh_of())


def ask(prompt, **options):
  return Request(prompt, **{'depth': DEPTH, 'max_new_tokens': NEW, **options})


@pytest.fixture(scope='module')
def uncached(model, params):
  """Log-probabilities of every next token, the whole row computed at once from the states the engine starts at."""

  @jax.jit
  def run(tokens_BT, asks, depth):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    rows = Rows(positions_BT, None)
    e_BTD = model.embed_input(params, tokens_BT, rows)
    s_BTD = model.advance(params, start_states(model, asks, positions_BT), e_BTD, rows, depth)
    return jax.nn.log_softmax(model.scores(params, model.apply_coda(params, s_BTD, rows)))

  def log_probs(request, answer):
    """Of the answer's tokens."""
    tokens = [*request.tokens, *answer.tokens]
    row = jnp.array([tokens + [0] * (16 - len(tokens))])
    log_p_TV = run(row, asks_of([request]), jnp.int32(request.depth))[0]
    places = np.arange(len(request.tokens), len(tokens))
    return np.asarray(log_p_TV)[places - 1, answer.tokens], np.argmax(log_p_TV, axis=-1)[places - 1].tolist()

  return log_probs


MIXED = [
  ask(PROMPTS[0], seed=1),
  ask(PROMPTS[1], depth=2, exit=ExitRule('kl', 0.02), seed=2),
  ask(PROMPTS[2], exit=ExitRule('latent-diff', 0.6, every=2), temperature=1.0, seed=3),
  ask(PROMPTS[3], exit=ExitRule('entropy-diff', 0.05, min_depth=2), max_new_tokens=3, seed=4),
  ask(PROMPTS[4], warm_start=True, temperature=0.5, top_k=5, seed=5),
  ask(PROMPTS[5], exit=ExitRule('argmax-stability', 2), top_p=0.8, temperature=2.0, seed=6),
  ask(PROMPTS[6], repetition_penalty=3.0, min_p=0.1, temperature=1.0, seed=7, state_scale=0.0),
  ask(PROMPTS[7], exit=ExitRule('cosine', 0.02), seed=8),
]


@pytest.fixture(scope='module')
def mixed(engine):
  return engine.answer(MIXED)


def test_a_full_cache_changes_nothing(engine, uncached):
  requests = [ask(prompt, depth=depth, seed=i) for i, (prompt, depth) in enumerate(zip(PROMPTS, (5, 1, 4, 3) * 2))]  # noqa: B905
  for request, answer in zip(requests, engine.answer(requests), strict=True):
    log_probs, best = uncached(request, answer)
    np.testing.assert_allclose(answer.log_probs, log_probs, rtol=0, atol=1e-5)
    assert answer.tokens == best and answer.depths == [request.depth] * NEW and answer.finish == 'length'


def test_a_row_gets_in_a_ragged_batch_what_it_gets_alone(engine, mixed):
  for i, (request, together) in enumerate(zip(MIXED, mixed, strict=True)):
    # The cache is made for the deepest row, so the row brings a neighbor of that depth: one program for all.
    others = [MIXED[0]] * 7
    alone = engine.answer([*others[:i], request, *others[i:]])[i]
    assert (alone.tokens, alone.depths, alone.finish) == (together.tokens, together.depths, together.finish), request
    np.testing.assert_allclose(alone.log_probs, together.log_probs, rtol=0, atol=1e-5)
  assert len({answer.depths[1] for answer in mixed}) > 2, 'the rules of this test let all rows leave alike'


def test_one_program_serves_all_prompts_depths_and_rules_of_a_class(engine, mixed):
  other = [dataclasses.replace(r, tokens=(*r.tokens, 1), seed=r.seed + 9, temperature=0.3) for r in MIXED[::-1]]
  with Compiles() as compiles:
    engine.answer(other)
  assert compiles.count == 0


def test_answers_come_as_they_are_made(engine, mixed):
  parts = list(engine.stream(MIXED, every=2))
  assert [len(answers[0].tokens) for answers in parts] == [1, 3, 5, 7] and parts[-1] == mixed
  for answers in parts:
    for part, whole in zip(answers, mixed, strict=True):
      assert part.tokens == whole.tokens[: len(part.tokens)]


def test_a_stop_token_ends_its_row_only(engine, mixed):
  stopped = [dataclasses.replace(r, stops=(mixed[i].tokens[1], 67)) for i, r in enumerate(MIXED[:4])] + MIXED[4:]
  answers = engine.answer(stopped)
  for answer, whole in zip(answers[:4], mixed[:4], strict=True):
    first = whole.tokens.index(whole.tokens[1])
    assert answer.tokens == whole.tokens[: first + 1] and answer.finish == 'stop'
  assert answers[4:] == mixed[4:] and mixed[3].finish == 'length' and len(mixed[3].tokens) == 3


@pytest.mark.parametrize('kind', [kind for kind in rules.CRITERIA if kind not in ('none', 'argmax-stability')])
def test_a_criterion_leaves_where_its_threshold_says(engine, kind):
  """At a threshold that everything is under, at the first check that has something to compare with; at 0, never."""
  base = [ask(prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
  at = [(1e9, 1, 1), (1e9, 3, 1), (1e9, 2, 2), (0.0, 1, 1), (1e9, 1, 1), (1e9, 5, 1), (0.0, 1, 2), (1e9, 1, 3)]
  requests = [
    dataclasses.replace(r, exit=ExitRule(kind, threshold, min_depth, every))
    for r, (threshold, min_depth, every) in zip(base, at, strict=True)
  ]
  first = 2 if kind == 'latent-acceleration' else 1  # a second difference needs two iterations
  due = lambda min_depth, every: next(t for t in range(min_depth, 9, every) if t >= first)
  for answer, (threshold, min_depth, every) in zip(engine.answer(requests), at, strict=True):
    depth = due(min_depth, every) if threshold else DEPTH
    assert answer.depths[1:] == [depth] * (NEW - 1) and answer.depths[0] == DEPTH


@pytest.mark.parametrize('slots', [Slots(5), Slots(3, ring=True), Slots(2)])
def test_a_token_that_left_early_is_seen_at_its_last_iteration(slots):
  """Rows that left after 1, 2 and 5 iterations at places 1, 0 and 3 of 4; the last row's token is not a real one."""
  shape = (slots.count, 4, 2, 4, 3)
  keys, values = (np.random.default_rng(i).normal(size=shape).astype(np.float32) for i in range(2))
  depth_B, place_B, real_B = np.array([1, 2, 5, 1]), np.array([1, 0, 3, 2]), np.array([True, True, True, False])
  filled = jax.jit(fill_deeper, static_argnums=1)(
    [(jnp.asarray(keys), jnp.asarray(values))], slots, depth_B, place_B[:, None], real_B[:, None]
  )
  for got, old in zip(filled[0], (keys, values), strict=True):
    want = old.copy()
    for b in range(3):
      for slot in range(depth_B[b], slots.count):
        want[slot, b, :, place_B[b]] = old[int(slots.of(depth_B[b] - 1)), b, :, place_B[b]]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  'text,same',
  [
    ('latest', True),
    (f'ring:{DEPTH}', True),
    (f'first:{DEPTH}', True),
    pytest.param('ring:1', False, marks=pytest.mark.slow),  # another program to compile
  ],
)
def test_a_cache_with_a_slot_per_depth_is_the_full_one(model, params, engine, text, same):
  requests = [ask(prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
  got, want = Engine(model, params, mesh_of(), text).answer(requests), engine.answer(requests)
  assert ([a.log_probs for a in got] == [a.log_probs for a in want]) == same


def test_memory_is_known_before_it_is_taken(model, engine):
  cache = new_cache(model.cfg, Slots(3), 2, 8)
  assert cache_bytes(model.cfg, Slots(3), 2, 8) == sum(x.nbytes for x in jax.tree.leaves(cache))
  assert engine.bytes_of([ask((1,))]) == cache_bytes(model.cfg, Slots(DEPTH), 1, 32)


@pytest.mark.parametrize('window', [3])
def test_rows_at_different_depths_get_what_they_get_in_step(engine, mixed, window):
  """Continuous depth batching, with every kind of exit rule in one batch."""
  for answer, want in zip(engine.answer_flying(MIXED, window), mixed, strict=True):
    assert (answer.tokens, answer.depths, answer.finish) == (want.tokens, want.depths, want.finish)
    np.testing.assert_allclose(answer.log_probs, want.log_probs, rtol=0, atol=1e-5)


def test_a_shallow_row_does_not_wait_for_a_deep_one_while_few_run(engine):
  """Two of eight rows run; the deep one is still at its first token when the other has made one per iteration."""
  requests = [ask((1, 2), depth=1), ask((3,)), *[ask((1,), max_new_tokens=1)] * 6]
  asks = asks_of(requests)
  with jax.set_mesh(engine.mesh):
    flight = continuous.take_off(engine.model, engine.params, engine._begin(requests, asks), asks)
    flight = continuous.fly(
      engine.model, engine.params, flight, asks, np.int32(DEPTH - 1), slots=Slots(DEPTH), window=3
    )
  assert flight.decoding.count_B.tolist() == [DEPTH, *[1] * 7]


# --- sampling ---------------------------------------------------------------------------------------------


def test_rows_that_think_on_are_not_touched_when_another_passes(engine):
  """Also where they fill up the window: their columns hold a mark that any writing would replace."""
  requests = [ask(prompt, depth=3, max_new_tokens=4) for prompt in ((3, 1, 4), (1, 5), (9, 2, 6))]
  asks, left_B = asks_of(requests), jnp.array([False, True, False])
  with jax.set_mesh(engine.mesh):
    flight = continuous.take_off(engine.model, engine.params, engine._begin(requests, asks), asks)
    marked = jax.tree.map(lambda x: jnp.where(left_B[None, :, None, None, None], x, 7.0), flight.decoding.cache)
    flight = dataclasses.replace(flight, left_B=left_B, decoding=dataclasses.replace(flight.decoding, cache=marked))
    after = jax.jit(continuous._next_tokens, static_argnums=(0, 4))(engine.model, engine.params, flight, asks, 3)
  others = np.array([0, 2])
  for old, new in zip(*(jax.tree.leaves(x.decoding.cache) for x in (flight, after)), strict=True):
    assert np.array_equal(old[:, others], new[:, others])
  for old, new in zip(*(jax.tree.leaves(continuous._without_cache(x)) for x in (flight, after)), strict=True):
    assert np.array_equal(old[others], new[others])
  assert int(after.decoding.count_B[1]) == int(flight.decoding.count_B[1]) + 1 and not bool(after.left_B[1])


def rule(**values):
  one = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0) | values
  return Sampling(**{f'{name}_B': jnp.array([value]) for name, value in one.items()})


@pytest.mark.parametrize(
  'values,kept',
  [
    ({}, [0, 1, 2, 3]),
    ({'top_k': 2}, [1, 3]),
    ({'top_k': 9}, [0, 1, 2, 3]),
    ({'top_p': 0.5}, [1]),
    ({'top_p': 0.51}, [1, 3]),
    ({'top_p': 0.0}, [1]),
    ({'min_p': 0.5}, [1, 3]),
    ({'min_p': 1.0}, [1]),
    ({'top_k': 3, 'top_p': 0.84}, [1, 3]),  # of the three that are left, two have 0.8 / 0.95 = 0.842
    ({'temperature': 100.0, 'min_p': 0.9}, [0, 1, 2, 3]),
  ],
)
def test_a_rule_keeps_the_tokens_that_it_says(values, kept):
  logits_BV = jnp.log(jnp.array([[0.05, 0.5, 0.15, 0.3]]))
  assert np.flatnonzero(np.isfinite(np.asarray(restrict(logits_BV, rule(**values))[0]))).tolist() == kept


def test_a_rule_that_is_off_stays_off_beside_one_that_is_on():
  """Also for tokens so rare that those ahead of them have all of the probability in float32."""
  logits_BV = jnp.array([[30.0, 0.0, 1.0, 2.0, 3.0]] * 2)
  both = restrict(logits_BV, jax.tree.map(lambda *x: jnp.concatenate(x), rule(), rule(top_k=3)))
  assert np.array_equal(both[0], restrict(logits_BV[:1], rule())[0]) and np.isinf(both[1]).sum() == 2


def test_the_same_seed_draws_the_same_tokens_and_another_does_not(engine):
  requests = [ask((1, 2), temperature=1.5, seed=seed) for seed in (1, 2, 1, 3, 4, 5, 6, 7)]
  answers = engine.answer(requests)
  assert answers[0] == answers[2] and len({tuple(a.tokens) for a in answers}) == 7


# --- words ------------------------------------------------------------------------------------------------


def test_text_ends_at_the_first_stop_string_and_holds_half_characters_back(mixed):
  answer = dataclasses.replace(mixed[0], tokens=[*'a-\u00e9'.encode(), *b'b-c'], finish=None)
  text = lambda answer, *stops: text_of(Bytes(), answer, stops)
  assert text(answer) == ('a-\u00e9b-c', None)
  assert text(answer, 'c', 'b-') == ('a-\u00e9', 'stop')
  half = dataclasses.replace(answer, tokens=answer.tokens[:3])
  assert text(half) == ('a-', None) and text(dataclasses.replace(half, finish='length')) == ('a-\ufffd', 'length')


def test_an_answer_in_json_ends_where_its_text_does_and_has_no_number_that_json_has_not():
  answer = Answer([*'a-\u00e9b-c'.encode()], [-0.5, float('nan'), -2.0, *[-1.0] * 4], [*range(7)], 'length')
  whole = in_json(Bytes(), answer)
  assert (whole['text'], whole['finish'], whole['tokens']) == ('a-\u00e9b-c', 'length', answer.tokens)
  until_stop = in_json(Bytes(), answer, ('b-', '\u00e9b'))
  assert (until_stop['text'], until_stop['finish']) == ('a-', 'stop')
  assert (until_stop['tokens'], until_stop['depths']) == ([*b'a-\xc3\xa9b'], [0, 1, 2, 3, 4])
  assert until_stop['log_probs'] == [-0.5, None, -2.0, -1.0, -1.0]


@pytest.mark.parametrize(
  'make,words',
  [
    (lambda: Request((), 1), 'it has no tokens'),
    (lambda: Request((1,), 0), '--depth=0'),
    (lambda: Request((1,), 2**31), '--depth='),
    (lambda: Request((1,), 1, max_new_tokens=0), '--max_new_tokens=0'),
    (lambda: Request((1,), 1, temperature=float('nan')), '--temperature=nan'),
    (lambda: Request((1,), 1, temperature=10**400), 'not a number from 0'),
    (lambda: Request((1,), 1, state_scale=1e39), '--state_scale=1e[+]39'),  # endless in float32
    (lambda: Request((1,), 1, top_p=1.5), '--top_p=1.5'),
    (lambda: Request((1,), 1, seed=-1), '--seed=-1'),
    (lambda: Request((1,), 1, repetition_penalty=0), '--repetition_penalty=0'),
    (lambda: Request((1,), 1, repetition_penalty=10**400), '--repetition_penalty=10'),
    (lambda: Request((1,), 1, repetition_penalty=1e-50), '--repetition_penalty=1e-50'),
    (lambda: ExitRule.parse('kl:x'), '--exit=kl:x'),
    (lambda: ExitRule.parse('kl:-1'), '^--exit=kl:-1: a threshold is a number from 0 up, such as 5e-4$'),
    (lambda: ExitRule.parse('klx'), "^--exit='klx': no such criterion; choose one of kl[^;]*$"),
    (lambda: ExitRule.parse('kl:1:0'), '^--exit=kl:1: min_depth=0 is out of range; give a number from 1 to [0-9]*$'),
    (lambda: ExitRule.parse('kl:1:' + 5000 * '1'), 'the rule is KIND'),
    (lambda: ExitRule.parse('kl:1:2:3:4'), 'more than four parts; the rule is KIND'),
    (lambda: parse_cache('ring:0', 4), '--cache=ring:0'),
    (lambda: parse_cache('half', 4), '--cache=half'),
    (lambda: parse_cache('ring:' + 5000 * '1', 4), '--cache=ring:1'),
    (lambda: parse_cache('ring:\u00b2', 4), '--cache=ring:'),
    (lambda: request_of(Bytes(), '\udcff', depth=1), 'not UTF-8 text'),
  ],
)
def test_what_cannot_be_generated_is_refused_before_the_model_is_touched(make, words):
  with pytest.raises(BadInput, match=words):
    make()


def test_a_cache_that_does_not_fit_is_refused_before_it_is_made(engine):
  with pytest.raises(BadInput, match=r'--cache=ring:1'):
    engine.answer([ask((1,), max_new_tokens=2**30, depth=2**31 - 1)])


def test_a_row_far_longer_than_in_training_is_refused(model, params):
  with pytest.raises(BadInput, match='a prompt of 2 tokens and --max_new_tokens=9 are more than 10 together'):
    Engine(model, params, mesh_of(), most_tokens=10).answer([ask((1, 2), max_new_tokens=9)])


def test_a_depth_far_beyond_that_of_training_is_refused(model, params):
  with pytest.raises(BadInput, match='--depth=9 is above 8, too far beyond'):
    Engine(model, params, mesh_of(), 'ring:1', most_depth=8).answer([ask((1, 2), depth=9)])


def test_a_token_that_the_model_does_not_know_is_refused(engine):
  with pytest.raises(BadInput, match=f'the model knows 0 to {V - 1}'):
    engine.answer([ask((V,))])
