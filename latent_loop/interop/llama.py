"""Plain decoders in the Hugging Face layout of Llama: config.json and safetensors <-> our config and parameters.

Their layers are our pre-norm blocks with gated SiLU, without biases, over an embedding that is not scaled; rotary pairs
are halves in both, so no weight is permuted. Keys and values that heads share are repeated.
"""

from pathlib import Path
from typing import Any

import numpy as np

from latent_loop.config import Config, ModelConfig
from latent_loop.errors import BadInput
from latent_loop.interop import files
from latent_loop.interop.huggingface import CONFIG, HEAD, Tensor, check_tied

_EMBEDDING = 'model.embed_tokens.weight'
_SIZES = {  # their key -> our field of ModelConfig
  'vocab_size': 'vocab_size',
  'hidden_size': 'width',
  'intermediate_size': 'mlp_dim',
  'num_attention_heads': 'num_heads',
}
_ONLY = {  # their keys with one value that we have; a config may leave them out
  'model_type': 'llama',
  'hidden_act': 'silu',
  'attention_bias': False,
  'mlp_bias': False,
  'rope_scaling': None,
  'pretraining_tp': 1,
}
BLOCKS = {  # our fields with one value that their architecture has
  'block': 'pre_norm',
  'mlp': 'gated_silu',
  'qk_bias': False,
  'qk_norm': False,
  'prelude_norm': False,
  'core_exit': 'none',
  'scale_embedding': False,
}
_ONCE = {'injection': 'add', 'state_init': 'zero'}  # at depth 1 the core then reads the prelude's output


def is_plain(config: Config) -> bool:
  """Whether a run is trained as a plain decoder: Llama's blocks, each applied once, to zero plus what was before."""
  model, depth = vars(config.model), config.depth
  once = depth.kind == 'fixed' and depth.mean == 1
  return once and all(model[name] == value for name, value in (BLOCKS | _ONCE).items())


def config_to_hf(cfg: ModelConfig, positions: int) -> dict[str, Any]:
  """What config.json says of a plain decoder. positions: of the longest row."""
  return {
    **_ONLY,
    **{theirs: vars(cfg)[ours] for theirs, ours in _SIZES.items()},
    'architectures': ['LlamaForCausalLM'],
    'num_hidden_layers': _num_layers(cfg),
    'num_key_value_heads': cfg.num_heads,
    'head_dim': cfg.head_dim,
    'max_position_embeddings': positions,
    'rms_norm_eps': cfg.norm_eps,
    'rope_theta': cfg.rope_base,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': cfg.rope_base},  # as newer versions write it
    'tie_word_embeddings': True,
    'torch_dtype': 'float32',
  }


def read_config(folder: Path) -> tuple[ModelConfig, int, int]:
  """(the model with all layers in its core, the heads that have keys, the longest row); raises BadInput."""
  path = folder / CONFIG
  values = files.read_json(path)
  for key, only in _ONLY.items():
    if values.get(key, only) != only:
      raise BadInput(f'{path}: {key}={values[key]!r} is not supported; only {only!r} is, take another checkpoint')
  sizes = {ours: files.entry(path, values, theirs, int) for theirs, ours in _SIZES.items()}
  layers, heads = files.entry(path, values, 'num_hidden_layers', int), sizes['num_heads']
  key_heads = files.entry(path, {'num_key_value_heads': heads} | values, 'num_key_value_heads', int)
  norm_eps, rope_base = files.entry(path, values, 'rms_norm_eps', float), _rope_base(path, values)
  head_dim = values.get('head_dim')
  try:
    cfg = ModelConfig(
      **sizes, **BLOCKS, num_prelude_layers=0, num_core_layers=layers, num_coda_layers=0,
      norm_eps=norm_eps, rope_base=rope_base,
    )  # fmt: skip
  except BadInput as error:
    raise BadInput(f'{path}: {error}') from error
  if head_dim not in (None, cfg.head_dim):
    raise BadInput(f'{path}: head_dim={head_dim!r} is not supported; it must be {cfg.head_dim}, an equal share')
  if key_heads < 1 or heads % key_heads:
    raise BadInput(f'{path}: num_key_value_heads={key_heads} does not divide num_attention_heads={heads}; correct it')
  return cfg, key_heads, files.entry(path, values, 'max_position_embeddings', int)


