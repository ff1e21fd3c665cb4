"""Whole folders to the Hugging Face layout and back: exact both ways, whole or not at all."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from latent_loop import trained
from latent_loop.config import Config, DataConfig, TrainConfig
from latent_loop.errors import BadInput, SaveFailed
from latent_loop.interop import from_hf, huggingface, to_hf, tokenizer_files
from latent_loop.tokenizer import Bytes, bpe
from latent_loop.tokenizer import load as load_tokenizer
from tests.test_huggingface import GOLDEN, assert_same
from tests.tiny import random_params, tiny_config, tiny_model

SIZES = {'model.vocab_size': 264, 'model.num_coda_layers': 2}


def export(folder, shard_bytes=to_hf.SHARD_BYTES, **changes):
  config = tiny_config(**{**SIZES, **changes})
  params = random_params(tiny_model(**{**SIZES, **changes}))
  to_hf.write_folder(folder, to_hf.texts_of(config), params, config, shard_bytes)
  return config, params


@pytest.fixture(scope='module')
def there_and_back(tmp_path_factory):
  """(config, params, exported folder, workdir made of it)."""
  tmp = tmp_path_factory.mktemp('convert')
  config, params = export(tmp / 'hf')
  from_hf.take_in(tmp / 'hf', tmp / 'run')
  return config, params, tmp / 'hf', tmp / 'run'


@pytest.mark.slow
def test_import_of_export_is_bit_equal(there_and_back):
  config, params, folder, workdir = there_and_back
  back = trained.load(workdir)
  assert back.step == 0
  same = ('vocab_size', 'width', 'num_heads', 'mlp_dim', 'num_core_layers', 'qk_bias', 'rope_base', 'norm_eps')
  assert [vars(back.config.model)[name] for name in same] == [vars(config.model)[name] for name in same]
  assert (back.config.depth.mean, back.config.depth.backprop_depth) == (6, 3)
  assert_same(jax.device_get(back.params), params)
  unwritten = from_hf.load(folder, tensor=2)
  assert unwritten.config.model == back.config.model and unwritten.mesh.shape['tensor'] == 2
  assert_same(jax.device_get(unwritten.params), params)


@pytest.mark.slow
def test_export_of_import_is_bit_equal(there_and_back, tmp_path):
  _, _, folder, workdir = there_and_back
  written = to_hf.export(workdir, tmp_path / 'again')
  assert written == sorted(path.name for path in folder.iterdir())
  for name in written:
    assert (tmp_path / 'again' / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_golden_weights_survive_being_a_run(tmp_path):
  model, depth = huggingface.read_config(GOLDEN)
  params = huggingface.read_params(GOLDEN, model)
  config = Config(model=model, depth=depth, data=DataConfig(seq_len=128), train=TrainConfig(loss_chunk=128))
  to_hf.write_folder(tmp_path / 'hf', to_hf.texts_of(config), params, config, 300_000)
  stored, golden = {}, load_file(f'{GOLDEN}/model.safetensors')
  shards = sorted((tmp_path / 'hf').glob('model-*.safetensors'))
  assert len(shards) == 4
  assert all(shard.stat().st_size < 310_000 for shard in shards)
  for shard in shards:
    stored |= load_file(shard)
  np.testing.assert_allclose(
    stored.pop('freqs_cis'), golden.pop('freqs_cis'), atol=1e-5
  )  # powers and sines differ by CPU
  assert_same(stored, golden)
  assert_same(huggingface.read_params(tmp_path / 'hf', model), params)


def test_a_tensor_larger_than_a_shard_is_a_file_of_its_own():
  assert to_hf.plan_shards({'a': 4, 'b': 4, 'c': 30, 'd': 1, 'e': 9}, 10) == [['a', 'b'], ['c'], ['d', 'e']]


@pytest.mark.parametrize(
  'changes, word',
  [
    ({'model.injection': 'diagonal'}, 'injection'),
    ({'model.block': 'pre_norm'}, 'block'),
    ({'depth.kind': 'uniform'}, 'law'),
  ],
)
def test_what_the_layout_cannot_say_is_refused_before_anything_is_written(changes, word):
  with pytest.raises(BadInput, match=word):
    to_hf.texts_of(tiny_config(**{**SIZES, **changes}))


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(to_hf, 'save_file', full)
  with pytest.raises(SaveFailed, match='No space'):
    export(tmp_path / 'hf')
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_nothing_is_overwritten(there_and_back, tmp_path):
  _, _, folder, workdir = there_and_back
  for call in (lambda: from_hf.take_in(folder, workdir), lambda: to_hf.export(workdir, folder)):
    with pytest.raises(BadInput, match='there already'):
      call()


def test_what_was_made_says_how_to_use_it_where_it_can_be_used():
  said = lambda vocab_size: from_hf.next_step('hf', 'run', tiny_config(**{'model.vocab_size': vocab_size}))
  assert said(264) == 'run: step 0 of a run; python -m launch.generate --workdir=run --prompt=TEXT'
  assert 'cannot read text, since hf has no tokenizer.json; put it there, remove run' in said(68)


@pytest.mark.slow
def test_the_byte_tokenizer_reads_as_bytes(there_and_back):
  path = there_and_back[2] / tokenizer_files.TOKENIZER
  ours, theirs, text = Bytes(), load_tokenizer(str(path)), 'a b\n\tGr\u00fc\u00dfe \U0001f600 <bos>'
  assert theirs.encode([text])[0].tolist() == ours.encode([text])[0].tolist()
  assert (theirs.bos, theirs.eos, theirs.pad, theirs.vocab_size) == (ours.bos, ours.eos, ours.pad, ours.vocab_size)
  assert tokenizer_files.is_bytes(path)
  older = json.loads(path.read_text()) | {'post_processor': None}
  (path.parent / 'older.json').write_text(json.dumps(older))
  assert tokenizer_files.is_bytes(path.parent / 'older.json')
  generation = json.loads((there_and_back[2] / to_hf.GENERATION).read_text())
  assert (generation['bos_token_id'], generation['eos_token_id'], generation['pad_token_id']) == (256, 257, 258)


@pytest.mark.slow
def test_a_trained_tokenizer_goes_along(tmp_path):
  path = tmp_path / 'tokenizer.json'
  bpe.train(iter(['to be or not to be, that is the question ' * 40]), 310, path)
  export(
    tmp_path / 'hf',
    **{'data.source': 'parquet', 'data.paths': ('x',), 'data.tokenizer': str(path), 'model.vocab_size': 320},
  )
  made = from_hf.take_in(tmp_path / 'hf', tmp_path / 'run')
  assert made.data.tokenizer == str(tmp_path / 'run' / 'tokenizer.json')
  assert load_tokenizer(made.data.tokenizer).fingerprint == load_tokenizer(str(path)).fingerprint
  generation = json.loads((tmp_path / 'hf' / to_hf.GENERATION).read_text())
  assert len(generation['eos_token_id']) == 2  # the end of the text and of a turn
  assert 'Huginn' in json.loads((tmp_path / 'hf' / 'tokenizer_config.json').read_text())['chat_template']
  chats = DataConfig(source='chat', paths=('x',), tokenizer=str(path))
  assert tokenizer_files.files_of(chats)[tokenizer_files.TOKENIZER] == path.read_text()
