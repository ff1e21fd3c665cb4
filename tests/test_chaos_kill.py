"""A killed run ends as one that was not; what a kill may leave behind does no harm."""

import json
import os
import signal
import subprocess
import types
from pathlib import Path

import jax.numpy as jnp
import pytest
from matplotlib.figure import Figure

from latent_loop import storage, workdir
from latent_loop.chaos import kill
from latent_loop.checkpoint import Checkpoints
from latent_loop.config import CheckpointConfig
from latent_loop.metrics import JsonLines
from latent_loop.report import depth_report
from tests.tiny import tiny_config

LINES = [{'step': step, 'loss': 0.1 * step, 'batch_hash': f'{step}', 'tokens_per_second': 1.0} for step in (1, 2, 3)]


def leave(folder: Path, lines: list[dict], steps: tuple[int, ...] = (2, 3), add: float = 0.0) -> Path:
  folder.mkdir()
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  with Checkpoints(folder, CheckpointConfig(keep_last=9)) as checkpoints:
    for step in steps:
      checkpoints.save(step, {'a': jnp.arange(4.0), 'b': jnp.arange(3.0) + add}, {})
  return folder


@pytest.mark.parametrize(
  'changes, words',
  [
    ({}, []),
    ({'lines': [{**line, 'tokens_per_second': 2.0} for line in LINES]}, []),
    ({'lines': [*LINES[:2], {**LINES[2], 'loss': 0.3}]}, ['metrics.jsonl: step 3: loss is 0.3, not 0.300000']),
    ({'lines': [*LINES[:2], *LINES[1:]]}, ['step 2 stands there 2 times', 'not the steps of the reference']),
    ({'lines': LINES[1:]}, ['missing: [1]']),
    ({'lines': []}, ['missing: [1, 2, 3]']),
    ({'add': 1e-6}, ['step 2: array b differs', 'step 3: array b differs']),
    ({'steps': (3,)}, ['the checkpoints are those of steps [3], not [2, 3]']),
  ],
)
def test_every_difference_is_named(tmp_path, changes, words):
  reference = leave(tmp_path / 'reference', LINES)
  found = kill.differences(reference, leave(tmp_path / 'other', **{'lines': LINES, **changes}))
  assert len(found) == len(words) and all(word in line for word, line in zip(words, found, strict=True)), found


def test_damaged_and_unfinished_and_set_aside_steps_are_named(tmp_path):
  reference, other = leave(tmp_path / 'reference', LINES), leave(tmp_path / 'other', LINES)
  steps = other / 'checkpoints'
  data = next(path for path in (steps / '3/d').iterdir()) if (steps / '3/d').exists() else next(steps.glob('3/*/d/*'))
  data.write_bytes(data.read_bytes() + b'?')
  (steps / '4.unfinished').touch()
  (steps / 'set_aside/1-0').mkdir(parents=True)
  found = kill.differences(reference, other)
  assert [word in line for word, line in zip(('damaged', 'set aside', 'unfinished'), found, strict=True)] == [True] * 3


class Killed(BaseException):
  pass


def die(*args):
  raise Killed


# --- what a kill may leave behind -------------------------------------------------------------------------


def test_a_kill_while_a_log_is_shortened_costs_no_line(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in LINES))
  monkeypatch.setattr(os, 'replace', die)
  with pytest.raises(Killed):
    JsonLines(path, keep_through=2)
  monkeypatch.undo()
  JsonLines(path, keep_through=2).close()
  assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize('files', [1, 2])
def test_a_kill_before_config_json_is_there_leaves_a_folder_to_start_in(tmp_path, monkeypatch, files):
  """Ahead of the rename of versions.json, or of that of config.json."""
  replace, calls = os.replace, []

  def maybe_die(*args):
    calls.append(args)
    die() if len(calls) == files else replace(*args)

  monkeypatch.setattr(os, 'replace', maybe_die)
  with pytest.raises(Killed):
    workdir.open_workdir(tmp_path / 'run', tiny_config())
  monkeypatch.undo()
  workdir.open_workdir(tmp_path / 'run', tiny_config())
  assert {path.name for path in (tmp_path / 'run').iterdir()} == {'versions.json', 'config.json'}


def test_a_kill_while_the_report_is_written_leaves_no_half_json(tmp_path, monkeypatch):
  """depth_report.json says that a run is finished."""
  monkeypatch.setattr(depth_report, '_draw', lambda *args: Figure())
  monkeypatch.setattr(depth_report, '_page', lambda *args: '')
  monkeypatch.setattr(os, 'replace', die)
  with pytest.raises(Killed):
    depth_report.write(tmp_path, 'x', {'loss': 1.0}, [])
  assert not (tmp_path / 'depth_report.json').exists()


def test_a_file_is_written_whole(tmp_path):
  storage.write(tmp_path / 'a', 'one\n')
  storage.write(tmp_path / 'a', 'two\n')
  assert (tmp_path / 'a').read_text() == 'two\n' and len(list(tmp_path.iterdir())) == 1


# --- real processes ---------------------------------------------------------------------------------------


def test_kills_are_spread_over_the_moments():
  dice = kill.random.Random(0)
  assert kill.schedule(2, dice).count(kill.inside_a_save) == 1
  moments = kill.schedule(20, dice)
  assert [moments.count(moment) for moment in (kill.inside_a_save, kill.after_some_steps, kill.while_starting)] == [
    10, 5, 5,
  ]  # fmt: skip


def test_a_save_that_ends_while_it_is_looked_at_is_none_to_kill_in(monkeypatch):
  """A process is stopped before it is looked at for the last time, goes on to its next save, and dies there."""
  signals, killpg = [], os.killpg

  def note(group, number):
    signals.append(number)
    killpg(group, number)

  class Sleeper(kill.Start):
    newest_before = -1
    folder = types.SimpleNamespace(steps=list)

    def __init__(self):
      self._process = subprocess.Popen(['sleep', '60'], start_new_session=True)

    def saving(self):
      return [2] if signal.SIGCONT in signals else [] if signals else [1]

  monkeypatch.setattr(os, 'killpg', note)
  with Sleeper() as start:
    kill.inside_a_save(start, kill.random.Random(0), 0)
    assert start.running() and signals == [signal.SIGSTOP, signal.SIGCONT, signal.SIGSTOP]
  assert not start.running() and signals[3:] == [signal.SIGKILL]
  with Sleeper() as start:
    killpg(start._process.pid, signal.SIGTERM)
    assert not start.stopped_inside(start.saving()) and not start.running() and start.end() == -signal.SIGTERM


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, monkeypatch):
  """launch.chaos kill, twice, on one device."""
  flags = os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')
  monkeypatch.setenv('XLA_FLAGS', flags)
  said = []
  result = kill.kill(2, 0, tmp_path, said.append, None)
  assert result['ok'] and not said, said
  assert (result['kills'], result['starts'], result['kills_inside_a_save'] >= 1) == (2, 3, True)
  assert result['steps_compared'] == {'metrics.jsonl': 44, 'evals.jsonl': 3} and result['arrays_compared'] > 100
