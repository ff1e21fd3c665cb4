"""Huginn checkpoints in the Hugging Face layout: config.json and model.safetensors <-> our config and parameters.

One table says which of their tensors is which of ours and how to turn one into the other; reading and
writing both go by it, and are exact inverses.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_loop.config import DepthConfig, ModelConfig
from latent_loop.errors import BadInput
from latent_loop.interop import files
from latent_loop.model import Params, build
from latent_loop.parallel.sharding import path_of

CONFIG = 'config.json'
_EMBEDDING, HEAD, ROTARY = 'transformer.wte.weight', 'lm_head.weight', 'freqs_cis'

# --- config ------------------------------------------------------------------------------------------

NAMES = ('model_type', '_class_name', 'model_class_name')  # keys that say whose a config.json is
_SIZES = {  # their key -> our field of ModelConfig
  'n_embd': 'width',
  'n_heads': 'num_heads',
  'intermediate_size': 'mlp_dim',
  'n_layers_in_prelude': 'num_prelude_layers',
  'n_layers_in_recurrent_block': 'num_core_layers',
  'n_layers_in_coda': 'num_coda_layers',
}
_STATE_INITS = {'like-init': 'truncated_normal', 'zero': 'zero'}
_LAWS = {'poisson-lognormal-filling': 'poisson_lognormal', 'fixed': 'fixed'}

_ONLY = {  # their keys with one value that the architecture here has; a config may leave them out
  'model_type': 'huginn_raven',
  'architecture_class_name': 'RecurrentGPT',
  'block_class_name': 'SandwichBlock',
  'norm_class_name': 'RMSNorm_llama',
  'mlp_class_name': 'GatedMLP',
  'nonlin_name': 'SiLU',
  'injection_type': 'linear',
  'init_strategy': 'takase',  # it also sets the factor on the embedding
  'bias': False,
  'tie_embeddings': True,
  'tie_word_embeddings': True,
  'rope_scaling': None,
}
_OURS_ONLY = {  # our fields with one value that their architecture has
  'block': 'sandwich',
  'mlp': 'gated_silu',
  'injection': 'linear',
  'core_exit': 'final_norm',
  'qk_norm': False,
  'prelude_norm': False,
  'scale_embedding': True,
}


def read_config(folder: Path) -> tuple[ModelConfig, DepthConfig]:
  """The configs that `folder` describes; raises BadInput for an architecture that is not Huginn's."""
  path = Path(folder) / CONFIG
  values = files.read_json(path)
  _check_architecture(path, values)
  sizes = {ours: files.entry(path, values, theirs, int) for theirs, ours in _SIZES.items()}
  vocab_size = _vocabulary(Path(folder), files.entry(path, values, 'vocab_size', int))
  mean = files.entry(path, values, 'mean_recurrence', int)
  # The reference takes its k as a cap: below it, every iteration carries gradient.
  backprop_depth = min(files.entry(path, values, 'mean_backprop_depth', int), mean)
  model = {
    **sizes,
    'vocab_size': vocab_size,
    'qk_bias': files.entry(path, values, 'qk_bias', bool),
    'state_init': _choice(path, values, 'state_init', _STATE_INITS),
    'norm_eps': _positive(path, values, 'norm_eps'),
    'rope_base': _positive(path, values, 'rope_base'),
  }
  law = _choice(path, values, 'sampling_scheme', _LAWS)
  try:
    depth = DepthConfig(kind=law, mean=mean, backprop_depth=backprop_depth)
    return ModelConfig(**model, compute_dtype='float32', remat='iteration'), depth
  except BadInput as error:
    raise BadInput(f'{path}: {error}') from error


def config_to_hf(model: ModelConfig, depth: DepthConfig, block_size: int) -> dict[str, Any]:
  """What config.json says of a model; raises BadInput for one that is not Huginn's. block_size: longest row."""
  _check_exportable(model)
  laws = {ours: theirs for theirs, ours in _LAWS.items()}
  if depth.kind not in laws:
    raise BadInput(f'config.depth.kind={depth.kind!r}: the reference lacks this law; use one of {", ".join(laws)}')
  return {
    **{theirs: vars(model)[ours] for theirs, ours in _SIZES.items()},
    **{key: value for key, value in _ONLY.items() if value is not None},
    'architectures': ['RavenForCausalLM'],
    'n_layers': model.num_prelude_layers + model.num_core_layers + model.num_coda_layers,
    'num_attention_heads': model.num_heads,
    'num_key_value_heads': model.num_heads,
    'block_size': block_size,
    'vocab_size': model.vocab_size,
    'padding_multiple': 1,
    'mean_recurrence': depth.mean,
    'mean_backprop_depth': depth.backprop_depth,
    'sampling_scheme': laws[depth.kind],
    'qk_bias': model.qk_bias,
    'state_init': {ours: theirs for theirs, ours in _STATE_INITS.items()}[model.state_init],
    'norm_eps': model.norm_eps,
    'rope_base': model.rope_base,
  }


