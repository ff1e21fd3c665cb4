"""What the program of figures gathers and draws; wrong files are refused in words."""

import json

import pytest
from absl.testing import flagsaver

from latent_loop.errors import BadInput
from latent_loop.report import depth_cost, exits, sweep
from launch import figure

PNG = b'\x89PNG'


def exits_of(name: str, seed: int = 0) -> dict:
  """exits.json of a run, as far as it is drawn."""
  rule = lambda flops, loss: {'threshold': 1.0, 'every': 1, 'flops_per_token': flops, 'loss': loss, 'mean_depth': 1.5}
  left = lambda *counts: {'tokens': sum(counts), 'mean_depth': 1.5, 'left_at': list(counts)}
  return {
    'name': name,
    'seed': seed,
    'depth': 2,
    'full': {'flops_per_token': 10.0, 'loss': 1.0},
    'fixed': [{'depth': 1, 'flops_per_token': 5.0, 'loss': 1.5}, {'depth': 2, 'flops_per_token': 10.0, 'loss': 1.0}],
    'criteria': {'kl': [rule(9.0, 1.2), rule(8.0, 1.1 + 1e-9), rule(5.0, 1.4), rule(7.0, 1.4)], 'cosine': []},
    'groups': {'exit': 'kl:1:1:1', 'of': {'difficulty 2': left(3, 1), 'difficulty 3': left(1, 3)}},
  }


SWEEP = {
  'runs': [
    {'width': w, 'mean_depth': d, 'tokens': t, 'training_flops': w * d * t, 'loss': 1 / d + 1 / w}
    for w in (1, 2) for d in (1, 2) for t in (10, 20)
  ],
  'law': {'law': {'tokens': {'exponent': -0.1, 'low': -0.2, 'high': 0.0}}, 'runs': 8, 'error': 0.1},
}  # fmt: skip


def test_only_rules_that_no_cheaper_one_beats_are_kept():
  kept = exits.short(exits_of('a'))['criteria']
  assert [(row['flops_per_token'], row['loss']) for row in kept['kl']] == [(5.0, 1.4), (8.0, 1.1)]
  assert kept['cosine'] == []


def test_exits_of_several_experiments_and_seeds_are_drawn_also_where_nobody_may_leave():
  never = exits_of('b')
  del never['groups']
  assert exits.png_of([exits_of('a'), exits_of('a', 1), never]).startswith(PNG)


@pytest.mark.parametrize('law', [SWEEP['law'], None])
def test_a_sweep_is_drawn_with_its_law_or_without(law):
  assert sweep.png_of([{**SWEEP, 'law': law}]).startswith(PNG)


@pytest.mark.parametrize('sent,raised', [({'gather_once': 5, 'gather_per_iteration': 9}, 100), ({}, None)])
def test_the_cost_of_depth_is_drawn_also_where_little_is_known(sent, raised):
  point = lambda n, k: {
    'mode': 'depth', 'n': n, 'k': k, 'seconds_median': 1.0, 'predicted_seconds': 0.5, 'temporary_bytes': 90,
    'measured_temporary_bytes': raised, 'sent_devices': 8, 'sent_bytes': sent,
  }  # fmt: skip
  lines = [{'mode': 'machine'}, point(0, 1), point(4, 1), point(0, 2)]
  assert depth_cost.png_of(lines).startswith(PNG)


@pytest.fixture
def draw(tmp_path):
  """draw(verb, folders): the program, in this process; its output is tmp_path / 'out'."""

  def run(verb, folders=()):
    figure.flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(output=str(tmp_path / 'out'), run=[str(folder) for folder in folders]):
      return figure.main(verb)

  return run


def test_runs_are_gathered_short_and_drawn_again_from_that_file_alone(tmp_path, draw):
  folders = [tmp_path / name for name in 'ab']
  for folder in folders:
    folder.mkdir()
    (folder / 'exits.json').write_text(json.dumps(exits_of(folder.name)))
  assert draw('exits', folders) == 0
  gathered = json.loads((tmp_path / 'out.json').read_text())
  assert gathered == {'runs': [exits.short(exits_of('a')), exits.short(exits_of('b'))]}
  first = (tmp_path / 'out.png').read_bytes()
  (tmp_path / 'out.png').unlink()
  assert draw('exits') == 0 and (tmp_path / 'out.png').read_bytes() == first and first.startswith(PNG)


@pytest.mark.parametrize('content', ['{', '[]', '{}', '{"runs": [], "law": null}', '{"runs": 3, "law": 1}'])
def test_a_file_of_something_else_is_named_and_nothing_is_overwritten(content, tmp_path, draw):
  (tmp_path / 'sweep.json').write_text(content)
  (tmp_path / 'out.json').write_text('kept')
  with pytest.raises(BadInput, match=rf'{tmp_path}/sweep\.json'):
    draw('sweep', [tmp_path])
  assert (tmp_path / 'out.json').read_text() == 'kept' and not (tmp_path / 'out.png').exists()


def test_runs_that_cannot_be_drawn_together_replace_nothing(tmp_path, draw):
  run = lambda depth: {
    'name': 'walk', 'task': 'walk', 'depth_law': 'fixed', 'mean_depth': depth, 'seed': 0, 'chance_accuracy': 0.1,
    'trained_difficulties': [1, 4], 'exact_match': {'4': {str(depth): 0.2}},
  }  # fmt: skip
  for depth in (1, 2):
    (tmp_path / str(depth)).mkdir()
    (tmp_path / str(depth) / 'difficulties.json').write_text(json.dumps(run(depth)))
  (tmp_path / 'out.json').write_text('kept')
  with pytest.raises(BadInput, match='/1, .*/2: the runs on walk were asked different difficulties'):
    draw('difficulties', [tmp_path / '1', tmp_path / '2'])
  assert (tmp_path / 'out.json').read_text() == 'kept'
  with pytest.raises(BadInput, match=f'^{tmp_path}/3/difficulties.json: no such file'):
    draw('difficulties', [tmp_path / '3'])


@pytest.mark.parametrize('content', ['', '{}', '[', '{"mode": "depth", "n": ' + '9' * 400 + '}', '[' * 10**5])
def test_lines_of_something_else_are_refused(content, tmp_path, draw):
  (tmp_path / 'out.jsonl').write_text(content)
  with pytest.raises(BadInput, match=f'^{tmp_path}/out.jsonl: not '):
    draw('depth_cost')
