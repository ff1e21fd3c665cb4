"""What an exit rule saves and costs, counted from one unroll."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_loop import calibration
from latent_loop.errors import BadInput
from latent_loop.evals import exits as exit_eval
from latent_loop.inference import exits as rules
from latent_loop.model.cost import Cost
from latent_loop.parallel import memory
from latent_loop.tokenizer import Bytes
from tests.tiny import T, random_batch, random_params, rows_of, tiny_config, tiny_model

R = 4


def test_one_unroll_is_separate_runs():
  """nll at depth r is that of a plain pass at depth r, and a value is that of the states around it."""
  model, batch = tiny_model(), random_batch(rows=3)
  params, key = jax.tree.map(jnp.asarray, random_params(model)), jax.random.key(0)
  got = exit_eval.make_exit_eval(model, R)(params, batch, key)
  assert sum(x.nbytes for x in got.values()) == exit_eval.num_bytes(R, 3 * T)
  rows = rows_of(batch)

  @jax.jit
  def plain(depth):
    e_BTD = model.embed_input(params, batch.tokens_BT, rows)
    s_BTD = model.advance(params, model.init_state(key, jnp.arange(3), T), e_BTD, rows, depth)
    return s_BTD, jax.nn.log_softmax(model.scores(params, model.apply_coda(params, s_BTD, rows)))

  (_, log_o), (before, log_q), (after, log_p) = plain(1), plain(2), plain(3)
  nll = -np.take_along_axis(np.asarray(log_p), batch.targets_BT[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(got['nll_RBT'][2], nll, rtol=1e-5, atol=1e-6)
  value = lambda kind, e=0: np.asarray(got['values_RBTEC'][2, ..., e, rules.CRITERIA.index(kind)])
  change = np.linalg.norm(after - before, axis=-1) / np.linalg.norm(after, axis=-1)
  np.testing.assert_allclose(value('latent-diff'), change, rtol=1e-4, atol=1e-6)
  kl = lambda log_q: np.sum(np.exp(log_q) * (log_q - log_p), axis=-1)
  np.testing.assert_allclose(value('kl'), kl(log_q), rtol=1e-2, atol=1e-6)
  assert exit_eval.intervals(R) == (1, 2)
  np.testing.assert_allclose(value('kl', 1), kl(log_o), rtol=1e-2, atol=1e-6, err_msg='not of the last check')
  np.testing.assert_allclose(value('cosine', 1), value('cosine'))


def test_a_depth_whose_numbers_do_not_fit_is_refused_before_it_is_reached(monkeypatch):
  config = tiny_config()
  tokens = config.train.batch_size * config.eval.num_batches * T
  monkeypatch.setattr(memory, '_host_bytes', lambda: exit_eval.num_bytes(R, tokens))
  memory.check_unroll(exit_eval.num_bytes(R, tokens), R)
  with pytest.raises(BadInput, match=f'--depths={R + 1}: .* ask for less'):
    calibration.write_exits(SimpleNamespace(config=config), None, None, R + 1)


def test_tokens_stop_at_the_first_value_under_the_threshold():
  values_RX = np.array([[3.0, 3.0, 0.5], [1.0, 3.0, 3.0], [2.0, 2.5, 0.1]])
  assert exit_eval.stop_depths(values_RX, 'kl', 2.0).tolist() == [2, 3, 1]
  assert exit_eval.stop_depths(values_RX, 'argmax-stability', 3.0).tolist() == [1, 1, 2]
  assert exit_eval.stop_depths(values_RX, 'kl', 2.0, every=2).tolist() == [3, 3, 1], 'asked after 1 and 3'


def test_the_recommended_threshold_is_the_cheapest_that_is_good_enough():
  rng = np.random.default_rng(0)
  tokens = 500
  settles_X = rng.integers(1, R + 1, tokens)  # from here on the value is small and the loss is what it will be
  t_R1 = np.arange(1, R + 1)[:, None]
  settled_RX = t_R1 >= settles_X
  nll_RX = np.where(settled_RX, 1.0, 2.0)
  values_RXEC = np.where(settled_RX, 0.01, 1.0)[..., None, None] * np.ones((2, len(rules.CRITERIA) - 1))
  values_RXEC[..., rules.CRITERIA.index('cosine')] = 1.0  # says nothing
  numbers = {'nll_RX': nll_RX, 'right_RX': nll_RX < 1.5, 'values_RXEC': values_RXEC}
  head, core = 1000, 10
  costs = dict(parameters={}, remat='none', outer_blocks=0, core_blocks=0, core_last_block=0, drive=0)
  cheap_head = exit_eval.curves(numbers, Cost(outer=5, coda=2, core=core, head=0, **costs))
  numbers = exit_eval.curves(numbers, Cost(outer=5, coda=2, core=core, head=head, **costs))
  assert (cheap_head['best']['kl']['every'], numbers['best']['kl']['every']) == (1, 2)
  checks_X = np.where(settles_X == 1, 1, np.where(settles_X <= 3, 2, 3))  # after 1, 3 and, as all end there, 4
  leaves_X = np.where(settles_X == 1, 1, np.where(settles_X <= 3, 3, 4))
  assert [row['loss'] for row in numbers['fixed']] == pytest.approx(nll_RX.mean(axis=1)), 'one depth for all'
  assert [row['flops_per_token'] for row in numbers['fixed']] == [3 + core * r + head + 2 for r in range(1, R + 1)]
  kl = numbers['best']['kl']
  assert kl['reads'] == pytest.approx(checks_X.mean()) and kl['mean_depth'] == pytest.approx(leaves_X.mean())
  assert kl['flops_per_token'] == pytest.approx(3 + core * leaves_X.mean() + (head + 2) * checks_X.mean())
  assert numbers['cheapest'].endswith(':1:1') and not numbers['cheapest'].startswith(rules.READING), 'read once'
  best = numbers['best']['latent-diff']
  assert best['mean_depth'] == pytest.approx(settles_X.mean()) and best['loss'] == 1.0 and best['accuracy'] == 1.0
  assert 0.01 < best['threshold'] <= 1.0
  cosine = numbers['best']['cosine']
  assert cosine['mean_depth'] == R and cosine['loss'] == 1.0
  assert f'the fewest FLOPs: --exit={numbers["cheapest"]}' in exit_eval.table(numbers)


def test_a_target_depth_is_met_at_the_least_loss():
  rows = [{'threshold': x, 'mean_depth': 4 - x, 'loss': 1.0 + x} for x in (0.0, 1.0, 2.0)]
  found = exit_eval.meet({'kl': rows, 'cosine': rows[:1]}, 3.0)
  assert found == {'kl': rows[1]}, 'cosine has none so early'


def test_every_token_is_in_one_histogram_once():
  rng = np.random.default_rng(1)
  tokens, kinds_X = 60, np.array(['letter', 'digit', 'digit'] * 20)
  nll_RX = rng.random((R, tokens))
  values_RXEC = rng.random((R, tokens, 2, len(rules.CRITERIA) - 1))
  targets_X, rule = np.arange(tokens), {'threshold': 0.4, 'every': 2}
  numbers = {'nll_RX': nll_RX, 'right_RX': nll_RX < 0.5, 'values_RXEC': values_RXEC, 'targets_X': targets_X}
  whole = exit_eval.histogram(numbers, 'kl', rule)
  parts = [exit_eval.histogram(exit_eval.only(numbers, kinds_X == kind), 'kl', rule) for kind in ('letter', 'digit')]
  assert [part['tokens'] for part in parts] == [20, 40] and len(whole['left_at']) == R
  assert np.array_equal(whole['left_at'], np.sum([part['left_at'] for part in parts], axis=0))
  for name in ('mean_depth', 'loss', 'accuracy'):
    assert whole[name] == pytest.approx((parts[0][name] + 2 * parts[1][name]) / 3)
  assert whole['mean_depth'] == np.dot(whole['left_at'], np.arange(1, R + 1)) / tokens


def test_tokens_are_told_apart_by_what_they_begin_with():
  tokens = Bytes().encode('a7 \n(')
  assert list(calibration.kinds_of_tokens(Bytes(), tokens)) == ['letter', 'digit', 'blank', 'line break', 'other']


def test_a_task_is_shown_by_difficulty_and_a_mixture_by_folder():
  task = tiny_config(**{'data.source': 'addition', 'data.min_difficulty': 2, 'data.max_difficulty': 3})
  parts = calibration.parts_of(task)
  assert list(parts) == ['difficulty 2', 'difficulty 3']
  assert [(part.data.min_difficulty, part.data.max_difficulty) for part in parts.values()] == [(2, 2), (3, 3)]
  assert list(calibration.parts_of(task, (5, 2, 5))) == ['difficulty 2', 'difficulty 5'], 'also beyond training'
  mixture = tiny_config(**{'data.source': 'prepared', 'data.paths': ('a', 'b'), 'data.weights': (1.0, 2.0),
                         'data.weight_changes': ((0.5, 2.0, 1.0),)})  # fmt: skip
  assert [part.data.paths for part in calibration.parts_of(mixture).values()] == [('a',), ('b',)]
  assert calibration.parts_of(tiny_config()) == {}
  with pytest.raises(BadInput, match='--difficulty=5: trained on embedded_text, which has no difficulties'):
    calibration.parts_of(tiny_config(), (5,))