def _check_architecture(path: Path, values: dict[str, Any]) -> None:
  named = {key: values[key] for key in NAMES if key in values}
  if named.get('model_type') == 'llama':
    raise BadInput(f"{path}: model_type='llama' has no loop; make a run of it by python -m launch.convert retrofit")
  for key, name in named.items():
    if str(name).lower().startswith('parcae'):
      raise BadInput(
        f'{path}: {key}={name!r} is not supported: the attention of Parcae adds value embeddings, tables by token of '
        'their own, which no block here has, so its checkpoints cannot be taken in; experiments/parcae_140m.py trains '
        'its shape without them'
      )
  for key, only in _ONLY.items():
    if key in values and values[key] != only:
      raise BadInput(f'{path}: {key}={values[key]!r} is not supported; only {only!r} is, take another checkpoint')
  heads, width = files.entry(path, values, 'n_heads', int), files.entry(path, values, 'n_embd', int)
  derived = {'num_attention_heads': heads, 'num_key_value_heads': heads, 'head_dim': width / max(heads, 1)}
  for key, value in derived.items():
    if key in values and values[key] != value:
      raise BadInput(
        f'{path}: {key}={values[key]!r} with n_heads={heads} and n_embd={width} is not supported; every head has '
        f'its own keys and values and an equal share of the width, so it must be {value:g}'
      )
  if 'init_values' in values and 'embed_scale' in files.entry(path, values, 'init_values', dict):
    scale = files.entry(path, values['init_values'], 'embed_scale', float)
    if not math.isclose(scale, math.sqrt(max(width, 0)), rel_tol=1e-5):
      raise BadInput(f'{path}: init_values.embed_scale={scale!r} is not supported; only sqrt(n_embd) is')


def _check_exportable(cfg: ModelConfig) -> None:
  for field, only in _OURS_ONLY.items():
    value = vars(cfg)[field]
    if value != only:
      raise BadInput(
        f'config.model.{field}={value!r}: Huginn has no such part; only {only!r} can be exported (a plain decoder, as '
        'of experiments/plain_text.py, leaves as a Llama; Parcae has no layout for a model without value embeddings)'
      )


def _choice(path: Path, values: dict[str, Any], key: str, choices: dict[str, str]) -> str:
  value = files.entry(path, values, key, str)
  if value not in choices:
    raise BadInput(f'{path}: {key}={value!r} is not supported; the rule is one of {", ".join(choices)}')
  return choices[value]


def _positive(path: Path, values: dict[str, Any], key: str) -> float:
  value = files.entry(path, values, key, float)
  if not 0 < value < math.inf:
    raise BadInput(f'{path}: {key}={value!r}; the rule is a positive number, correct it')
  return value


def _vocabulary(folder: Path, vocab_size: int) -> int:
  """Rows of the stored embedding: the vocabulary, often padded to a round number."""
  path = files.locate(folder, _EMBEDDING)
  shape = files.tensor_shapes(path)[_EMBEDDING]
  if len(shape) != 2 or shape[0] < vocab_size:
    raise BadInput(
      f'{path}: {_EMBEDDING} has shape {shape}, but {folder / CONFIG} says vocab_size={vocab_size}; '
      'it needs at least that many rows, so the two are not of the same model'
    )
  return shape[0]


