"""A run under lm-eval-harness: its numbers are those of a plain pass, and a local task runs offline."""

from types import SimpleNamespace

import numpy as np
import pytest

from latent_loop.errors import BadInput
from latent_loop.inference.engine import Answer
from latent_loop.interop import from_hf, to_hf
from tests.tiny import random_params, tiny_config, tiny_model

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip('lm_eval', reason='pip install -r launch/requirements/interop.txt')
SIZES = {'model.vocab_size': 264, 'data.seq_len': 20}


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  from latent_loop.interop.harness import LatentLoop

  tmp = tmp_path_factory.mktemp('lm_eval')
  config, params = tiny_config(**SIZES), random_params(tiny_model(**SIZES))
  to_hf.write_folder(tmp / 'hf', to_hf.texts_of(config), params, config, 10**9)
  from_hf.take_in(tmp / 'hf', tmp / 'run')
  made = LatentLoop(str(tmp / 'run'), depth=3, batch_size=2)
  made.workdir = tmp / 'run'
  return made


def asked(*args):
  return [SimpleNamespace(args=one) for one in args]


def test_a_continuation_scores_what_its_parts_do(model):
  whole, first, second = model.loglikelihood(asked(('ab', 'cd'), ('ab', 'c'), ('abc', 'd')))
  assert whole[0] == pytest.approx(first[0] + second[0], abs=1e-4)
  assert whole[1] == (first[1] and second[1])


def test_all_next_bytes_together_are_certain(model):
  scores = model.loglikelihood(asked(*(('x', chr(i)) for i in range(128))))
  assert 0 < np.exp([nats for nats, _ in scores]).sum() < 1
  assert max(scores)[1] or not any(right for _, right in scores)


def test_a_text_of_one_row_rolls_as_a_continuation(model):
  (rolled,) = model.loglikelihood_rolling(asked(('short text',)))
  assert rolled == pytest.approx(model.loglikelihood(asked(('', 'short text')))[0][0], abs=1e-4)


def test_every_token_of_a_long_text_is_scored_once(model, monkeypatch):
  counted = []
  monkeypatch.setattr(model, '_score', lambda pairs: counted.extend(pairs) or [{3: (0.0, True)}] * len(pairs))
  model.loglikelihood_rolling(asked(('0123456789' * 7,)))
  assert sum(len(tokens) - first for tokens, first in counted) == 70
  assert max(len(tokens) for tokens, _ in counted) == 20


def test_a_task_that_nobody_knows_is_a_sentence(model, monkeypatch, capsys):
  from launch import lm_eval as program

  args = ['--model', 'latent_loop', '--model_args', f'workdir={model.workdir}', '--tasks', 'nothing']
  monkeypatch.setattr('sys.argv', ['lm_eval', *args])
  with pytest.raises(SystemExit) as end:
    program.main()
  assert end.value.code == 2
  assert 'error: --tasks: Tasks not found: nothing' in capsys.readouterr().err


def test_answers_end_at_a_stop_string(model):
  (free,) = model.generate_until(asked(('ab', {'max_gen_toks': 6})))
  if free:
    (cut,) = model.generate_until(asked(('ab', {'max_gen_toks': 6, 'until': [free[-1]]})))
    assert cut == free[: free.index(free[-1])]


def test_a_local_task_runs_offline(model):
  from lm_eval.tasks import TaskManager

  tasks = TaskManager(include_path='tests/lm_eval_tasks', include_defaults=False)
  results = lm_eval.simple_evaluate(model=model, tasks=['counting'], task_manager=tasks, bootstrap_iters=0)
  assert results['results']['counting']['acc,none'] in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)
  assert results['n-samples']['counting']['effective'] == 3


def test_one_unroll_answers_for_every_depth(model, monkeypatch):
  from latent_loop.interop import harness

  continued, text = asked(('ab', 'cd'), ('x', 'y'), ('abc', 'd')), asked(('0123456789' * 4,))
  several, passes = harness.LatentLoop(str(model.workdir), depths='5:1:3', batch_size=2), []
  monkeypatch.setattr(harness, '_read', lambda *args, read=harness._read: passes.append(0) or read(*args))
  found = {}
  for depth in several.depths:
    several.depth = depth
    found[depth] = several.loglikelihood(continued), several.loglikelihood_rolling(text)
  assert several.depths == (1, 3, 5) and len(passes) == 2 + 2
  assert len({nats for scores, _ in found.values() for nats, _ in scores}) == 9
  alone = model.loglikelihood(continued), model.loglikelihood_rolling(text)
  np.testing.assert_allclose([nats for nats, _ in found[3][0]], [nats for nats, _ in alone[0]], rtol=1e-6)
  np.testing.assert_allclose(found[3][1], alone[1], rtol=1e-6)


