"""A run saved on 8 devices goes on with others and more processes: the same stream of tokens, depths and losses.

With its workdir on this machine, and in an object store that is slow and fails now and then.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from latent_loop import exit_codes, loop, storage
from latent_loop.chaos import kill
from latent_loop.checkpoint.folder import Folder
from latent_loop.config import Config
from latent_loop.metrics import read_lines
from latent_loop.parallel import mesh as meshes
from launch import program
from tests.object_store import BUCKET, STORE
from tests.test_hosts import bash, small_config, small_run

pytestmark = pytest.mark.slow
SAVED, STEPS = 2, 7  # the step that the others go on from, and their last
ROUGH = {'delay_secs': 0.003, 'fail_every': 101}  # a request that fails costs half a second or one


@pytest.fixture(scope='module', autouse=True)
def compiled_once() -> Iterator[None]:
  """Runs of one mesh share their programs, wherever their files are: compiling is nearly all of the time here."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ('make_sharded_state', 'make_train_step'):
      patch.setattr(loop, name, remembered(getattr(loop, name)))
    patch.setattr(loop, 'finish', lambda this: None)  # the report takes a while
    yield


def remembered(make):
  made = {}

  def once(config, model, optimizer, mesh, *specs):
    key = dataclasses.replace(config, mesh=None), mesh
    if key not in made:
      made[key] = make(config, model, optimizer, mesh, *specs)
    return made[key]

  return once


def on_devices(patch: pytest.MonkeyPatch, count: int) -> None:
  make = meshes.make_mesh
  patch.setattr(loop.meshes, 'make_mesh', lambda cfg: make(cfg, jax.devices()[:count]))


def on_mesh(config: Config, **sizes: int) -> Config:
  return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))


SIZES = {'checkpoint.every_steps': SAVED, 'train.num_steps': STEPS}
CONFIG = small_config(**SIZES)


@pytest.fixture(scope='module')
def local(tmp_path_factory) -> storage.Path:
  """All steps on 8 devices, fsdp 8."""
  workdir = tmp_path_factory.mktemp('eight') / 'run'
  assert loop.run(on_mesh(CONFIG, fsdp=8), workdir) == loop.DONE
  return workdir


@pytest.fixture(scope='module')
def remote() -> storage.Path:
  """The same, in the store."""
  STORE.start()
  workdir = storage.path(f'gs://{BUCKET}/eight')
  with STORE.faults(**ROUGH):
    assert loop.run(on_mesh(CONFIG, fsdp=8), workdir) == loop.DONE
  return workdir


def as_saved(run: storage.Path, tmp_path) -> storage.Path:
  """A copy of `run` as it was when step SAVED had just been saved."""
  workdir = tmp_path / 'run' if storage.is_local(run) else run.parent / tmp_path.name
  for name in storage.files_below(run):
    if not name.startswith('checkpoints/') or name.startswith(f'checkpoints/{SAVED}/'):
      (workdir / name).parent.mkdir(parents=True, exist_ok=True)
      storage.write(workdir / name, (run / name).read_bytes())
  return workdir


def assert_goes_on(run: storage.Path, workdir: storage.Path, bitwise: bool, through: int = STEPS) -> None:
  wanted, got = (read_lines(place / 'metrics.jsonl') for place in (run, workdir))
  assert len(got) >= through
  wanted = wanted[: len(got)]
  for key in ('step', 'batch_hash', 'n', 'k'):
    assert [record[key] for record in got] == [record[key] for record in wanted], key
  assert got[:SAVED] == wanted[:SAVED], 'not trained again'
  next_losses = got[SAVED]['loss'], wanted[SAVED]['loss']
  np.testing.assert_allclose(*next_losses, rtol=0 if bitwise else 1e-6)
  np.testing.assert_allclose([r['loss'] for r in got], [r['loss'] for r in wanted], rtol=1e-5)


@pytest.mark.parametrize(
  'place, devices, sizes',
  [
    ('local', 8, {'fsdp': 8}),
    ('local', 8, {'fsdp': 4, 'tensor': 2}),
    *(('remote', devices, {'fsdp': devices}) for devices in (4, 2, 1)),
  ],
)
def test_fewer_devices_and_another_mesh_go_on(request, tmp_path, monkeypatch, place, devices, sizes):
  run = request.getfixturevalue(place)
  on_devices(monkeypatch, devices)
  workdir = as_saved(run, tmp_path)
  with STORE.faults(**ROUGH):
    assert loop.run(on_mesh(CONFIG, **sizes), workdir) == loop.DONE
  assert_goes_on(run, workdir, bitwise=sizes == {'fsdp': 8})


def test_the_store_changes_nothing(local, remote):
  assert kill.differences(local, remote) == []


def test_a_store_that_refuses_a_save_ends_the_run_with_13_and_the_same_command_goes_on(remote, tmp_path, monkeypatch):
  """It refuses everything from some moment of the second save on; no line of a log is lost."""
  monkeypatch.setattr(storage, '_SECS_BETWEEN_WRITES', 1e9)  # only a save writes the logs
  workdir = as_saved(remote, tmp_path)
  run = functools.partial(loop.run, on_mesh(CONFIG, fsdp=8), workdir)
  with STORE.faults(changes_left=22):
    code, sentence = program._guard(run)
  assert kill.newest(Folder(workdir)) == 2 * SAVED, 'the first save is whole'
  assert code == exit_codes.SAVE_FAILED and 'PERMISSION_DENIED: ' in sentence, sentence
  assert run() == loop.DONE
  assert kill.differences(remote, workdir) == []


@pytest.mark.parametrize('place, processes', [('local', 4), ('remote', 2)])
def test_more_processes_go_on(request, tmp_path, place, processes):
  """Of one device each; what process 0 finds damaged, no other uses."""
  run = request.getfixturevalue(place)
  workdir = as_saved(run, tmp_path)
  bad = workdir / f'checkpoints/{SAVED + 1}'
  for name in storage.files_below(workdir / f'checkpoints/{SAVED}'):
    (bad / name).parent.mkdir(parents=True, exist_ok=True)
    storage.write(bad / name, (workdir / f'checkpoints/{SAVED}' / name).read_bytes())
  where = (f'--config={small_run(tmp_path, **SIZES)}', f'--workdir={workdir}', f'--config.mesh.fsdp={processes}')
  with STORE.faults(**ROUGH):
    result = bash('launch/local_hosts.sh', str(processes), '1', *where, '--time_limit=0.0001')
  assert result.returncode == exit_codes.PREEMPTED, result.stdout + result.stderr
  said = result.stdout + result.stderr
  assert said.count(f'{bad}: damaged: manifest.jsonl is that of step {SAVED}') == 1
  assert f'continuing at step {SAVED} of {STEPS}' in said
  assert_goes_on(run, workdir, bitwise=False, through=SAVED + 1)
