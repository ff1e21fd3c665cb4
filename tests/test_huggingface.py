import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latent_loop.config import DepthConfig, ModelConfig
from latent_loop.errors import BadInput
from latent_loop.interop import huggingface
from latent_loop.model import build
from latent_loop.model.layers import Rows

GOLDEN = 'tests/golden/huginn_tiny'
DEPTH = DepthConfig(mean=5, backprop_depth=2)
CFG = ModelConfig(
  vocab_size=40, width=24, num_heads=3, mlp_dim=20, num_prelude_layers=1, num_core_layers=3, num_coda_layers=2
)


@functools.cache
def random_params(cfg):
  """The tree of Model.init with noise everywhere: no bias is zero, no scale one."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(build(cfg, DEPTH).init, jax.random.key(0))
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


def rotary_table(cfg, positions=11):
  half = cfg.head_dim // 2
  angles = np.outer(np.arange(positions), cfg.rope_base ** (-np.arange(half) / half))
  return np.stack([np.cos(angles), np.sin(angles)], -1)[None, :, None].astype(np.float32)


def write(folder, cfg=CFG, params=None, tensors=None, **changes):
  """A checkpoint folder; `tensors` and `changes` replace weights and config keys, None removes one."""
  stored = {**huggingface.to_hf(params or random_params(cfg), cfg), 'freqs_cis': rotary_table(cfg), **(tensors or {})}
  values = {**huggingface.config_to_hf(cfg, DEPTH, block_size=11), **changes}
  save_file({name: x for name, x in stored.items() if x is not None}, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
  return folder


def read(folder):
  cfg, depth = huggingface.read_config(folder)
  return cfg, depth, huggingface.read_params(folder, cfg)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def refused(folder, *words):
  with pytest.raises(BadInput) as caught:
    read(folder)
  for word in words:
    assert word in str(caught.value)


def test_golden_weights_survive_the_round_trip_bit_for_bit():
  cfg, depth, params = read(GOLDEN)
  assert (cfg.num_prelude_layers, cfg.num_core_layers, cfg.num_coda_layers, cfg.vocab_size) == (2, 4, 2, 256)
  assert (depth.mean, depth.backprop_depth, cfg.rope_base) == (32, 8, 50_000.0)
  stored = load_file(f'{GOLDEN}/model.safetensors')
  del stored['freqs_cis']
  assert_same(huggingface.to_hf(params, cfg), stored)


@pytest.mark.parametrize(
  'changes',
  [{}, {'qk_bias': False}, {'num_prelude_layers': 0, 'num_coda_layers': 0}, {'state_init': 'zero', 'rope_base': 1e4}],
)
def test_exported_models_read_back_the_same(tmp_path, changes):
  cfg = dataclasses.replace(CFG, **changes)
  params = random_params(cfg)
  cfg_read, depth_read, params_read = read(write(tmp_path, cfg, params))
  assert cfg_read == cfg
  assert depth_read == DEPTH
  assert_same(params_read, params)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params_read))


def test_what_is_read_back_gives_the_same_logits(tmp_path):
  params = random_params(CFG)
  cfg, depth, params_read = read(write(tmp_path, CFG, params))
  model = build(cfg, depth)
  tokens_BT = jnp.arange(14).reshape(2, 7) * 5 % cfg.vocab_size
  s_BTD = jax.random.normal(jax.random.key(3), (2, 7, cfg.width))

  @jax.jit
  def logits(params):
    rows = Rows(jnp.tile(jnp.arange(7), (2, 1)), None)
    s1_BTD = model.apply_core(params, s_BTD, model.embed_input(params, tokens_BT, rows), rows)
    return model.scores(params, model.apply_coda(params, s1_BTD, rows))

  ours, theirs = logits(params), logits(params_read)
  assert ours.shape == (2, 7, 40)
  assert np.std(ours) > 0.1
  np.testing.assert_array_equal(ours, theirs)


def test_layout_of_theirs():
  """Where single numbers end up, written out by hand: [out, in], Q|K|V, neighbors to halves, gate first."""
  params = random_params(CFG)
  theirs, attn, mlp = huggingface.to_hf(params, CFG), params['core'][2]['attn'], params['core'][2]['mlp']
  D, F, H = CFG.width, CFG.mlp_dim, CFG.head_dim
  block = {name.removeprefix('transformer.core_block.2.'): x for name, x in theirs.items()}
  head, pair, column = 1, 2, 17
  for part, name in enumerate('qk'):
    row = part * D + head * H + 2 * pair
    np.testing.assert_array_equal(
      block['attn.Wqkv.weight'][row : row + 2, column], attn[name]['kernel'][column, head, [pair, pair + H // 2]]
    )
    np.testing.assert_array_equal(
      block['attn.qk_bias'][part, 0, head, 2 * pair : 2 * pair + 2], attn[name]['bias'][head, [pair, pair + H // 2]]
    )
  assert block['attn.Wqkv.weight'][2 * D + head * H + 5, column] == attn['v']['kernel'][column, head, 5]
  assert block['attn.proj.weight'][column, head * H + 5] == attn['out']['kernel'][head, 5, column]
  assert block['mlp.fc.weight'][3, column] == mlp['gate']['kernel'][column, 3]
  assert block['mlp.fc.weight'][F + 3, column] == mlp['up']['kernel'][column, 3]
  assert block['mlp.proj.weight'][column, 3] == mlp['down']['kernel'][3, column]
  assert theirs['transformer.adapter.weight'][3, D + 5] == params['injection']['kernel'][D + 5, 3]


def test_sharded_weights(tmp_path):
  params = random_params(CFG)
  write(tmp_path, CFG, params)
  tensors = load_file(tmp_path / 'model.safetensors')
  (tmp_path / 'model.safetensors').unlink()
  weight_map = {name: f'model-{i % 3 + 1:05d}-of-00003.safetensors' for i, name in enumerate(sorted(tensors))}
  for shard in set(weight_map.values()):
    save_file({name: x for name, x in tensors.items() if weight_map[name] == shard}, tmp_path / shard)
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
  assert_same(read(tmp_path)[2], params)

  (tmp_path / 'model-00002-of-00003.safetensors').unlink()
  refused(tmp_path, 'model-00002-of-00003.safetensors', 'no such file')
  index.write_text(json.dumps({'weight_map': {**weight_map, 'transformer.wte.weight': '../wte.safetensors'}}))
  refused(tmp_path, 'transformer.wte.weight', '../wte.safetensors')
  index.write_text('{"weight_map": ')
  refused(tmp_path, 'index.json', 'not a readable JSON')


@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
  params = jax.tree.map(lambda p: p.astype(dtype), random_params(CFG))
  tensors = {name: x.astype(dtype) for name, x in huggingface.to_hf(params, CFG).items()}
  params_read = read(write(tmp_path, tensors={**tensors, 'freqs_cis': rotary_table(CFG).astype(dtype)}))[2]
  assert_same(params_read, jax.tree.map(lambda p: p.astype(np.float32), params))


def test_tied_head_may_be_stored_twice(tmp_path):
  wte = huggingface.to_hf(random_params(CFG), CFG)['transformer.wte.weight']
  assert read(write(tmp_path, tensors={'lm_head.weight': wte}))[0] == CFG
  refused(write(tmp_path, tensors={'lm_head.weight': wte + 1e-3}), 'lm_head.weight', 'tied')


def test_padded_vocabulary_is_that_of_the_tensor(tmp_path):
  assert read(write(tmp_path, vocab_size=33))[0].vocab_size == 40
  refused(write(tmp_path, vocab_size=41), 'vocab_size=41', '(40, 24)')


def test_gradient_iterations_are_capped_by_the_mean_depth(tmp_path):
  depth = read(write(tmp_path, mean_recurrence=3, mean_backprop_depth=8))[1]
  assert (depth.mean, depth.backprop_depth) == (3, 3)


@pytest.mark.parametrize(
  'key, value',
  [
    ('model_type', 'llama'),
    ('_class_name', 'ParcaeConfig'),
    ('model_class_name', 'Parcae'),
    ('injection_type', 'add'),
    ('norm_class_name', 'LayerNorm'),
    ('mlp_class_name', 'BaseMLP'),
    ('nonlin_name', 'GELU'),
    ('block_class_name', 'TransformerPreNormBlock'),
    ('init_strategy', 'scaled'),
    ('bias', True),
    ('tie_embeddings', False),
    ('tie_word_embeddings', False),
    ('num_key_value_heads', 1),
    ('num_attention_heads', 6),
    ('head_dim', 16),
    ('rope_scaling', {'type': 'linear', 'factor': 2.0}),
    ('rope_base', -1.0),
    ('rope_base', '50000'),
    ('norm_eps', 0),
    ('state_init', 'normal'),
    ('sampling_scheme', 'sobol'),
    ('init_values', {'embed_scale': 1.0}),
    ('init_values', [1.0]),
    ('qk_bias', 1),
    ('n_embd', '24'),
    ('n_embd', True),
    ('mean_recurrence', 2.5),
  ],
)
def test_other_architectures_are_refused(tmp_path, key, value):
  refused(write(tmp_path, **{key: value}), 'config.json', key)


@pytest.mark.parametrize('key, word', [('n_heads', 'heads'), ('mean_recurrence', 'mean'), ('n_embd', 'width')])
def test_impossible_sizes_are_refused(tmp_path, key, word):
  refused(write(tmp_path, **{key: 0}), 'config.json', word)


@pytest.mark.parametrize('key', ['n_embd', 'n_layers_in_coda', 'vocab_size', 'qk_bias', 'rope_base', 'norm_eps'])
def test_missing_keys_are_named(tmp_path, key):
  write(tmp_path)
  values = json.loads((tmp_path / 'config.json').read_text())
  del values[key]
  (tmp_path / 'config.json').write_text(json.dumps(values))
  refused(tmp_path, 'config.json', key, 'missing')


@pytest.mark.parametrize(
  'name, value, word',
  [
    ('transformer.coda.1.norm_4.weight', None, 'missing'),
    ('transformer.wte.weight', None, 'missing'),
    ('transformer.core_block.0.attn.qk_bias', np.zeros((2, 3, 1, 8), np.float32), '(2, 3, 1, 8)'),
    ('transformer.adapter.weight', np.zeros((48, 24), np.float32), '(24, 48)'),
    ('transformer.ln_f.weight', np.zeros((24,), np.int32), 'I32'),
    ('transformer.core_block.3.norm_1.weight', np.zeros((24,), np.float32), 'unknown'),
    ('transformer.coda.0.attn.proj.bias', np.zeros((24,), np.float32), 'unknown'),
    ('freqs_cis', rotary_table(dataclasses.replace(CFG, rope_base=10_000.0)), 'rope_base'),
    ('freqs_cis', rotary_table(dataclasses.replace(CFG, num_heads=6)), '(1, 11, 1, 2, 2)'),
  ],
)
def test_wrong_tensors_are_named(tmp_path, name, value, word):
  refused(write(tmp_path, tensors={name: value}), name, word)


def test_broken_files_are_named(tmp_path):
  refused(tmp_path / 'nowhere', 'nowhere')
  weights = write(tmp_path) / 'model.safetensors'
  whole = weights.read_bytes()
  for damaged in (whole[:-7], whole[:20], b'', b'not tensors at all'):
    weights.write_bytes(damaged)
    refused(tmp_path, 'model.safetensors', 'not a whole safetensors file')
  weights.unlink()
  refused(tmp_path, 'neither model.safetensors')
  for text in ('{', '[]', '\ufeff\x00'):
    (tmp_path / 'config.json').write_text(text)
    refused(tmp_path, 'config.json')


@pytest.mark.parametrize(
  'changes', [{'injection': 'diagonal'}, {'block': 'pre_norm'}, {'mlp': 'relu_squared'}, {'qk_norm': True}]
)
def test_models_that_are_not_huginn_are_not_exported(changes):
  cfg = dataclasses.replace(CFG, **changes)
  for export in (lambda: huggingface.to_hf({}, cfg), lambda: huggingface.config_to_hf(cfg, DEPTH, 11)):
    with pytest.raises(BadInput, match=next(iter(changes))):
      export()


def test_the_reference_scales_embeddings_by_the_root_of_the_width(tmp_path):
  assert read(write(tmp_path, init_values={'embed_scale': math.sqrt(24)}))[0].scale_embedding
