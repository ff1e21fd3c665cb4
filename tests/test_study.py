"""A study trains what is not done yet, side by side, stops as a whole, and says what each variant reached."""

import dataclasses
import json
import os
import runpy
import signal
import threading
import time
from pathlib import Path

import pytest

from latent_loop import price, study
from latent_loop.errors import BadInput
from latent_loop.exit_codes import BAD_INPUT, DONE, PREEMPTED
from latent_loop.report import study as figure
from latent_loop.sealing import seal, to_json
from tests.tiny import tiny_config

STUDIES = sorted((Path(__file__).parent.parent / 'experiments/studies').glob('*.py'))
DEPTHS = (1, 2, 8)


def write_report(trial: study.Trial, loss: float = 1.0) -> None:
  """What a trial leaves behind."""
  trial.folder.mkdir(parents=True, exist_ok=True)
  by_depth = {str(depth): loss / depth for depth in DEPTHS}
  report = {'chance_accuracy': None, **{key: by_depth for key in study._KEPT}}
  (trial.folder / 'depth_report.json').write_text(json.dumps(report))
  logged = [{'step': i, 'grad_norm': 2.0 / i, 'tokens_per_second': 10.0 * i} for i in (1, 2, 3)]
  (trial.folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in logged))


@dataclasses.dataclass(frozen=True)
class Scripted(study.Trial):
  """Its two commands are lines of Python instead of programs."""

  lines: tuple[str, str] = ('pass', 'pass')

  def commands(self, depths):
    return [['-c', f'import os, time; here = {str(self.folder)!r}; {line}'] for line in self.lines]


def scripted(tmp_path: Path, **lines: tuple[str, str]) -> list[Scripted]:
  return [Scripted(name, tiny_config(), tmp_path / name, both) for name, both in lines.items()]


def test_every_variant_has_every_seed_the_first_seed_first():
  variants = {'a': tiny_config(), 'b': tiny_config(**{'depth.mean': 2, 'depth.backprop_depth': 1})}
  todo = study.trials(variants, (3, 5), Path('w'))
  assert [(trial.variant, trial.config.seed) for trial in todo] == [('a', 3), ('b', 3), ('a', 5), ('b', 5)]
  assert [trial.folder for trial in todo] == [Path('w/a-3'), Path('w/b-3'), Path('w/a-5'), Path('w/b-5')]
  assert todo[1].config.depth == variants['b'].depth


def test_what_is_done_is_not_done_again_and_a_deeper_question_is_asked_again(tmp_path):
  done, todo = scripted(tmp_path, done=('open(here + "-ran", "w")', 'pass'), todo=('open(here + "-ran", "w")', 'pass'))
  write_report(done)
  said = []
  assert study.run([done, todo], DEPTHS, 2, said.append) == DONE
  assert sorted(path.name for path in tmp_path.glob('*-ran')) == ['todo-ran']
  assert said[0] == '2 trials, 1 to do' and said[1].startswith('todo: done')
  assert study.run([done], (*DEPTHS, 64), 2, said.append) == DONE
  assert (tmp_path / 'done-ran').exists()


def test_a_variant_that_changed_is_not_taken_for_what_was_trained(tmp_path):
  (trial,) = scripted(tmp_path, a=('pass', 'pass'))
  write_report(trial)
  (trial.folder / 'config.json').write_text(to_json(trial.config))
  assert study.run([trial], DEPTHS, 1, lambda line: None) == DONE
  changed = dataclasses.replace(trial, config=tiny_config(**{'depth.mean': 7}))
  with pytest.raises(BadInput, match='a belongs to another config: depth.mean was 6, is 7; undo the change'):
    study.run([changed], DEPTHS, 1, lambda line: None)


def test_each_has_its_share_of_the_cores_and_is_evaluated_behind_its_training(tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0, 1, 2, 3})
  look = 'open(here + "-cores", "w").write(os.environ["NPROC"])'
  (trial,) = scripted(tmp_path, a=(look, 'os.rename(here + "-cores", here + "-seen")'))
  assert study.run([trial], DEPTHS, 2, lambda line: None) == DONE
  assert (tmp_path / 'a-seen').read_text() == '2'


