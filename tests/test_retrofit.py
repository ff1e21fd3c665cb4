"""A retrofitted Llama computes at depth 1 what its chosen layers compute, by a forward pass written here in NumPy."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latent_loop import trained
from latent_loop.errors import BadInput
from latent_loop.interop import from_hf, llama, to_hf
from latent_loop.interop.retrofit import layers_of, retrofit
from latent_loop.model.layers import Rows
from tests.test_huggingface import assert_same
from tests.tiny import random_params, tiny_config, tiny_model

D, N, KEYS, H, F, V, LAYERS, T = 24, 4, 2, 6, 20, 264, 5, 9
CONFIG = {
  'model_type': 'llama', 'hidden_size': D, 'intermediate_size': F, 'num_attention_heads': N,
  'num_key_value_heads': KEYS, 'num_hidden_layers': LAYERS, 'vocab_size': V, 'rms_norm_eps': 1e-5,
  'max_position_embeddings': 32, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0},
  'tie_word_embeddings': True, 'hidden_act': 'silu',
}  # fmt: skip
PLAIN = {
  'model.vocab_size': V, 'depth.kind': 'fixed', 'depth.mean': 1, 'depth.backprop_depth': 1, 'model.injection': 'add',
  'model.state_init': 'zero', **{f'model.{name}': value for name, value in llama.BLOCKS.items()},
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
  layer = {
    'input_layernorm': (D,), 'self_attn.q_proj': (N * H, D), 'self_attn.k_proj': (KEYS * H, D),
    'self_attn.v_proj': (KEYS * H, D), 'self_attn.o_proj': (D, N * H), 'post_attention_layernorm': (D,),
    'mlp.gate_proj': (F, D), 'mlp.up_proj': (F, D), 'mlp.down_proj': (D, F),
  }  # fmt: skip
  layers = {f'model.layers.{i}.{name}.weight': shape for i in range(LAYERS) for name, shape in layer.items()}
  return {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,), **layers}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path, rng = tmp_path_factory.mktemp('llama'), np.random.default_rng(0)
  weights = {name: np.float32(rng.normal(len(shape) == 1, 0.3, shape)) for name, shape in shapes().items()}
  save_file(weights, path / 'model.safetensors')
  (path / 'config.json').write_text(json.dumps(CONFIG))
  return path


def norm(x, scale, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def turn(x, base):
  """Rotary embedding of [T, heads, H], pairs half a head apart."""
  half = x.shape[-1] // 2
  angle = np.arange(len(x))[:, None, None] / base ** (np.arange(half) / half)
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def llama_logits(weights: dict, config: dict, tokens, layers) -> np.ndarray:
  """Llama in float64, one row; layers: which run, in order."""
  w = {name.removeprefix('model.').removesuffix('.weight'): np.float64(array) for name, array in weights.items()}
  x, eps, base = w['embed_tokens'][tokens], config['rms_norm_eps'], config['rope_parameters']['rope_theta']
  heads, keys = config['num_attention_heads'], config['num_key_value_heads']
  future = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
  for i in layers:
    at = lambda name, i=i: w[f'layers.{i}.{name}']
    h = norm(x, at('input_layernorm'), eps)
    q, k, v = (
      (h @ at(f'self_attn.{name}_proj').T).reshape(len(x), n, -1)
      for name, n in zip('qkv', (heads, keys, keys), strict=True)
    )
    q, k, out = turn(q, base), turn(k, base), []
    for head in range(heads):
      mine = head * keys // heads
      score = q[:, head] @ k[:, mine].T / np.sqrt(q.shape[-1]) + future
      share = np.exp(score - score.max(-1, keepdims=True))
      out.append(share / share.sum(-1, keepdims=True) @ v[:, mine])
    x = x + np.concatenate(out, -1) @ at('self_attn.o_proj').T
    h = norm(x, at('post_attention_layernorm'), eps)
    gate = h @ at('mlp.gate_proj').T
    x = x + (gate / (1 + np.exp(-gate)) * (h @ at('mlp.up_proj').T)) @ at('mlp.down_proj').T
  return norm(x, w['norm'], eps) @ w['embed_tokens'].T


def logits_of(run: trained.Trained, tokens, depth: int) -> np.ndarray:
  rows = Rows(np.arange(len(tokens))[None], None)
  s_BTD = run.model.init_state(jax.random.key(5), np.zeros(1, np.int32), len(tokens))
  e_BTD = run.model.embed_input(run.params, tokens[None], rows)
  s_BTD = run.model.advance(run.params, s_BTD, e_BTD, rows, depth)
  return np.asarray(run.model.scores(run.params, run.model.apply_coda(run.params, s_BTD, rows)))[0]


def assert_close(got, want):
  assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize('chosen, layers', [('0/2-3/4', (0, 2, 3, 4)), ('/4,0/', (4, 0))])
def test_before_training_it_is_the_chosen_layers_of_llama_at_any_depth(folder, tmp_path, chosen, layers):
  retrofit(folder, tmp_path / 'run', chosen)
  run, tokens = trained.load(tmp_path / 'run'), np.random.default_rng(1).integers(0, V, T)
  want = llama_logits(load_file(folder / 'model.safetensors'), CONFIG, tokens, layers)
  for depth in (1, 3):
    assert_close(logits_of(run, tokens, depth), want)


def test_a_plain_decoder_leaves_as_a_llama_and_comes_back_with_an_adapter(tmp_path):
  config, params = tiny_config(**PLAIN), random_params(tiny_model(**PLAIN))
  assert llama.is_plain(config)
  to_hf.write_folder(tmp_path / 'hf', to_hf.texts_of(config), params, config, 10**9)
  assert retrofit(tmp_path / 'hf', tmp_path / 'run', '0/1/2').data == from_hf.DataConfig(seq_len=10)
  run, tokens = trained.load(tmp_path / 'run'), np.arange(T) * 7
  there = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  want = llama_logits(load_file(tmp_path / 'hf' / 'model.safetensors'), there, tokens, range(3))
  plain = trained.Trained(config, tiny_model(**PLAIN), params, run.mesh, 0)
  assert_close(logits_of(plain, tokens, 1), want)
  assert_close(logits_of(run, tokens, 1), want)
  back = jax.device_get(run.params)
  assert back.pop('injection')['kernel'].sum() == config.model.width
  assert_same(back, params)


@pytest.mark.slow
def test_transformers_reads_the_plain_decoder(tmp_path):
  torch = pytest.importorskip('torch', reason='pip install -r launch/requirements/interop.txt')
  transformers = pytest.importorskip('transformers')
  config, params = tiny_config(**PLAIN), random_params(tiny_model(**PLAIN))
  to_hf.write_folder(tmp_path / 'hf', to_hf.texts_of(config), params, config, 20_000)
  theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', output_loading_info=True)
  assert type(theirs).__name__ == 'LlamaForCausalLM' and not info['missing_keys'] and not info['unexpected_keys']
  tokens = np.arange(T) * 7
  with torch.no_grad():
    want = theirs(torch.tensor(tokens[None])).logits[0].numpy()
  model = tiny_model(**PLAIN)
  assert_close(logits_of(trained.Trained(config, model, params, None, 0), tokens, 1), want)


@pytest.mark.parametrize(
  'changes, chosen, words',
  [
    ({'model_type': 'mistral'}, '0/1/2', "model_type='mistral' is not supported"),
    ({'attention_bias': True}, '0/1/2', 'attention_bias=True'),
    ({'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 5.0}}, '0/1/2', "rope_type='llama3'"),
    ({'rope_parameters': None}, '0/1/2', '^[^:]*config.json: rope_parameters=None is a NoneType; the rule is dict'),
    ({'head_dim': 8}, '0/1/2', 'head_dim=8 .* must be 6'),
    ({'num_key_value_heads': 3}, '0/1/2', 'does not divide'),
    ({'tie_word_embeddings': False}, '0/1/2', 'lm_head.weight is missing'),
    ({'num_hidden_layers': 4}, '0/1/2', 'unknown tensor .model.layers.4'),
    ({'intermediate_size': 21}, '0/1/2', r'has shape \(20, 24\)'),
    ({}, '0/1/5', 'there is no layer 5'),
    ({}, '0/1', 'the rule is prelude/core/coda'),
    ({}, '0//2', 'the core has no layer'),
    ({}, '0/2-1/3', "'2-1' is no layer"),
  ],
)
def test_what_is_no_such_llama_is_named_and_nothing_is_made(folder, tmp_path, changes, chosen, words):
  weights = load_file(folder / 'model.safetensors')
  save_file(weights, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG | changes))
  with pytest.raises(BadInput, match=words):
    retrofit(tmp_path, tmp_path / 'run', chosen)
  assert not list(tmp_path.glob('run*'))


def test_layers_are_ranges_and_lists():
  assert layers_of('0,2/3-5,1/6', 7) == ((0, 2), (3, 4, 5, 1), (6,))
