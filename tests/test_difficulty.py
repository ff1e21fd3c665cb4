"""Exact match by difficulty and depth: what counts as right, which instances are asked, what is drawn."""

import json
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_loop import calibration, data, difficulty
from latent_loop.batch import Batch
from latent_loop.errors import BadInput
from latent_loop.evals.exact import make_right_eval, whole_answers
from latent_loop.report import heat_map
from latent_loop.trained import Trained
from tests.reading_path import ROOT
from tests.tiny import B, T, mesh_of, random_batch, random_params, rows_of, tiny_config, tiny_model


def test_one_unroll_equals_separate_forward_passes():
  model = tiny_model()
  params, batch, key = random_params(model), random_batch(), jax.random.key(3)
  right_RBT = make_right_eval(model, (1, 3, 4))(params, batch, key)
  forward = jax.jit(model.forward)
  for depth, right_BT in zip((1, 3, 4), right_RBT, strict=True):
    s_BTD = model.init_state(key, jnp.arange(B), T)
    y_BTD = forward(params, s_BTD, batch.tokens_BT, rows_of(batch), depth - 1, 1)
    guess_BT = jnp.argmax(model.scores(params, y_BTD), axis=-1)
    np.testing.assert_array_equal(right_BT, guess_BT == batch.targets_BT)
  assert 0 < np.mean(right_RBT) < 1


def test_an_answer_is_right_when_all_its_bytes_are():
  """Two rows of two documents, of which one has no answer; a wrong byte that does not count does no harm."""
  segments_BT = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 0]])
  weights_BT = np.array([[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 1, 0]], np.float32)
  batch = Batch(segments_BT, segments_BT, weights_BT, segments_BT, segments_BT)
  all_right = np.ones((2, 6), bool)
  one_byte = all_right.copy()
  one_byte[0, 1] = one_byte[0, 3] = one_byte[1, 0] = False
  last = weights_BT == 0
  last[1, 4] = True
  got_RX = whole_answers(np.stack([all_right, one_byte, last]), batch)
  np.testing.assert_array_equal(got_RX, [[1, 1, 1], [0, 1, 1], [0, 0, 0]])


@pytest.fixture(scope='module')
def this():
  """An untrained model of a task."""
  config = tiny_config(
    **{'data.source': 'automaton', 'data.max_difficulty': 3, 'model.vocab_size': 264, 'eval.num_batches': 2}
    | {'data.seq_len': 20}
  )
  model = tiny_model(**{'model.vocab_size': 264})
  return Trained(config, model, random_params(model), mesh_of(), step=7)


def test_every_difficulty_is_asked_at_every_depth(this, tmp_path):
  path = difficulty.write(this, tmp_path, (6, 3), (1, 5))
  numbers = json.loads(path.read_text())
  # An instance has 4 + difficulty tokens; a row of 21 holds three or two of them, and there are 2 x 8 rows.
  assert numbers['instances'] == {'3': 2 * B * 3, '6': 2 * B * 2}
  assert {d: list(row) for d, row in numbers['exact_match'].items()} == {'3': ['1', '5'], '6': ['1', '5']}
  assert all(0 <= x <= 0.5 for row in numbers['exact_match'].values() for x in row.values())
  assert (numbers['chance_accuracy'], numbers['trained_difficulties'], numbers['step']) == (0.1, [1, 3], 7)
  assert difficulty.table(numbers)[1].split() == ['difficulty', 'instances', 'r', '=', '1', 'r', '=', '5']
  assert len(difficulty.table(numbers)) == 4


def test_harder_means_half_as_hard_again_and_twice(this):
  assert difficulty.default_difficulties(this.config.data) == (3, 5, 6)


def test_a_difficulty_that_was_asked_for_does_not_vanish_from_the_exits(this, tmp_path):
  source = data.make_source(this.config)
  with pytest.raises(BadInput, match='seq_len=20 is too short'):
    calibration.write_exits(this, tmp_path, source, 2, difficulties=(3, 1000))
  assert not (tmp_path / 'exits.json').exists()


def test_text_has_no_difficulties(tmp_path):
  config, model = tiny_config(), tiny_model()
  with pytest.raises(BadInput, match='trained on embedded_text, which has no difficulties'):
    difficulty.write(Trained(config, model, {}, mesh_of(), step=1), tmp_path, (1,), (1,))


