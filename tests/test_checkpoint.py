"""A damaged checkpoint is named and never used; the newest good one is; nothing is ever started over."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from latent_loop import loop
from latent_loop.chaos import corrupt
from latent_loop.checkpoint import Checkpoints, content, folder, inspect, manifest
from latent_loop.config import CheckpointConfig
from latent_loop.errors import BadInput, SaveFailed
from latent_loop.sealing import to_json
from tests.reading_path import ROOT
from tests.tiny import assert_same_bits, mesh_of

KEEP_ALL = CheckpointConfig(keep_last=9)
ABOUT = {'data_fingerprint': 'abc', 'config': {'seed': 0}}


def state_at(step: int, fsdp: int = 8):
  """A state of a scalar, two arrays of one shape, bfloat16 and None, split over `fsdp` devices."""
  rng = np.random.default_rng(step)
  state = {
    'step': np.int32(step),
    'params': {'a': np.float32(rng.standard_normal((16, 3))), 'b': np.float32(rng.standard_normal((16, 3)))},
    'moments': (np.asarray(jnp.asarray(rng.standard_normal((8, 2, 5)), jnp.bfloat16)), None),
  }
  mesh = mesh_of(fsdp=fsdp)
  specs = jax.tree.map(lambda x: NamedSharding(mesh, P('fsdp') if x.ndim else P()), state)
  return jax.device_put(state, specs), specs


def shapes_of(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def save(workdir: Path, *steps: int, cfg: CheckpointConfig = KEEP_ALL) -> None:
  with Checkpoints(workdir, cfg) as checkpoints:
    for step in steps:
      checkpoints.save(step, state_at(step)[0], ABOUT)


def newest(workdir: Path, fsdp: int = 8, read_only: bool = False):
  """(step, state) as a run that starts would take it; its content is that of the step."""
  state, specs = state_at(0, fsdp)
  with Checkpoints(workdir, KEEP_ALL, read_only) as checkpoints:
    found = checkpoints.restore_newest(shapes_of(state), specs, 'abc')
  if found is not None:
    assert_same_bits(found[1], state_at(found[0])[0])
  return found


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp('saved')
  save(workdir, 1, 2, 3)
  return workdir


@pytest.fixture
def copy(saved, tmp_path) -> Path:
  shutil.copytree(saved, tmp_path / 'copy')
  return tmp_path / 'copy'


def files_of(folder: Path) -> list[Path]:
  return sorted(path for path in folder.rglob('*') if path.is_file())


def names_of(folder: Path) -> set[str]:
  return {path.name for path in folder.iterdir()}


def flip(path: Path, bit: int) -> None:
  data = bytearray(path.read_bytes() or b'?')  # an empty file grows
  data[bit // 8 % len(data)] ^= 1 << bit % 8
  path.write_bytes(data)


def truncate(path: Path, bit: int) -> None:
  path.write_bytes(path.read_bytes()[: bit % path.stat().st_size])


def delete(path: Path, bit: int) -> None:
  path.unlink()


@pytest.mark.parametrize('damage', [flip, truncate, delete])
def test_damage_to_any_file_is_named_and_the_step_before_is_used(saved, tmp_path, damage, capsys):
  rng = np.random.default_rng(0)
  for file in files_of(saved / 'checkpoints/3'):
    if damage is truncate and not file.stat().st_size:
      continue
    workdir, name = tmp_path / 'copy', file.relative_to(saved / 'checkpoints/3').as_posix()
    shutil.copytree(saved, workdir)
    damage(workdir / 'checkpoints/3' / name, int(rng.integers(2**20)))
    assert newest(workdir, fsdp=1)[0] == 2, name
    assert re.search(rf'/checkpoints/3: damaged: (no )?{re.escape(name)}[ ;]', capsys.readouterr().err), name
    assert names_of(workdir / 'checkpoints') == {'1', '2', 'set_aside'}
    assert names_of(workdir / 'checkpoints/set_aside') == {'3-0'}
    shutil.rmtree(workdir)


def restate(folder: Path, step: int, **changes) -> None:
  """The manifest of `folder` with `changes`, under a hash that is right again."""
  body = json.loads((folder / manifest.NAME).read_bytes().split(b'\n')[1])
  (folder / manifest.NAME).write_bytes(manifest.encode({**body, **changes}))


def empty_newer(steps: Path) -> str:
  (steps / '4').mkdir()
  return '4: damaged: no manifest.jsonl'


def stale_manifest(steps: Path) -> str:
  shutil.copy(steps / '2' / manifest.NAME, steps / '3' / manifest.NAME)
  return '3: damaged: manifest.jsonl is that of step 2'


def files_of_another_step(steps: Path) -> str:
  """Whole files, and a manifest that names them: only the content of the arrays is another."""
  body = json.loads((steps / '2' / manifest.NAME).read_bytes().split(b'\n')[1])
  shutil.copy(steps / '3' / manifest.NAME, steps)
  shutil.rmtree(steps / '3')
  shutil.copytree(steps / '2', steps / '3')
  shutil.move(steps / manifest.NAME, steps / '3' / manifest.NAME)
  restate(steps / '3', 3, files=body['files'])
  return '3: damaged: array moments/0 does not hold what was saved'


def swapped_arrays(steps: Path) -> str:
  body = json.loads((steps / '3' / manifest.NAME).read_bytes().split(b'\n')[1])
  a, b = body['arrays']['params/a'], body['arrays']['params/b']
  restate(steps / '3', 3, arrays={**body['arrays'], 'params/a': b, 'params/b': a})
  return '3: damaged: array params/a does not hold what was saved'


def garbage_under_a_new_hash(steps: Path) -> str:
  (steps / '3/state/_METADATA').write_bytes(b'{}')
  body = json.loads((steps / '3' / manifest.NAME).read_bytes().split(b'\n')[1])
  restate(steps / '3', 3, files={**body['files'], 'state/_METADATA': [2, hashlib.sha256(b'{}').hexdigest()]})
  return '3: damaged: its arrays cannot be read'


def way_out(steps: Path) -> str:
  restate(steps / '3', 3, files={'../2/_CHECKPOINT_METADATA': [2, '0' * 64]})
  return 'which is no file below its folder'


def absurd_manifest(steps: Path) -> str:
  os.truncate(steps / '3' / manifest.NAME, 2**40)  # sparse: it costs nothing until someone reads it
  return '3: damaged: manifest.jsonl has over 67108864 bytes'


@pytest.mark.parametrize(
  'damage',
  [empty_newer, stale_manifest, files_of_another_step, swapped_arrays, garbage_under_a_new_hash, way_out,
   absurd_manifest],
)  # fmt: skip
def test_what_no_hash_of_a_file_shows_is_named_as_well(copy, damage, capsys):
  words = damage(copy / 'checkpoints')
  assert newest(copy)[0] == (3 if damage is empty_newer else 2)
  assert words in capsys.readouterr().err


def test_any_bit_of_a_manifest_counts(copy):
  path = copy / 'checkpoints/3' / manifest.NAME
  whole = path.read_bytes()
  for bit in range(0, 8 * len(whole), 37):
    flip(path, bit)
    with pytest.raises(manifest.Damaged):
      manifest.read(epath.Path(path.parent), 3)
    path.write_bytes(whole)
  manifest.read(epath.Path(path.parent), 3)


def test_none_good_is_bad_input_now_and_at_the_next_start(copy):
  for step in '123':
    flip(next((copy / 'checkpoints' / step / 'state').glob('d/*'), copy / 'checkpoints' / step / manifest.NAME), 99)
  for _ in range(2):
    with pytest.raises(BadInput, match='no checkpoint there is good, and a run is never started over'):
      newest(copy)
  assert names_of(copy / 'checkpoints/set_aside') == {'1-0', '2-0', '3-0'}


def test_a_reader_uses_the_newest_good_one_and_moves_nothing(copy, capsys):
  flip(copy / 'checkpoints/3/state/manifest.ocdbt', 77)
  before = {path: path.read_bytes() for path in files_of(copy)}
  assert newest(copy, read_only=True)[0] == 2
  assert '3: damaged: state/manifest.ocdbt is altered' in capsys.readouterr().err
  assert {path: path.read_bytes() for path in files_of(copy)} == before


def test_a_reader_passes_over_a_save_under_way_without_a_word(copy, capsys):
  (copy / 'checkpoints/3.unfinished').touch()
  (copy / 'checkpoints/3' / manifest.NAME).unlink()
  assert newest(copy, read_only=True)[0] == 2 and not capsys.readouterr().err


def test_a_save_that_was_killed_is_no_evidence_of_a_checkpoint(tmp_path):
  """Killed in Orbax, killed before the manifest, killed after it; and the first save of a run among them."""
  save(tmp_path, 1)
  steps = tmp_path / 'checkpoints'
  (steps / '1.unfinished').touch()
  assert newest(tmp_path)[0] == 1 and names_of(steps) == {'1'}, 'it had its manifest'
  (steps / '1.unfinished').touch()
  (steps / '1' / manifest.NAME).unlink()
  (steps / '2.orbax-checkpoint-tmp').mkdir()
  (steps / '2.unfinished').touch()
  assert newest(tmp_path) is None and names_of(steps) == set()


def test_two_processes_do_not_train_in_one_folder(copy, monkeypatch):
  """One that is about to end is waited for; readers are not kept out."""
  state, specs = state_at(0)
  with Checkpoints(copy, KEEP_ALL) as first:
    first.restore_newest(shapes_of(state), specs, 'abc')
    assert newest(copy, read_only=True)[0] == 3
    monkeypatch.setattr(folder, 'PATIENCE_SECS', 0.3)
    with pytest.raises(BadInput, match='another process trains here'):
      newest(copy)
    monkeypatch.setattr(folder, 'PATIENCE_SECS', 60.0)
    ends = threading.Timer(0.3, first.close)
    ends.start()
    assert newest(copy)[0] == 3
    ends.join()


def test_a_lock_of_another_machine_is_no_reason_to_stop(copy, monkeypatch, capsys):
  """It may be gone, and its lock held by a server of files for ever."""
  state, specs = state_at(0)
  monkeypatch.setattr(folder, 'PATIENCE_SECS', 0.1)
  with Checkpoints(copy, KEEP_ALL) as first:
    first.restore_newest(shapes_of(state), specs, 'abc')
    monkeypatch.setattr(folder, '_machine', lambda: 'another')
    assert newest(copy)[0] == 3 and 'lock is held by another machine' in capsys.readouterr().err


def test_where_no_lock_can_be_written_none_is_needed(copy):
  (copy / 'lock').mkdir()
  assert newest(copy)[0] == 3


def test_a_reader_survives_that_the_run_deletes_what_it_looks_at(copy, monkeypatch, capsys):
  hash_of, steps = manifest._hash, copy / 'checkpoints'

  def slowly(path):
    shutil.rmtree(steps / '3', ignore_errors=True)
    return hash_of(path)

  monkeypatch.setattr(manifest, '_hash', slowly)
  assert newest(copy, read_only=True)[0] == 2 and 'is missing; left where it is' in capsys.readouterr().err


def test_differences_of_a_run_without_a_finished_save_are_a_sentence(copy):
  for step in '123':
    shutil.rmtree(copy / 'checkpoints' / step)
  (copy / 'checkpoints/4.unfinished').touch()
  with pytest.raises(BadInput, match='no save there is finished'):
    list(inspect.differences((copy, None), (copy, None)))
  (copy / 'checkpoints/4.unfinished').unlink()
  (copy / 'checkpoints/set_aside').mkdir()
  (copy / 'checkpoints/set_aside/3-0').mkdir()
  assert inspect.table(copy)[1:] == [f'set aside: {copy}/checkpoints/set_aside/3-0']


def test_a_restored_step_that_was_set_aside_can_be_saved_and_lost_again(copy):
  for name in ('3-0', '3-1'):
    flip(copy / 'checkpoints/3/_CHECKPOINT_METADATA', 5)
    assert newest(copy)[0] == 2
    assert name in names_of(copy / 'checkpoints/set_aside')
    save(copy, 3)
    assert newest(copy)[0] == 3


@pytest.mark.parametrize('fsdp', [1, 2, 4])
def test_another_mesh_restores_the_same_bytes_and_checks_them(saved, fsdp):
  assert newest(saved, fsdp, read_only=True)[0] == 3


# --- checksums -----------------------------------------------------------------------------------------


def checksums(tree) -> dict[str, str]:
  return content.finish(list(content.named(tree)), content.start(tree))


def test_a_checksum_does_not_depend_on_the_devices_and_is_what_it_was():
  """The second half holds checkpoints on disk to the arithmetic they were written with."""
  one = checksums(state_at(7, fsdp=1)[0])
  assert one == checksums(state_at(7, fsdp=8)[0])
  assert len(set(one.values())) == 4
  x = np.arange(6, dtype=np.uint32).reshape(2, 3)
  assert checksums({'x': jnp.asarray(x)}) == {'x': reference(x)}


def reference(x: np.ndarray) -> str:
  """The two sums in Python's own integers."""

  def mix(v):
    v = (v ^ v >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    v = (v ^ v >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return v ^ v >> 16

  first = [mix(int(v) ^ mix(i ^ 0x9E3779B9)) for i, v in enumerate(x.flat)]
  second = [mix((v + i * 0x85EBCA77) & 0xFFFFFFFF) for i, v in enumerate(first)]
  return f'{sum(first) % 2**32:08x}{sum(second) % 2**32:08x}'


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8', 'bool'])
def test_any_bit_and_any_exchange_changes_a_checksum(dtype):
  rng = np.random.default_rng(3)
  x = np.asarray(jnp.asarray(rng.integers(0, 2, (5, 7)) if dtype == 'bool' else rng.standard_normal((5, 7)) * 9, dtype))
  word = np.dtype(f'uint{8 * x.dtype.itemsize}')
  want, seen = checksums({'x': jnp.asarray(x)})['x'], set()
  for place in range(x.size):
    for bit in range(1 if dtype == 'bool' else 8 * word.itemsize):
      changed = x.copy()
      changed.view(word).flat[place] ^= word.type(1 << bit)
      seen.add(checksums({'x': jnp.asarray(changed)})['x'])
  assert want not in seen and len(seen) == x.size * (1 if dtype == 'bool' else 8 * word.itemsize)
  i, j = next((i, j) for i in range(x.size) for j in range(i) if x.flat[i] != x.flat[j])
  changed = x.copy()
  changed.flat[i], changed.flat[j] = x.flat[j], x.flat[i]
  assert checksums({'x': jnp.asarray(changed)})['x'] != want


def test_keys_and_empty_arrays_have_checksums():
  a, b = (checksums({'key': jax.random.key(seed), 'none': None, 'empty': jnp.zeros((0, 3))}) for seed in (1, 2))
  assert a.keys() == {'key', 'empty'} and a['key'] != b['key'] and a['empty'] == b['empty']


# --- saving --------------------------------------------------------------------------------------------


def disk_is_full(*args):
  raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_failed_save_shows_at_the_next_one_and_leaves_the_others(tmp_path, monkeypatch):
  save(tmp_path, 1)
  with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(manifest, 'write', disk_is_full)
      checkpoints.save(2, state_at(2)[0], ABOUT)
      with pytest.raises(SaveFailed, match='checkpoints/2: this checkpoint could not be saved .*No space left'):
        checkpoints.save(3, state_at(3)[0], ABOUT)
  assert newest(tmp_path)[0] == 1


def test_a_failed_save_shows_when_the_run_ends(tmp_path, monkeypatch):
  monkeypatch.setattr(manifest, 'write', disk_is_full)
  with pytest.raises(SaveFailed, match='there is no step before it'):
    save(tmp_path, 1)


def test_an_old_step_goes_only_when_a_newer_one_has_its_manifest(tmp_path, monkeypatch):
  write, there = manifest.write, []

  def watch(folder, step, *rest):
    there.append({s for s in range(9) if (tmp_path / 'checkpoints' / str(s) / manifest.NAME).exists()})
    write(folder, step, *rest)

  monkeypatch.setattr(manifest, 'write', watch)
  save(tmp_path, 1, 2, 3, 4, 5, cfg=CheckpointConfig(keep_last=1, keep_every_steps=2))
  assert there == [set(), {1}, {2}, {2, 3}, {2, 4}]
  assert names_of(tmp_path / 'checkpoints') == {'2', '4', '5'}


# --- a person looks ------------------------------------------------------------------------------------


def test_list_names_every_step_with_its_health(copy):
  truncate(copy / 'checkpoints/2/state/manifest.ocdbt', 7)
  flip(copy / 'checkpoints/1/_CHECKPOINT_METADATA', 9)
  (copy / 'checkpoints/4.unfinished').touch()
  (copy / 'checkpoints/set_aside').mkdir()
  (copy / 'checkpoints/3').rename(copy / 'checkpoints/set_aside/3-0')
  lines = '\n'.join(inspect.table(copy))
  assert re.search(r'^ +1 +\d\.\d +4  whole$', lines, re.MULTILINE), 'a look at sizes alone'
  assert re.search('2 +damaged: state/manifest.ocdbt does not have the', lines)
  assert re.search('4 +unfinished', lines) and 'set aside: ' in lines


def test_verify_reads_everything_and_names_what_is_damaged(copy):
  assert [line.split(':')[1] for line in inspect.verify(copy, [])] == [' good'] * 3
  swapped_arrays(copy / 'checkpoints')
  assert list(inspect.verify(copy, [1, 2]))[1].startswith('step 2: good')
  with pytest.raises(BadInput, match='checkpoints/3: damaged: array params/a does not hold what was saved'):
    list(inspect.verify(copy, []))
  with pytest.raises(BadInput, match='checkpoints/7: no such checkpoint'):
    list(inspect.verify(copy, [7]))


def test_diff_names_what_differs_and_how_much(saved, tmp_path):
  state, _ = state_at(3)
  state['params']['a'] = state['params']['a'].at[5, 1].add(0.25)
  with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
    checkpoints.save(8, state, {**ABOUT, 'config': {'seed': 1}})
  lines = list(inspect.differences((saved, None), (tmp_path, None)))
  assert lines[1:] == [
    'config.seed: 0 in a, 1 in b',
    'params/a: 1 of 48 elements differ, by at most 0.25',
    '1 of 4 arrays hold something else',
  ]
  assert len(list(inspect.differences((saved, 2), (saved, 3)))) == 6


# --- real processes ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_corrupting_by_the_dozen(tmp_path, monkeypatch):
  """launch.chaos corrupt, each kind of accident once or twice."""
  monkeypatch.setattr(loop, 'finish', lambda this: None)  # the report takes a while
  said = []
  result = corrupt.corrupt(len(corrupt.KINDS) + 4, 0, tmp_path, said.append)
  assert result['ok'] and result['detected'] == result['corruptions'] and not said, said
  missing = {kind.__name__ for kind in corrupt.KINDS} - set(result['kinds'])
  assert not missing or result['harmless'], missing


@pytest.mark.slow
def test_a_full_disk_is_exit_code_13_and_a_sentence(tmp_path):
  """In the middle of a run, no file may grow beyond 64 KiB any more: a save meets that, its files are larger."""
  small = corrupt.small_config()
  config = dataclasses.replace(
    small,
    train=dataclasses.replace(small.train, num_steps=100_000),
    checkpoint=CheckpointConfig(every_steps=50, keep_last=10_000),
    log=dataclasses.replace(small.log, every_steps=1000),
  )
  (tmp_path / 'long.py').write_text(
    'from latent_loop.sealing import from_json, view\n'
    f'def get_config():\n  return view(from_json({to_json(config)!r}, ""))\n'
  )
  command = [sys.executable, '-m', 'launch.train', f'--config={tmp_path}/long.py', f'--workdir={tmp_path}/run']
  env = {**os.environ, 'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=1')}
  process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
  first = tmp_path / 'run/checkpoints/50' / manifest.NAME
  while not first.exists():
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.02)
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (65536, 65536))
  _, words = process.communicate(timeout=60)
  assert process.returncode == 13, words
  assert 'this checkpoint could not be saved' in words and 'is as it was' in words and 'Traceback' not in words
  good = list(inspect.verify(tmp_path / 'run', []))
  assert good and all(': good: ' in line for line in good)