# --- weights -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of theirs, and the parameters of ours that it holds.

  split(theirs) gives one array per path; join(*ours) is its inverse.
  """

  name: str
  shape: tuple[int, ...]
  paths: tuple[str, ...]
  split: Callable[[np.ndarray], tuple[np.ndarray, ...]]
  join: Callable[..., np.ndarray]


def table(cfg: ModelConfig) -> tuple[Tensor, ...]:
  """Every tensor of the model: the whole mapping."""
  V, D = cfg.vocab_size, cfg.width
  tensors = [
    Tensor(_EMBEDDING, (V, D), ('embed/embedding',), _alone, _same),
    Tensor('transformer.adapter.weight', (D, 2 * D), ('injection/kernel',), _transposed_alone, np.transpose),
    Tensor('transformer.ln_f.weight', (D,), ('final_norm/scale',), _alone, _same),
  ]
  stacks = (
    ('prelude', 'prelude', cfg.num_prelude_layers),
    ('core_block', 'core', cfg.num_core_layers),
    ('coda', 'coda', cfg.num_coda_layers),
  )
  for theirs, ours, count in stacks:
    for i in range(count):
      for tensor in _block(cfg):
        paths = tuple(f'{ours}/{i}/{path}' for path in tensor.paths)
        tensors.append(dataclasses.replace(tensor, name=f'transformer.{theirs}.{i}.{tensor.name}', paths=paths))
  return tuple(tensors)


def _block(cfg: ModelConfig) -> list[Tensor]:
  """The tensors of one block. Their linear maps are [out, in]; ours are [in, out] with heads apart."""
  D, F, N, H = cfg.width, cfg.mlp_dim, cfg.num_heads, cfg.head_dim
  qkv, gate_up = ('attn/q/kernel', 'attn/k/kernel', 'attn/v/kernel'), ('mlp/gate/kernel', 'mlp/up/kernel')
  out = lambda w: (w.T.reshape(N, H, D),)
  tensors = [Tensor(f'norm_{i}.weight', (D,), (f'norm_{i}/scale',), _alone, _same) for i in range(1, 5)]
  tensors += [
    Tensor('attn.Wqkv.weight', (3 * D, D), qkv, lambda w: _split_qkv(w, N, H), _join_qkv),
    Tensor('attn.proj.weight', (D, D), ('attn/out/kernel',), out, lambda w_NHD: w_NHD.reshape(D, D).T),
    Tensor('mlp.fc.weight', (2 * F, D), gate_up, lambda w: tuple(part.T for part in np.split(w, 2)), _join_gate_up),
    Tensor('mlp.proj.weight', (D, F), ('mlp/down/kernel',), _transposed_alone, np.transpose),
  ]
  if cfg.qk_bias:
    split = lambda b: tuple(_to_halves(b)[:, 0])
    tensors.append(Tensor('attn.qk_bias', (2, 1, N, H), ('attn/q/bias', 'attn/k/bias'), split, _join_qk_bias))
  return tensors


def _alone(x: np.ndarray) -> tuple[np.ndarray]:
  return (x,)


def _same(x: np.ndarray) -> np.ndarray:
  return x


def _transposed_alone(x: np.ndarray) -> tuple[np.ndarray]:
  return (x.T,)


def _join_gate_up(gate_DF: np.ndarray, up_DF: np.ndarray) -> np.ndarray:
  return np.concatenate([gate_DF.T, up_DF.T])


def _to_halves(x: np.ndarray) -> np.ndarray:
  """Rotary pairs from neighbors (2i, 2i + 1), theirs, to halves (i, i + H/2), ours; over the last axis."""
  return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def _to_neighbors(x: np.ndarray) -> np.ndarray:
  """The inverse of _to_halves."""
  return np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)


def _split_qkv(w: np.ndarray, N: int, H: int) -> tuple[np.ndarray, ...]:
  q_DNH, k_DNH, v_DNH = w.reshape(3, N, H, -1).transpose(0, 3, 1, 2)
  return _to_halves(q_DNH), _to_halves(k_DNH), v_DNH


def _join_qkv(q_DNH: np.ndarray, k_DNH: np.ndarray, v_DNH: np.ndarray) -> np.ndarray:
  stacked = np.stack([_to_neighbors(q_DNH), _to_neighbors(k_DNH), v_DNH])
  return stacked.transpose(0, 2, 3, 1).reshape(-1, q_DNH.shape[0])


def _join_qk_bias(q_NH: np.ndarray, k_NH: np.ndarray) -> np.ndarray:
  return _to_neighbors(np.stack([q_NH, k_NH]))[:, None]


def to_hf(params: Params, cfg: ModelConfig) -> dict[str, np.ndarray]:
  """Their tensors, by name, from our parameters (or gradients); raises BadInput for a model that is not Huginn's."""
  return dict(stream_to_hf(params, cfg))