def test_after_a_trial_that_fails_nothing_more_is_started(tmp_path):
  ran = 'open(here + "-ran", "w")'
  lines = {'bad': ('print("why"); raise SystemExit(2)', 'pass'), 'slow': ('time.sleep(3)', ran), 'next': (ran, 'pass')}
  said = []
  assert study.run(scripted(tmp_path, **lines), DEPTHS, 2, said.append) == BAD_INPUT
  assert not list(tmp_path.glob('*-ran'))
  assert said[-1] == f'bad: ended with exit code 2; its words are in {tmp_path / "bad"}.log'
  assert (tmp_path / 'bad.log').read_text() == 'why\n'


def test_a_signal_reaches_all_that_run_and_ends_the_study(tmp_path):
  lines = {'long': ('open(here + "-ran", "w"); time.sleep(60)', 'pass'), 'next': ('open(here + "-ran", "w")', 'pass')}

  def stop():
    deadline = time.monotonic() + 60
    while not (tmp_path / 'long-ran').exists() and time.monotonic() < deadline:
      time.sleep(0.01)
    if (tmp_path / 'long-ran').exists():  # or the study is not there to take the signal
      os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=stop, daemon=True)
  thread.start()
  began = time.monotonic()
  assert study.run(scripted(tmp_path, **lines), DEPTHS, 1, lambda line: None) == PREEMPTED
  thread.join()
  assert time.monotonic() - began < 30 and not (tmp_path / 'next-ran').exists()


def test_results_say_what_each_trial_cost_and_reached(tmp_path):
  todo = study.trials({'a': tiny_config(), 'b': tiny_config(**{'depth.kind': 'fixed'})}, (0, 1), tmp_path)
  for trial, loss in zip(todo, (1.0, 3.0, 2.0, 3.0), strict=True):
    write_report(trial, loss)
  rows = study.results(todo)
  assert [(row['variant'], row['seed']) for row in rows] == [('a', 0), ('b', 0), ('a', 1), ('b', 1)]
  assert rows[1]['training_flops'] == price.price(todo[1].config).flops != rows[0]['training_flops']
  assert (rows[0]['tokens_per_second'], rows[0]['largest_grad_norm']) == (20.0, 2.0)
  lines = study.table(rows)
  assert lines[1].split()[:3] == ['a', '1.5000', '±0.5000'] and lines[2].split()[1:3] == ['3.0000', '±0.0000']
  found = json.loads(study.save(tmp_path, 'x', rows).read_text())
  assert found == {'study': 'x', 'runs': rows}
  assert figure.png_of([found, found]).startswith(b'\x89PNG')


@pytest.mark.parametrize('path', STUDIES, ids=lambda path: path.stem)
def test_the_variants_of_a_study_are_configs_and_differ(path):
  found = runpy.run_path(str(path))
  variants = {name: seal(config) for name, config in found['get_variants']().items()}
  assert len({repr(config) for config in variants.values()}) == len(variants) > 1
  assert found['DEPTHS'] == tuple(sorted(found['DEPTHS'])) and found['DEPTHS'][0] == 1
  assert f'--study=experiments/studies/{path.name}' in found['__doc__'], 'its command'


def test_the_baselines_of_language_cost_what_they_say():
  """Equal parameters, equal tokens, equal training FLOPs within 2 %, as the depths of seed 0 are drawn."""
  variants = runpy.run_path(str(next(path for path in STUDIES if path.stem == 'language')))['get_variants']()
  cost = {name: price.price(seal(config)) for name, config in variants.items()}
  loop = cost['loop']
  assert cost['same_params'].parameters == cost['same_params_longer'].parameters == loop.parameters
  assert cost['same_params'].tokens == cost['same_flops'].tokens == loop.tokens
  for name in ('same_params_longer', 'same_flops'):
    assert cost[name].flops == pytest.approx(loop.flops, rel=0.02), name
