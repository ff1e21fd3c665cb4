"""The programs as a user meets them: exit codes, sentences, files. Each case is a process of its own."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from latent_loop import benchmark, benchmark_ways, exit_codes, loop, metrics, trained, workdir
from latent_loop.checkpoint import Checkpoints
from latent_loop.config import Config
from latent_loop.errors import BadInput, SaveFailed
from latent_loop.inference.speculate import Draft
from latent_loop.inference.wavefront import Wavefront
from latent_loop.model import depth
from latent_loop.sealing import from_json, to_json
from tests.tiny import tiny_config

ROOT = Path(__file__).parent.parent
TEXT = '--config=experiments/tiny_text.py'


def slow(program: str, args: list[str], words: str):
  """A case that imports JAX before it is refused, so its process takes seconds."""
  return pytest.param(program, args, words, marks=pytest.mark.slow)


def launch(program: str, *args: str, devices: int = 1) -> subprocess.CompletedProcess:
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={devices}')
  env = {**os.environ, 'XLA_FLAGS': flags}
  command = [sys.executable, '-m', f'launch.{program}', *args]
  return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def tiny_run(steps: int = 4, **overrides) -> Config:
  return tiny_config(
    **{
      'name': 'tiny_run',
      'model.vocab_size': 264,
      'model.num_core_layers': 1,
      'data.source': 'addition',
      'data.seq_len': 40,
      'data.max_difficulty': 3,
      'train.num_steps': steps,
      'train.loss_chunk': 20,
      'checkpoint.every_steps': 2,
      'eval.every_steps': 2,
      'eval.num_batches': 1,
      'eval.sample_tokens': 3,
      'log.every_steps': 1,
      **overrides,
    }
  )


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> Path:
  """The workdir of a finished run, made in this process."""
  path = tmp_path_factory.mktemp('runs') / 'finished'
  assert loop.run(tiny_run(), path) == exit_codes.DONE
  return path


@pytest.fixture
def copy(finished, tmp_path) -> Path:
  shutil.copytree(finished, tmp_path / 'copy')
  return tmp_path / 'copy'


def test_a_run_draws_the_depths_that_a_sweep_counts_for_it(finished):
  config, rows = workdir.read_config(finished), metrics.read_lines(finished / 'metrics.jsonl')
  drawn = [depth.draw(config.depth, jax.random.key(config.seed), row['step'] - 1) for row in rows]
  assert rows and [(row['n'], row['k']) for row in rows] == [(int(n), int(k)) for n, k in drawn]


# --- bad input: exit code 2 and a sentence -----------------------------------------------------------


@pytest.mark.parametrize(
  'program,args,words',
  [
    ('train', [], '--config is missing'),
    ('train', ['--config=experiments/nope.py'], 'experiments/nope.py: no such file'),
    ('train', [TEXT, '--bogus'], 'bogus'),
    ('train', [TEXT, '--config.model.widht=3'], "config.model.widht: unknown key; did you mean 'width'?"),
    ('train', [TEXT, '--config.model.width=wide'], 'config.model.width=wide'),
    ('train', [TEXT, '--config.depth.mean=4.5'], '--config.depth.mean=4.5: not a whole number; see'),
    ('train', [TEXT, '--config.optim.learning_rate=abc'], '--config.optim.learning_rate=abc: not a number; see'),
    ('train', [TEXT, '--dry_run=maybe'], '--dry_run=maybe: not true or false; see'),
    ('train', [TEXT, '--config.model.block=foo'], 'choose one of sandwich, pre_norm'),
    ('train', [TEXT], '--workdir is missing'),
    ('train', [TEXT, '--workdir=s3://bucket/run'], 'Orbax, which writes the arrays'),
    ('train', [TEXT, '--workdir=/nonexistent', '--profile_steps=5'], 'first:last'),
    slow('train', [TEXT, '--workdir=/nonexistent', '--config.data.source=foo'], "config.data.source='foo': not known"),
    slow('train', [TEXT, '--workdir=/nonexistent', '--config.model.vocab_size=100'], 'vocab_size=100 is smaller than'),
    slow(
      'train',
      [TEXT, '--workdir=/nonexistent', f'--config.data.seq_len={2**28}', '--config.train.batch_size=1'],
      'less than one row',
    ),
    slow(
      'train',
      [TEXT, '--workdir=/nonexistent', '--init_from=/nonexistent'],
      '--init_from=/nonexistent: no config.json there; give',
    ),
    ('evaluate', ['depths', '--depths=1,2'], '--depths=1,2: not a whole number; for more than one repeat the flag'),
    ('evaluate', ['--workdir=/nonexistent'], 'one of the verbs depths'),
    ('train', [TEXT, 'foo'], 'belongs to no flag'),
    ('train', ['--config=experiments/nope.py', '--config.seed=1'], 'experiments/nope.py: no such file'),
    ('train', [TEXT, '--config.optim.clip_norm=None', '--config.model.rope_base=0'], 'rope_base=0.0 must be above 1'),
    ('train', [TEXT, '--config.train.num_steps=4'], 'warm-up and cooldown take 21 steps'),
    slow('train', [TEXT, '--workdir=/dev/null/x'], '--workdir=/dev/null/x cannot be used'),
    slow('evaluate', ['depths', '--workdir=/nonexistent'], 'no config.json'),
    ('lens', ['--workdir=/nonexistent', '--prompt='], '--prompt is missing or empty'),
    (
      'lens',
      ['--workdir=/nonexistent', '--prompt=a', '--output=/nonexistent/x.html'],
      'not a file in a folder that exists',
    ),
    ('lens', ['--workdir=/nonexistent', '--prompt=a', f'--output={300 * "x"}'], '--output=xxx'),
    ('figure', ['sweep', '--output=/nonexistent/x'], 'not a file in a folder that exists'),
    (
      'figure',
      ['depth_cost', '--output=/nonexistent'],
      '/nonexistent.jsonl does not exist; put there what launch.bench',
    ),
    ('figure', ['study', '--output=/nonexistent'], '/nonexistent.json does not exist; give --run=DIR'),
    ('figure', ['sweep', '--output=/'], 'not a file in a folder that exists'),
    ('sweep', [TEXT], '--workdir is missing'),
    ('audit_data', [], '--config and --workdir are missing; give one of them'),
    (
      'audit_data',
      [TEXT, '--workdir=/nonexistent'],
      '--workdir=/nonexistent: the run has its own config; give one of them',
    ),
    ('prepare_data', ['--input=x', '--output=y', '--min_bytes=9', '--max_bytes=8'], '--min_bytes=9 is above --max_byt'),
    ('study', ['--workdir=/nonexistent'], '--study is missing'),
    ('study', ['--study=/nonexistent.py', '--workdir=/nonexistent'], 'no such file'),
    ('study', ['--study=README.md', '--workdir=/nonexistent'], 'it does not run'),
    ('generate', ['--workdir=/nonexistent'], '--prompt=TEXT or --prompts=FILE'),
    ('generate', ['--workdir=/nonexistent', '--prompts=/nonexistent.txt'], 'no such file'),
    ('generate', ['--workdir=/nonexistent', f'--prompts={300 * "x"}'], '--prompts=xxx'),
    ('generate', ['--workdir=/nonexistent', '--prompt=a', '--stop='], '--stop is empty'),
  ],
)
def test_bad_input_is_exit_code_2_and_a_sentence(program, args, words):
  result = launch(program, *args)
  assert result.returncode == 2, result.stderr
  assert words in result.stderr
  assert 'Traceback' not in result.stderr
  assert result.stderr.startswith('error: ') and len(result.stderr.splitlines()) == 1
  assert not result.stdout


def test_help_names_every_flag_of_training():
  result = launch('train', '--help')
  assert result.returncode == 0
  for flag in ('--config:', '--config.KEY=VALUE', '--workdir', '--cluster', '--num_processes', '--time_limit'):
    assert flag in result.stdout, flag


def without(stream: int) -> list[str]:
  """The beginning of a command that runs without this one of the standard streams."""
  return ['bash', '-c', f'exec "$@" {stream}>&-', 'bash']


def test_a_closed_standard_input_is_missed_only_where_it_is_read():
  for flag, words in (
    ('--prompt=a', '/nonexistent'),
    ('--prompts=-', 'input is closed'),
    ('--chat', 'input is closed'),
  ):
    command = [*without(0), sys.executable, '-m', 'launch.generate', '--workdir=/nonexistent', flag]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.startswith('error: ') and words in result.stderr, result.stderr


@pytest.mark.parametrize('times', [1, 100_000])
def test_a_reader_that_leaves_early_is_told_in_a_sentence(times):
  """As `| head` does; and output that is closed from the start is not missed."""
  code = f'from launch import program; program.run(lambda: print("few " * {times}) or 0)'
  command = [sys.executable, '-c', code]
  start = functools.partial(subprocess.run, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
  read, write = os.pipe()
  os.close(read)
  result = start(command, stdout=write)
  os.close(write)
  assert result.returncode == 1 and result.stderr.startswith('error: what reads the output left'), result.stderr
  assert len(result.stderr.splitlines()) == 1, result.stderr
  result = start([*without(1), *command])
  assert (result.returncode, result.stderr) == (0, '')


def test_lines_of_standard_input_that_are_no_utf8_are_bad_input():
  """In a locale that is strict about it; blank lines are passed over."""
  env, command = {**os.environ, 'PYTHONIOENCODING': 'utf-8:strict'}, [sys.executable, '-m', 'launch.generate']
  command += ['--workdir=/nonexistent', '--prompts=-']
  lines = b'{"prompt": "a"}\n\n\xff\n'
  result = subprocess.run(command, cwd=ROOT, env=env, input=lines, capture_output=True, timeout=60)
  assert result.returncode == 2 and result.stderr.startswith(b'error: standard input, line 3: not JSON'), result.stderr


def test_a_batch_that_does_not_divide_over_the_mesh(tmp_path):
  result = launch('train', TEXT, f'--workdir={tmp_path}/x', '--config.train.batch_size=12', devices=8)
  assert result.returncode == 2
  assert (
    'config.train.batch_size=12 does not divide over dcn x data x fsdp x num_microbatches = 1 x 8 x 1 x 1'
    in result.stderr
  )
  assert not (tmp_path / 'x').exists()


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_the_devices(tmp_path):
  result = launch('train', TEXT, f'--workdir={tmp_path}/x', '--config.mesh.data=3')
  assert result.returncode == 2 and 'does not fit 1 device' in result.stderr


def test_a_broken_experiment_file(tmp_path):
  (tmp_path / 'broken.py').write_text('def get_config():\n  return 1 +\n')
  result = launch('train', f'--config={tmp_path}/broken.py')
  assert result.returncode == 2 and 'does not run (SyntaxError' in result.stderr


def test_a_workdir_of_another_config(finished):
  result = launch('train', TEXT, f'--workdir={finished}')
  assert result.returncode == 2
  assert 'belongs to another config' in result.stderr and "name was 'tiny_run', is 'tiny_text'" in result.stderr


@pytest.mark.slow
def test_a_checkpoint_of_another_shape(copy):
  text = (copy / 'config.json').read_text().replace('"mlp_dim": 40', '"mlp_dim": 44')
  (copy / 'config.json').write_text(text)
  result = launch('generate', f'--workdir={copy}', '--prompt=1+1=')
  assert result.returncode == 2 and 'mlp/down/kernel' in result.stderr
  assert 'float32[40,48] in the checkpoint and float32[44,48] in this config' in result.stderr


# --- in this process: the same rules, faster -----------------------------------------------------------


def test_damaged_checkpoints_are_a_sentence_not_a_traceback(copy):
  for path in (copy / 'checkpoints').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:7])
  for use in (lambda: trained.load(copy), lambda: loop.run(tiny_run(), copy)):
    with pytest.raises(BadInput, match='no checkpoint there is good, and a run is never started over'):
      use()


def test_changed_data_is_refused(copy, monkeypatch):
  original = loop.data.make_source

  def changed(config):
    source = original(config)
    source.fingerprint = 'other'
    return source

  monkeypatch.setattr(loop.data, 'make_source', changed)
  with pytest.raises(BadInput, match='the data changed since the run began'):
    loop.run(tiny_run(), copy)


def test_loading_leaves_a_save_under_way_alone(copy):
  """Another process may be training in this folder."""
  unfinished = copy / 'checkpoints' / '6.orbax-checkpoint-tmp'
  unfinished.mkdir()
  assert trained.load(copy).step == 4
  assert unfinished.is_dir()


def test_a_profile_outside_the_run_is_refused(tmp_path):
  with pytest.raises(BadInput, match='--profile_steps=2:9 lies outside the steps of the run, 0:4'):
    loop.run(tiny_run(), tmp_path / 'run', profile_steps=(2, 9))


def test_a_profile_of_steps_that_are_done_lets_the_same_command_go_on(copy, capsys):
  (copy / 'depth_report.json').unlink()
  assert loop.run(tiny_run(), copy, profile_steps=(1, 3)) == exit_codes.DONE
  assert '--profile_steps=1:3: step 1 is done already' in capsys.readouterr().out
  assert (copy / 'depth_report.json').exists() and not (copy / 'profile').exists()


def test_a_start_that_is_refused_changes_no_config(copy):
  with pytest.raises(BadInput, match='--profile_steps=4:5 lies outside the steps of the run, 0:4'):
    (copy / 'depth_report.json').unlink()
    loop.run(tiny_run(**{'log.every_steps': 2}), copy, profile_steps=(4, 5))
  assert workdir.read_config(copy) == tiny_run()


def test_a_full_disk_at_a_start_is_a_failed_save(copy):
  (copy / 'depth_report.json').unlink()
  (copy / 'config.json.tmp').mkdir()
  with pytest.raises(SaveFailed, match='config.json: cannot be written'):
    loop.run(tiny_run(**{'log.every_steps': 2}), copy)
  (copy / 'config.json.tmp').rmdir()
  (copy / 'samples.txt.tmp').mkdir()
  with pytest.raises(SaveFailed, match='samples.txt: cannot be written'):
    loop.run(tiny_run(**{'log.every_steps': 2}), copy)


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(copy):
  (copy / 'checkpoints').rename(copy / 'elsewhere')
  for make in (lambda: None, lambda: (copy / 'checkpoints').symlink_to(copy / 'not mounted')):
    make()
    with pytest.raises(BadInput, match='checkpoints: not there, where metrics.jsonl has step 4'):
      loop.run(tiny_run(), copy)
  (copy / 'checkpoints').unlink()
  (copy / 'elsewhere').rename(copy / 'checkpoints')
  assert loop.run(tiny_run(), copy) == exit_codes.DONE


def test_a_run_that_was_stopped_ahead_of_its_first_save_begins_again(copy):
  """As of a program that made the folder with the first save only; with another interval, too."""
  shutil.rmtree(copy / 'checkpoints')
  (copy / 'depth_report.json').unlink()
  lines = (copy / 'metrics.jsonl').read_text().splitlines(keepends=True)
  (copy / 'metrics.jsonl').write_text(''.join(lines[:2]))
  assert loop.run(tiny_run(**{'checkpoint.every_steps': 1}), copy) == exit_codes.DONE


def test_a_time_limit_does_not_keep_a_run_from_its_report(copy):
  (copy / 'depth_report.json').unlink()
  assert loop.run(tiny_run(), copy, deadline=0.0) == exit_codes.DONE and (copy / 'depth_report.json').exists()


@pytest.mark.parametrize('place', ['close', 'finish'])
def test_a_signal_behind_the_last_step_is_no_loss(copy, monkeypatch, capsys, place):
  """While the last save is waited for, and in the report."""
  (copy / 'depth_report.json').unlink()
  at = {'close': Checkpoints, 'finish': loop}[place]
  original = getattr(at, place)

  def signaled(this):
    signal.raise_signal(signal.SIGTERM)
    original(this)

  def say(line):
    print(line)
    if 'with all steps saved' in line:
      signal.raise_signal(signal.SIGTERM)  # schedulers repeat it

  with monkeypatch.context() as patch:
    patch.setattr(at, place, signaled)
    patch.setattr(loop, 'say', say)
    assert loop.run(tiny_run(), copy) == exit_codes.PREEMPTED
  assert 'with all steps saved' in capsys.readouterr().out and not (copy / 'depth_report.json').exists()
  assert loop.run(tiny_run(), copy) == exit_codes.DONE and (copy / 'depth_report.json').exists()


def test_what_has_no_validation_is_refused_ahead_of_the_first_step(tmp_path):
  with pytest.raises(BadInput, match='has no validation instance'):
    loop.run(tiny_run(**{'data.max_difficulty': 1, 'data.validation_fraction': 1e-9}), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('text', ['[]', 'null', '{}', '{"seed": ', '\x00'])
def test_a_broken_config_json_is_a_sentence(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(BadInput, match='config.json: not a sealed config'):
    trained.load(tmp_path)


def test_safe_changes_are_accepted_and_others_named(copy):
  changed = tiny_run(**{'log.every_steps': 2, 'depth.sigma': 0.3})
  workdir.open_workdir(copy, changed)
  assert from_json((copy / 'config.json').read_text(), '') == tiny_run(), 'nothing is written before the restore'
  lines = workdir.update_config(copy, changed)
  assert 'log.every_steps was 1, is now 2' in lines
  assert from_json((copy / 'config.json').read_text(), '').log.every_steps == 2
  with pytest.raises(BadInput, match='optim.learning_rate was 0.002, is 0.5'):
    workdir.open_workdir(copy, tiny_run(**{'optim.learning_rate': 0.5}))


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
  (tmp_path / 'thesis.tex').write_text('do not touch')
  with pytest.raises(BadInput, match='not the folder of a run'):
    workdir.open_workdir(tmp_path, tiny_run())
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


# --- good input ----------------------------------------------------------------------------------------


def test_a_run_leaves_the_files_of_the_contract(finished):
  names = {p.name for p in finished.iterdir()}
  wanted = {'config.json', 'versions.json', 'metrics.jsonl', 'checkpoints', 'depth_report.html', 'depth_report.png'}
  assert wanted | {'depth_report.json', 'samples.txt'} <= names
  report = json.loads((finished / 'depth_report.json').read_text())
  assert report['mean_depth'] == 6
  assert {'1', '6', '24'} <= report['loss_by_depth'].keys()
  records = [json.loads(line) for line in (finished / 'metrics.jsonl').read_text().splitlines()]
  keys = {
    'step',
    'loss',
    'grad_norm',
    'learning_rate',
    'n',
    'k',
    'tokens_per_second',
    'data_wait_seconds',
    'batch_hash',
  }
  assert [r['step'] for r in records] == [1, 2, 3, 4] and all(keys <= r.keys() for r in records)
  assert (finished / 'config.json').read_text() == to_json(tiny_run())
  assert '<img' in (finished / 'depth_report.html').read_text()
  assert {p.name for p in (finished / 'checkpoints').iterdir()} == {'2', '4'}


def test_a_finished_run_says_so(finished, capsys):
  assert loop.run(tiny_run(), finished) == exit_codes.DONE
  assert 'already finished' in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_generate_and_lens(copy):
  result = launch('evaluate', 'depths', f'--workdir={copy}', '--depths=3', '--depths=2')
  assert result.returncode == 0, result.stderr
  report = json.loads((copy / 'depth_report.json').read_text())
  assert list(report['loss_by_depth']) == ['1', '2', '3', '6', '24']
  result = launch('evaluate', 'difficulties', f'--workdir={copy}', '--difficulty=2', '--depths=6', '--depths=1')
  assert result.returncode == 0 and 'r = 1    r = 6' in result.stdout, result.stderr
  result = launch('figure', 'difficulties', f'--run={copy}', f'--output={copy}/map')
  assert result.returncode == 0 and (copy / 'map.png').exists(), result.stderr
  result = launch(
    'generate',
    f'--workdir={copy}',
    '--prompt=1+1=',
    '--max_new_tokens=3',
    '--temperature=1',
    '--depth=2',
    '--tensor=2',
    devices=2,
  )
  assert result.returncode == 0 and result.stdout.startswith('1+1=')
  result = launch('generate', f'--workdir={copy}', '--prompt=1+1=', '--depth=2', '--speculate=2:8')
  assert result.returncode == 2 and '--speculate=2:8: a draft of 2 iterations saves none' in result.stderr
  result = launch('lens', f'--workdir={copy}', '--prompt=1+1=', f'--output={copy}/lens.html', devices=2)
  assert result.returncode == 0 and 'of 24 iterations on average' in result.stdout, result.stderr
  assert (copy / 'lens.html').read_text().startswith('<!doctype html>')


@pytest.mark.slow
def test_bench_exits_counts_the_prompt_and_what_comes_after_it(copy):
  sizes = ['--prompt_tokens=4', '--new_tokens=6', '--batch_size=3', '--window=2', '--rounds=1', '--repeats=1']
  result = launch('bench', 'exits', f'--workdir={copy}', '--exit=latent-diff:0.5', '--depths=6', *sizes)
  assert result.returncode == 0, result.stderr
  fixed, in_step, continuous = (json.loads(line) for line in result.stdout.splitlines())
  assert [fixed['way'], in_step['way'], continuous['way']] == ['fixed', 'in_step', 'continuous']
  assert fixed['mean_depth'] == 6 and fixed['predicted_speedup'] == fixed['predicted_decoding_speedup'] == 1
  assert continuous['same_tokens_as_in_step'] and continuous['mean_depth'] == in_step['mean_depth'] < 6
  assert 1 < in_step['predicted_speedup'] < in_step['predicted_decoding_speedup'] < 6 / in_step['mean_depth']


@pytest.mark.slow
def test_bench_ahead_counts_what_speculation_and_the_front_compute(copy):
  """The work of plain, exactly: drafts at full depth, all of them accepted, and a front of one position."""
  prompts, effort = benchmark.Prompts(prompt_tokens=4, new_tokens=7, batch_size=3), benchmark.Effort(1, 1)
  ways = benchmark_ways.ahead(trained.load(copy), 4, [Draft(4, 2), Draft(1, 2)], [Wavefront(1)], 0.0, prompts, effort)
  full, shared, draft, shallow, front = ways
  assert full['way'] == shared['way'] == 'plain' and (full['cache'], shared['cache']) == ('full', 'ring:1')
  for line in (full, shared, draft, front):
    assert line['applications_per_token'] == line['iterations_per_token'] == 4 and line['same_tokens_as_plain']
  assert draft['accepted'] == 1 >= shallow['accepted'] and shallow['same_tokens_as_plain']
  assert shallow['applications_per_token'] < shallow['iterations_per_token'] >= 4


def test_dry_run_prints_the_plan_without_devices_or_files(tmp_path):
  result = launch('train', '--config=experiments/huginn_3p5b.py', f'--workdir={tmp_path}/x', '--dry_run')
  assert result.returncode == 0, result.stderr
  assert '3,564,976,800' in result.stdout and 'fsdp=32' in result.stdout
  assert re.search(r'computed +213.0866 +\(29.2098 more: .* remat iteration; 2.5091 less: ', result.stdout)
  assert not (tmp_path / 'x').exists()


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_continues(tmp_path):
  args = [f'--config={tmp_path}/long.py', f'--workdir={tmp_path}/run']
  (tmp_path / 'long.py').write_text(
    'from latent_loop.sealing import from_json, view\n'
    f'def get_config():\n  return view(from_json({to_json(tiny_run(24))!r}, ""))\n'
  )
  command = [sys.executable, '-m', 'launch.train', *args, '--config.checkpoint.every_steps=1000']
  one = {**os.environ, 'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')}
  process = subprocess.Popen(command, cwd=ROOT, env=one, stdout=subprocess.PIPE, text=True)
  for line in process.stdout:
    if line.startswith('step 5/'):
      process.send_signal(signal.SIGINT)
      break
  rest = process.stdout.read()
  assert process.wait(60) == 10 and 'start the same command again' in rest
  result = subprocess.run(command, cwd=ROOT, env=one, capture_output=True, text=True, timeout=300)
  assert result.returncode == 0 and 'continuing at step' in result.stdout
  steps = [json.loads(line)['step'] for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert steps == list(range(1, 25))


@pytest.mark.slow
def test_a_profile_holds_the_scopes(tmp_path):
  config = tiny_run(6)
  assert loop.run(config, tmp_path / 'run', profile_steps=(3, 5)) == exit_codes.DONE
  files = list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))
  assert len(files) == 1
  content = files[0].read_bytes()
  assert all(scope in content for scope in (b'prelude', b'core', b'coda', b'loss'))
  assert time.time() - files[0].stat().st_mtime < 3600