def stream_to_hf(params: Params, cfg: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
  """The same one by one, in the order of `table`, so that the host need not hold all of them."""
  _check_exportable(cfg)
  yield from stream(params, table(cfg))


def stream(params: Params, tensors: tuple[Tensor, ...]) -> Iterator[tuple[str, np.ndarray]]:
  """(name, array) of every tensor of a table, one by one."""
  ours = {path_of(keypath): leaf for keypath, leaf in jax.tree_util.tree_leaves_with_path(params)}
  for t in tensors:
    yield t.name, np.ascontiguousarray(t.join(*(np.asarray(ours[path]) for path in t.paths)))


def rotary_table(cfg: ModelConfig, positions: int) -> np.ndarray:
  """The buffer that the reference stores beside its weights: cosine and sine, [1, positions, 1, H/2, 2].

  All in float32, as the reference makes it; its sines may differ in the last digit.
  """
  dim = np.float32(cfg.head_dim)
  frequencies = np.float32(1) / np.float32(cfg.rope_base) ** (np.arange(0, cfg.head_dim, 2, dtype=np.float32) / dim)
  angles = np.outer(np.arange(positions, dtype=np.float32), frequencies)
  return np.stack([np.cos(angles), np.sin(angles)], axis=-1)[None, :, None]


def read_params(folder: Path, cfg: ModelConfig) -> Params:
  """Our parameters as float32 NumPy arrays, in the tree of `Model.init`; raises BadInput for what does not fit."""
  _check_exportable(cfg)
  where = files.tensor_files(Path(folder))
  _check_extras(where, cfg)
  return assemble(read_arrays(where, table(cfg), folder), cfg)


def read_arrays(where: dict[str, Path], tensors: tuple[Tensor, ...], folder: Path) -> dict[str, np.ndarray]:
  """Ours by path, from the tensors of a table; raises BadInput for one that is missing or of another shape."""
  ours: dict[str, np.ndarray] = {}
  for tensor in tensors:
    if tensor.name not in where:
      raise BadInput(f'{folder}: tensor {tensor.name!r} is missing from the weights; download them again')
    stored = files.read_shaped(where[tensor.name], tensor.name, tensor.shape)
    ours |= zip(tensor.paths, map(np.ascontiguousarray, tensor.split(stored)), strict=True)
  return ours


def assemble(ours: dict[str, np.ndarray], cfg: ModelConfig) -> Params:
  """The tree of `Model.init` from arrays by path, all of them."""
  expected = jax.eval_shape(build(cfg, DepthConfig()).init, jax.random.key(0))
  assert len(ours) == len(jax.tree.leaves(expected)), 'the table and the model disagree; edit the table'

  def pick(keypath, leaf):
    found = ours[path_of(keypath)]
    assert found.shape == leaf.shape, f'{path_of(keypath)}: the table gives {found.shape}, the model has {leaf.shape}'
    return found

  return jax.tree_util.tree_map_with_path(pick, expected)


def _check_extras(where: dict[str, Path], cfg: ModelConfig) -> None:
  """A second copy of the tied head and the rotary table may be stored, but must say what the model computes."""
  unknown = sorted(where.keys() - {tensor.name for tensor in table(cfg)} - {HEAD, ROTARY})
  if unknown:
    raise BadInput(f'{where[unknown[0]]}: unknown tensor {unknown[0]!r}; this model has no place for it')
  check_tied(where, _EMBEDDING, cfg)
  if ROTARY in where:
    _check_rotary(where[ROTARY], cfg)


def check_tied(where: dict[str, Path], embedding: str, cfg: ModelConfig) -> None:
  """A head that is stored must equal the embedding."""
  if HEAD in where:
    shape = (cfg.vocab_size, cfg.width)
    head = files.read_shaped(where[HEAD], HEAD, shape)
    if embedding in where and not np.array_equal(head, files.read_shaped(where[embedding], embedding, shape)):
      raise BadInput(f'{where[HEAD]}: {HEAD} differs from {embedding}; only tied embeddings are supported')


def _check_rotary(path: Path, cfg: ModelConfig) -> None:
  stored = files.read_tensor(path, ROTARY)
  half = cfg.head_dim // 2
  if stored.ndim != 5 or stored.shape != (1, stored.shape[1], 1, half, 2):
    raise BadInput(f'{path}: {ROTARY} has shape {stored.shape}; the rule is (1, positions, 1, {half}, 2)')
  expected = rotary_table(cfg, stored.shape[1])
  # Wide enough for a bfloat16 copy and for float32 angles of thousands of radians; another base is off by 1.
  if not np.allclose(stored, expected, rtol=0, atol=1e-2):
    raise BadInput(f'{path}: {ROTARY} is not the rotary table of rope_base={cfg.rope_base:g}; correct the config')
