"""A run saved on 8 devices goes on with others and more processes: the same stream of tokens, depths and losses."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from latent_loop import loop
from latent_loop.config import Config
from latent_loop.parallel import mesh as meshes
from tests.test_hosts import bash, metrics, small_config, small_run

pytestmark = pytest.mark.slow
SAVED, STEPS = 3, 5  # the step that the others go on from, and their last


def on_devices(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
  make = meshes.make_mesh
  monkeypatch.setattr(loop.meshes, 'make_mesh', lambda cfg: make(cfg, jax.devices()[:count]))


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
  """All steps on 8 devices, fsdp 8."""
  workdir = tmp_path_factory.mktemp('eight') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, 'finish', lambda this: None)  # the report takes a while
    assert loop.run(on_mesh(small_config(), fsdp=8), workdir) == loop.DONE
  return workdir


def on_mesh(config: Config, **sizes: int) -> Config:
  return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))


def as_saved(run: Path, workdir: Path) -> Path:
  """A copy of `run` as it was when step SAVED had just been saved."""
  shutil.copytree(run, workdir)
  for step in range(SAVED + 1, STEPS + 1):
    shutil.rmtree(workdir / 'checkpoints' / str(step))
  return workdir


def assert_goes_on(run: Path, workdir: Path, bitwise: bool) -> None:
  wanted, got = metrics(run), metrics(workdir)
  for key in ('step', 'batch_hash', 'n', 'k'):
    assert [record[key] for record in got] == [record[key] for record in wanted], key
  assert got[:SAVED] == wanted[:SAVED], 'not trained again'
  next_losses = got[SAVED]['loss'], wanted[SAVED]['loss']
  np.testing.assert_allclose(*next_losses, rtol=0 if bitwise else 1e-6)
  np.testing.assert_allclose([r['loss'] for r in got], [r['loss'] for r in wanted], rtol=1e-5)


@pytest.mark.parametrize(
  'devices, sizes, bitwise',
  [
    (8, {'fsdp': 8}, True),
    (8, {'fsdp': 4, 'tensor': 2}, False),
    (4, {'fsdp': 4}, False),
    (2, {'fsdp': 2}, False),
    (1, {}, False),
  ],
)
def test_fewer_devices_and_another_mesh_go_on(run, tmp_path, monkeypatch, devices, sizes, bitwise):
  on_devices(monkeypatch, devices)
  monkeypatch.setattr(loop, 'finish', lambda this: None)
  workdir = as_saved(run, tmp_path / 'run')
  assert loop.run(on_mesh(small_config(), **sizes), workdir) == loop.DONE
  assert_goes_on(run, workdir, bitwise)


@pytest.mark.parametrize('processes', [2, 4])
def test_more_processes_go_on(run, tmp_path, processes):
  """Of one device each; what process 0 finds damaged, no other uses."""
  workdir = as_saved(run, tmp_path / 'run')
  bad = shutil.copytree(workdir / 'checkpoints' / str(SAVED), workdir / 'checkpoints' / str(SAVED + 1))
  where = (f'--config={small_run(tmp_path)}', f'--workdir={workdir}', f'--config.mesh.fsdp={processes}')
  result = bash('launch/local_hosts.sh', str(processes), '1', *where)
  assert result.returncode == 0, result.stdout + result.stderr
  said = result.stdout + result.stderr
  assert said.count(f'{bad}: damaged: manifest.jsonl is that of step {SAVED}') == 1
  assert f'continuing at step {SAVED} of {STEPS}' in said
  assert_goes_on(run, workdir, bitwise=False)