def test_a_picture_has_the_loop_first_and_baselines_at_their_own_depth():
  run = lambda name, law, mean, match, seed: {
    'name': name, 'task': 'walk', 'depth_law': law, 'mean_depth': mean, 'seed': seed, 'chance_accuracy': 0.1,
    'trained_difficulties': [1, 4], 'exact_match': match,
  }  # fmt: skip
  runs = [run('walk', 'poisson', 2, {'4': {'1': 0.2 + s, '2': 0.9}, '6': {'1': 0, '2': 0.5}}, s) for s in (0, 0.2)]
  runs.append(run('walk_same_params', 'fixed', 1, {'4': {'1': 0.3, '2': 0}, '6': {'1': 0.1, '2': 0}}, 0))
  loops, fixed = heat_map.experiments_of(runs[::-1])['walk']
  assert [run['name'] for run in loops + fixed] == ['walk', 'walk', 'walk_same_params']
  np.testing.assert_allclose(heat_map.column(loops, '1').mean(axis=0), [0.3, 0])
  np.testing.assert_allclose(heat_map.column(fixed, '1'), [[0.3, 0.1]])
  assert heat_map.png_of(runs).startswith(b'\x89PNG')


@pytest.mark.parametrize(
  'broken', [[], {}, {'mean_depth': 4}, {'exact_match': {'4': {'1': 'all'}}}, {'trained_difficulties': 4}]
)
def test_what_is_no_report_of_difficulties_is_refused(broken):
  run = {
    'name': 'walk', 'task': 'walk', 'depth_law': 'fixed', 'mean_depth': 1, 'seed': 0, 'chance_accuracy': 0.1,
    'trained_difficulties': [1, 4], 'exact_match': {'4': {'1': 0.2}},
  }  # fmt: skip
  heat_map.check(run)
  with pytest.raises(BadInput, match='not what launch.evaluate difficulties writes'):
    heat_map.check(run | broken if broken else broken)
  other = run | {'exact_match': {'4': {'2': 0.2}}}
  with pytest.raises(BadInput, match='the runs on walk were asked different'):
    heat_map.experiments_of([run, other])


FAKE = r"""#!/usr/bin/env bash
echo "$@" >>calls
case "$*" in
  *launch.train*--workdir=*flops_0) [ -f repaired ] || exit 2 ;;
  *launch.evaluate*)
    all=$*
    run=${all#*--workdir=}
    run=${run%% *}
    mkdir -p "$run"
    touch "$run/difficulties.json" "$run/exits.json"
    ;;
esac
"""


@pytest.fixture
def drive(tmp_path):
  """drive(script) -> its exit code, with a python that only notes what it is asked; drive.calls(word): those lines."""
  (tmp_path / 'launch').mkdir()
  for name in ('think_longer.sh', 'leave_early.sh', 'env.sh', 'keep_going.sh'):
    shutil.copy(ROOT / 'launch' / name, tmp_path / 'launch')
  python = tmp_path / 'bin' / 'python'
  python.parent.mkdir()
  python.write_text(FAKE)
  python.chmod(0o755)
  environment = {'PATH': f'{python.parent}:{os.environ["PATH"]}', 'VENV': 'none', 'SEEDS': '0'}

  def run(script):
    return subprocess.run(['bash', tmp_path / 'launch' / script], env=environment, timeout=60).returncode

  run.calls = lambda word: [line for line in (tmp_path / 'calls').read_text().splitlines() if word in line]
  return run


def test_thinking_longer_goes_on_where_it_was_cut_off(tmp_path, drive):
  """Two runs fail, are tried again, and the rest is not."""
  assert drive('think_longer.sh') != 0
  count = lambda word: len(drive.calls(word))
  assert (count('launch.train'), count('launch.evaluate'), count('launch.figure')) == (6, 4, 0)
  (tmp_path / 'repaired').touch()
  assert drive('think_longer.sh') == 0
  assert (count('launch.train'), count('launch.evaluate')) == (8, 6)
  (drawn,) = drive.calls('launch.figure')
  assert drawn.count('--run=runs/think_longer/') == 6 and '--run=runs/think_longer/automaton_same_params_0' in drawn


def test_leaving_early_takes_runs_where_they_are_and_evaluates_them_once(drive):
  assert drive('leave_early.sh') == 0 == drive('leave_early.sh')
  assert len(drive.calls('launch.train')) == len(drive.calls('launch.evaluate exits')) == 3
  (task,) = (line for line in drive.calls('launch.evaluate') if 'automaton' in line)
  assert '--workdir=runs/think_longer/automaton_0 --depths=16 --difficulty=4 --difficulty=6' in task
  drawn = drive.calls('launch.figure exits')
  runs = ['leave_early/tiny_text_0', 'think_longer/automaton_0', 'think_longer/shell_game_0']
  assert [part for part in drawn[0].split() if part.startswith('--run')] == [f'--run=runs/{run}' for run in runs]
  assert drawn[0] == drawn[1]
