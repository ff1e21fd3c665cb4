"""--init_from: a new run begins where another ended, once, and remembers whence."""

import json
from pathlib import Path

import jax
import pytest

from latent_loop import loop, start_from, trained
from latent_loop.checkpoint import Checkpoints, folder, manifest
from latent_loop.config import Config
from latent_loop.errors import BadInput
from latent_loop.interop import to_hf
from latent_loop.sealing import fingerprint
from latent_loop.workdir import open_workdir
from tests.tiny import assert_same_bits, mesh_of, random_params, tiny_config, tiny_model

SIZES = {'model.vocab_size': 264, 'data.source': 'addition', 'data.seq_len': 40, 'data.max_difficulty': 3}
OTHER = {'train.loss_chunk': 20, 'optim.kind': 'muon', 'optim.ema_decay': 0.5, 'depth.mean': 4}


def config_of(**changes) -> Config:
  return tiny_config(**{**SIZES, **OTHER, **changes})


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> tuple[Path, dict]:
  """(a run at step 7 with another optimizer and depth, its parameters)."""
  path, config = tmp_path_factory.mktemp('source') / 'run', tiny_config(**{**SIZES, 'train.loss_chunk': 20})
  params = random_params(tiny_model(**SIZES))
  open_workdir(path, config)
  with Checkpoints(path, config.checkpoint) as checkpoints:
    checkpoints.save(7, trained.first_state(config, params, mesh_of(4)), {'data_fingerprint': 'of other data'})
  return path, params


def test_a_run_begins_with_the_parameters_of_another_and_is_resumed_as_itself(source, tmp_path, capsys):
  path, params = source
  start_from.begin(config_of(), tmp_path / 'new', path)
  assert f'begins with the parameters of {path}, step 7' in capsys.readouterr().out
  record = json.loads((tmp_path / 'new' / start_from.RECORD).read_text())
  assert (record['source'], record['step'], len(record['config_fingerprint'])) == (str(path), 7, 16)
  run = loop.prepare(config_of(), tmp_path / 'new')
  run.checkpoints.close()
  assert (run.start, int(run.state.step), int(jax.tree.leaves(run.state.opt_state)[0])) == (0, 0, 0)
  for kept in (run.state.params, run.state.ema):
    assert_same_bits(jax.device_get(kept), params)
  start_from.begin(config_of(), tmp_path / 'new', tmp_path / 'gone since')
  assert 'goes on from them' in capsys.readouterr().out
  start_from.begin(config_of(), tmp_path / 'new', None)
  assert not capsys.readouterr().out


def test_a_kill_ahead_of_the_manifest_of_step_0_is_made_up_for(source, tmp_path, monkeypatch):
  """What Orbax has finished by then is no checkpoint yet, and must not stand in the way of the next start."""
  path, params = source

  def die(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(manifest, 'write', die)
    start_from.begin(config_of(), tmp_path / 'new', path)
  left = {file.name for file in (tmp_path / 'new/checkpoints').iterdir()}
  assert {'0', '0.unfinished'} <= left
  start_from.begin(config_of(), tmp_path / 'new', path)
  assert_same_bits(jax.device_get(trained.load(tmp_path / 'new').params), params)


def test_two_that_begin_at_once_do_not_remove_each_other_s_first_save(source, tmp_path, monkeypatch):
  open_workdir(tmp_path / 'new', config_of())
  (tmp_path / 'new/checkpoints').mkdir()
  (tmp_path / 'new/checkpoints/0.unfinished').touch()
  monkeypatch.setattr(folder, 'PATIENCE_SECS', 0.0)
  other = folder.Folder(tmp_path / 'new')
  other.claim()
  with pytest.raises(BadInput, match='another process trains here'):
    start_from.begin(config_of(), tmp_path / 'new', source[0])
  other.release()
  assert [file.name for file in (tmp_path / 'new/checkpoints').iterdir()] == ['0.unfinished']


def test_a_checkpoint_of_the_reference_is_a_beginning_too(source, tmp_path):
  config, (_, params) = config_of(), source
  to_hf.write_folder(tmp_path / 'hf', to_hf.texts_of(config), params, config, 10**9)
  start_from.begin(config, tmp_path / 'new', tmp_path / 'hf')
  assert_same_bits(jax.device_get(trained.load(tmp_path / 'new').params), params)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'model.mlp_dim': 44}, r'coda/0/mlp/down/kernel is \(40, 48\) there and \(44, 48\) in this .*model.mlp_dim=40'),
    ({'model.qk_bias': False}, r'parameter coda/0/attn/k/bias is \(4, 12\) there and absent .*model.qk_bias=True'),
    ({'train.batch_size': 9, 'train.num_microbatches': 1}, 'batch_size'),
  ],
)
def test_what_does_not_fit_is_named_and_nothing_is_made(source, tmp_path, changes, words):
  with pytest.raises(BadInput, match=words):
    start_from.begin(config_of(**changes), tmp_path / 'new', source[0])
  assert not (tmp_path / 'new').exists()


def test_weights_that_compute_another_thing_are_announced(source, tmp_path, capsys):
  start_from.begin(config_of(**{'model.rope_base': 99.0}), tmp_path / 'new', source[0])
  assert 'config.model.rope_base is 50000.0' in capsys.readouterr().out


def test_a_run_that_never_began_does_not_begin_with_drawn_parameters(tmp_path):
  config = config_of()
  open_workdir(tmp_path / 'new', config)
  (tmp_path / 'new' / start_from.RECORD).write_text(json.dumps({'config_fingerprint': fingerprint(config)}))
  with pytest.raises(BadInput, match='give the same --init_from again'):
    start_from.begin(config, tmp_path / 'new', None)