def _rope_base(path: Path, values: dict[str, Any]) -> float:
  """rope_theta, which newer versions keep among rope_parameters; Llama's 10000 where neither is given."""
  inner = files.entry(path, {'rope_parameters': {}} | values, 'rope_parameters', dict)
  if inner.get('rope_type', 'default') != 'default':
    raise BadInput(f'{path}: rope_parameters.rope_type={inner["rope_type"]!r} is not supported; only "default" is')
  return files.entry(path, {'rope_theta': 10_000.0} | values | inner, 'rope_theta', float)


def check_extras(where: dict[str, Path], cfg: ModelConfig, folder: Path) -> None:
  """Raises BadInput for a head of its own, and for tensors that Llama has not. cfg: with all layers."""
  if HEAD not in where and files.read_json(folder / CONFIG).get('tie_word_embeddings') is False:
    raise BadInput(f'{folder}: tie_word_embeddings is False and {HEAD} is missing; download the weights again')
  check_tied(where, _EMBEDDING, cfg)
  known = {tensor.name for tensor in table(cfg)} | {HEAD}
  unknown = sorted(name for name in where.keys() - known if not name.endswith('rotary_emb.inv_freq'))
  if unknown:
    raise BadInput(f'{where[unknown[0]]}: unknown tensor {unknown[0]!r}; this model has no place for it')


def _num_layers(cfg: ModelConfig) -> int:
  return cfg.num_prelude_layers + cfg.num_core_layers + cfg.num_coda_layers


def table(cfg: ModelConfig, layers: tuple[int, ...] = (), key_heads: int | None = None) -> tuple[Tensor, ...]:
  """Every tensor of the model. layers: which of theirs our blocks are, in order; all of them where none is given."""
  V, D = cfg.vocab_size, cfg.width
  counts = {'prelude': cfg.num_prelude_layers, 'core': cfg.num_core_layers, 'coda': cfg.num_coda_layers}
  places = [f'{part}/{i}' for part, count in counts.items() for i in range(count)]
  tensors = [_plain(_EMBEDDING, (V, D), 'embed/embedding'), _plain('model.norm.weight', (D,), 'final_norm/scale')]
  for number, place in zip(layers or range(_num_layers(cfg)), places, strict=True):
    tensors += _layer(f'model.layers.{number}', place, cfg, key_heads or cfg.num_heads)
  return tuple(tensors)


def _plain(name: str, shape: tuple[int, ...], path: str) -> Tensor:
  return Tensor(name, shape, (path,), lambda x: (x,), lambda x: x)


def _layer(theirs: str, ours: str, cfg: ModelConfig, key_heads: int) -> list[Tensor]:
  """Their linear maps are [out, in]; ours are [in, out] with heads apart."""
  D, F, N, H = cfg.width, cfg.mlp_dim, cfg.num_heads, cfg.head_dim

  def heads(name: str, count: int) -> Tensor:
    split = lambda w: (np.repeat(w.T.reshape(D, count, H), N // count, axis=1),)
    join = lambda w_DNH: w_DNH.reshape(D, N * H).T
    path = (f'{ours}/attn/{name}/kernel',)
    return Tensor(f'{theirs}.self_attn.{name}_proj.weight', (count * H, D), path, split, join)

  def linear(name: str, shape: tuple[int, int]) -> Tensor:
    path = (f'{ours}/mlp/{name}/kernel',)
    return Tensor(f'{theirs}.mlp.{name}_proj.weight', shape, path, lambda w: (w.T,), np.transpose)

  out = Tensor(
    f'{theirs}.self_attn.o_proj.weight', (D, N * H), (f'{ours}/attn/out/kernel',),
    lambda w: (w.T.reshape(N, H, D),), lambda w_NHD: w_NHD.reshape(N * H, D).T,
  )  # fmt: skip
  return [
    _plain(f'{theirs}.input_layernorm.weight', (D,), f'{ours}/norm_1/scale'),
    heads('q', N),
    heads('k', key_heads),
    heads('v', key_heads),
    out,
    _plain(f'{theirs}.post_attention_layernorm.weight', (D,), f'{ours}/norm_2/scale'),
    linear('gate', (F, D)),
    linear('up', (F, D)),
    linear('down', (D, F)),
  ]
