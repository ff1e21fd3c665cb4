"""Preparation by Apache Beam: the bytes of a local run; what a worker meets comes back as a sentence."""

import dataclasses
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from latent_loop.errors import BadInput
from latent_loop.prepare import beam, inputs, run
from latent_loop.shards import manifest, records
from tests.reading_path import ROOT
from tests.test_prepare import Killed, bytes_of, command_of, request_of, write_corpus

_UNIT_BYTES, _SHARD_BYTES = 6_000, 30_000  # so small that a little text makes many


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('corpus')
  write_corpus(folder)
  return folder


@pytest.fixture
def small_pieces(monkeypatch):
  monkeypatch.setattr(inputs, '_LEAST_UNIT_BYTES', _UNIT_BYTES)
  monkeypatch.setattr(run, 'SHARD_BYTES', _SHARD_BYTES)


def installed() -> bool:
  """Whether launch/beam.sh has done it in minutes; if not, it ends with all that it started."""
  env = {**os.environ, 'PIP_NO_COMPILE': '0'}  # 0 is yes, to pip; most of it is never imported
  command = ['bash', 'launch/beam.sh', '--help']
  with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, start_new_session=True) as process:
    try:
      return process.wait(timeout=200) == 0
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      return False


@pytest.fixture(scope='module')
def python() -> str:
  """The Python of Beam's environment, which the first run in a checkout installs: half a minute."""
  assert any(installed() for _ in range(3)), 'launch/beam.sh failed three times'  # downloads do, now and then
  return str(ROOT / '.venv_beam' / 'bin' / 'python')


def begun(request: run.Request, monkeypatch) -> None:
  """A local run that is killed when it names its seventh file."""
  left, rename = iter(range(6)), records.os.replace

  def replace(source, target):
    if next(left, None) is None:
      raise Killed
    rename(source, target)

  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(records.os, 'replace', replace)
    run.prepare(request, lambda line: None)


@pytest.mark.slow
def test_beam_writes_the_bytes_of_a_local_run_also_where_one_was_begun(
  corpus, python, small_pieces, tmp_path, monkeypatch
):
  run.prepare(request_of(corpus, tmp_path / 'local'), lambda line: None)
  expected, versions = bytes_of(tmp_path / 'local'), {}
  for name in ('fresh', 'begun'):
    request = request_of(corpus, tmp_path / name, runner='DirectRunner')
    if name == 'begun':
      begun(dataclasses.replace(request, runner='local'), monkeypatch)
    command = command_of(request, _UNIT_BYTES, _SHARD_BYTES, python)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    found = bytes_of(request.output)
    manifests = [json.loads(files.pop(manifest.NAME)) for files in (found, dict(expected))]
    for one in manifests:
      versions = one['about'].pop('versions')  # Beam's environment has another pyarrow
      del one['seal']
    assert manifests[0] == manifests[1] and 'array_record' in versions
    assert found == {name: raw for name, raw in expected.items() if name != manifest.NAME} and len(found) > 10


@pytest.mark.slow
@pytest.mark.parametrize(
  'flags,words',
  [
    (['--runner=DirectRunner'], 'bad.jsonl, the line at byte 14: not JSON'),
    (['--runner=NoRunner'], '--runner=NoRunner: the pipeline failed'),
  ],
)
def test_bad_input_is_exit_code_2_and_a_sentence_through_beam(flags, words, python, tmp_path):
  (tmp_path / 'bad.jsonl').write_text('{"text": "a"}\n{"text": \n')
  command = [python, '-m', 'launch.prepare_data', f'--input={tmp_path}/*.jsonl', f'--output={tmp_path}/out', *flags]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert result.returncode == 2 and words in result.stderr and 'Traceback' not in result.stderr, result.stderr


def test_without_beam_the_sentence_names_its_script(corpus, tmp_path):
  with pytest.raises(BadInput, match='--runner=DirectRunner: Apache Beam is not installed here.*bash launch/beam.sh'):
    run.prepare(request_of(corpus, tmp_path / 'out', runner='DirectRunner'), print)


@dataclasses.dataclass(frozen=True)
class Part:
  key: str


@pytest.mark.parametrize('kind', [BadInput, OSError])
def test_a_fault_on_a_worker_is_raised_where_the_work_was_asked_for(kind, tmp_path):
  def fail(part, work):
    raise kind('a sentence')

  beam._do(fail, (Part('k'), tmp_path))
  with pytest.raises(kind, match='a sentence'):
    beam._result('k', tmp_path)
  with pytest.raises(BadInput, match='on a disk that all of them see'):
    beam._result('k', tmp_path)