@pytest.mark.parametrize(
  'options',
  [{'depths': '1:0'}, {'depths': '1:4', 'depth': 2}, {'depth': 'deep'}, {'depths': 5000 * '9'}, {'depth': 5000}],
)
def test_depths_that_are_none_are_a_sentence(model, options):
  from latent_loop.interop.harness import LatentLoop

  with pytest.raises(BadInput, match='--model_args depth'):
    LatentLoop(str(model.workdir), **options)


@pytest.mark.parametrize(
  'options, words',
  [
    ({'dept': 2, 'exitt': 'kl'}, '--model_args dept=2: no such argument; choose from workdir, depth, depths, exit'),
    ({'workdir': None}, '--model_args has no workdir; give'),
    ({'workdir': 's3://bucket/run'}, '--model_args workdir=s3://bucket/run: '),
    ({'batch_size': 0}, '--batch_size=0: no number from 1 to 4096'),
    ({'batch_size': 'many'}, '--batch_size=many: no number'),
    ({'batch_size': 5000 * '9'}, '--batch_size=9'),
  ],
)
def test_arguments_that_are_none_are_a_sentence(model, options, words):
  from latent_loop.interop.harness import LatentLoop

  with pytest.raises(BadInput, match=words):
    LatentLoop(**{'workdir': str(model.workdir), 'device': None, 'max_batch_size': None, **options})


def test_the_size_of_batches_may_be_left_to_us(model):
  from latent_loop.interop.harness import LatentLoop

  assert LatentLoop(str(model.workdir), batch_size='auto', device=None, max_batch_size=None)._batch_size == 8


def test_a_continuation_longer_than_a_row_is_scored_whole(model, monkeypatch):
  """As the text behind the first letters is, whose rows begin at the same places."""
  text = '0123456789' * 5
  (whole,) = model.loglikelihood(asked(('', text)))
  assert whole[0] == pytest.approx(model.loglikelihood_rolling(asked((text,)))[0], abs=1e-4)
  counted = []
  score = lambda rows: counted.extend(rows) or [{3: (-1.0, len(rows) > 3)}] * len(rows)
  monkeypatch.setattr(model, '_score', score)
  assert model.loglikelihood(asked(('c' * 30, 'd' * 50), ('c' * 30, 'd' * 19))) == [(-5.0, True), (-1.0, True)]
  assert [len(tokens) - first for tokens, first in counted] == [10, 10, 10, 10, 10, 19]
  assert all(len(tokens) == 20 for tokens, _ in counted)
  assert model.loglikelihood(asked(('c', ''))) == [(0, True)]


def test_a_continuation_that_its_context_swallows_is_scored(model, monkeypatch):
  """Pairs of letters are tokens, and a space belongs to the word behind it."""
  rows, tokens = [], {'p': [1], 'pq': [2], 'pqr': [2, 3], 'pq r': [2, 4], 'pq ': [2, 5]}
  monkeypatch.setattr(model, '_tokens', tokens.__getitem__)
  monkeypatch.setattr(model, '_score', lambda asked: rows.extend(asked) or [{3: (-1.0, True)}] * len(asked))
  model.loglikelihood(asked(('p', 'q'), ('pq', 'r'), ('pq ', 'r'), ('pq', ' ')))
  assert [told[first:] for told, first in rows] == [[2], [3], [4], [5]]


def test_what_a_task_says_of_sampling_is_done(model, monkeypatch):
  seen, said = [], Answer([97], [0.0], [3], 'length')
  monkeypatch.setattr(model._engine, 'answer', lambda requests: seen.extend(requests) or [said] * len(requests))
  rule = {'do_sample': True, 'temperature': 2.0, 'top_p': 0.9, 'top_k': 40, 'min_p': 0.01, 'max_new_tokens': 12}
  model.generate_until(asked(*[('ab', rule)] * 2, ('x', rule), ('ab', rule), ('ab', {'max_tokens': 3})))
  drawn, greedy = seen[0], seen[4]
  assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.min_p, drawn.max_new_tokens) == (2.0, 0.9, 40, 0.01, 12)
  assert [request.seed for request in seen] == [0, 1, 0, 2, 0], 'each repeat has its own, what is not drawn has none'
  assert (greedy.temperature, greedy.max_new_tokens) == (0.0, 3)


def test_a_task_has_a_line_for_each_depth(model):
  from lm_eval.tasks import TaskManager
  from lm_eval.utils import make_table

  from latent_loop.interop.harness import by_depth

  tasks = TaskManager(include_path='tests/lm_eval_tasks', include_defaults=False)
  given = {'workdir': str(model.workdir), 'depths': '1:16:4'}
  evaluate = by_depth(lm_eval.simple_evaluate)
  found = evaluate('latent_loop', given, tasks=['counting'], task_manager=tasks, bootstrap_iters=0)
  lines = make_table(found).splitlines()[2:]
  assert [line.split('|')[1].strip() for line in lines] == [f'counting_depth_{d}' for d in ('01', '04', '16')]
