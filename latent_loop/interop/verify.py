"""Compares the production code with numbers that the PyTorch reference computed: a golden folder.

forward.safetensors: tokens, init_state, prelude_out, and by depth N state_N, normed_state_rN, logits_rN.
grads.safetensors: nA_kB/loss and nA_kB/NAME for every weight, of A iterations without gradient, then B with.
optimizer.safetensors and optimizer.json: gI_t and pI_t, gradient and result of tensor I at step t, at rate lr[t - 1].
generation.json: token lists, see interop/generation.py. Any of the four may be absent; gradients and token lists are of
the tokens in forward.safetensors.
"""

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_loop import step
from latent_loop.batch import Batch
from latent_loop.config import DepthConfig, ModelConfig, OptimConfig, TrainConfig
from latent_loop.errors import BadInput
from latent_loop.interop import files, generation, huggingface
from latent_loop.model import Model, Params, build
from latent_loop.optim import KINDS

TOLERANCES = {
  'logits_max_abs_err': 3e-5,
  'states_max_abs_err': 2e-5,
  'grads_max_rel_err': 5e-6,  # norm of the difference over the norm
  'optimizer_max_abs_err': 1e-6,
}
SHARES = {  # at least
  'greedy_match': 1.0,
  'ring_match': 1.0,
  'warm_start_match': 1.0,
  'adaptive_steps_match': 0.95,  # a threshold can fall within rounding
}
FORWARD, GRADS, OPTIMIZER, OPTIMIZER_INFO, GENERATION = (
  'forward.safetensors',
  'grads.safetensors',
  'optimizer.safetensors',
  'optimizer.json',
  'generation.json',
)
_FAMILIES = ('state_', 'normed_state_r', 'logits_r')  # each followed by a depth
_NUMBER = r'0|[1-9]\d{0,5}'
_REFERENCE_EPS = 1e-6  # of the reference optimizer, where optimizer.json does not say
_FLAGS = {'update_clipping', 'atan_adam', 'running_init', 'decouple_wd'}  # those that adam_atan2 implements


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What the reference was run on. tokens_BT: the inputs; targets_BT: the same, one place on."""

  cfg: ModelConfig
  depth: DepthConfig
  params: Params
  batch: Batch
  s_BTD: np.ndarray


def verify(golden: Path) -> dict[str, float | bool]:
  """The worst error of each part that `golden` holds, the share of its lists that match, and whether all is well.

  An error that is not finite is given as the largest float. Raises BadInput for a folder that holds no
  part, or holds one that cannot be read whole.
  """
  present = {name for name in (FORWARD, GRADS, OPTIMIZER, OPTIMIZER_INFO, GENERATION) if (golden / name).exists()}
  if not present:
    raise BadInput(
      f'{golden}: holds none of {FORWARD}, {GRADS}, {OPTIMIZER}, {GENERATION}; give a folder of golden numbers'
    )
  errors: dict[str, float] = {}
  # Accelerators otherwise multiply float32 matrices in fewer bits than the tolerances allow.
  with jax.default_matmul_precision('highest'):
    if present & {FORWARD, GRADS, GENERATION}:
      inputs = _read_inputs(golden)
      errors |= _forward_errors(golden / FORWARD, inputs)
      errors |= _gradient_errors(golden / GRADS, inputs) if GRADS in present else {}
    if present & {OPTIMIZER, OPTIMIZER_INFO}:
      errors |= _optimizer_errors(golden / OPTIMIZER, golden / OPTIMIZER_INFO)
    shares = _generation_shares(golden / GENERATION, inputs) if GENERATION in present else {}
  errors = {name: error if math.isfinite(error) else sys.float_info.max for name, error in errors.items()}
  ok = all(error <= TOLERANCES[name] for name, error in errors.items())
  ok &= all(share >= SHARES[name] for name, share in shares.items() if name in SHARES)
  return {**errors, **shares, 'ok': ok}


def _read_inputs(golden: Path) -> Inputs:
  """The model and what it is run on; gradients need the tokens of forward.safetensors too."""
  cfg, depth = huggingface.read_config(golden)
  params = huggingface.read_params(golden, cfg)
  path = golden / FORWARD
  tokens, s_BTD = files.read_tensor(path, 'tokens', integer=True), files.read_tensor(path, 'init_state')
  if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
    raise BadInput(f'{path}: tokens has shape {tokens.shape}; the rule is (rows, inputs + 1), write it again')
  if tokens.min() < 0 or tokens.max() >= cfg.vocab_size:
    raise BadInput(f'{path}: tokens lie in {tokens.min()}..{tokens.max()}; the vocabulary has {cfg.vocab_size}')
  tokens_BT, targets_BT = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
  B, T = tokens_BT.shape
  _check_shape(path, 'init_state', s_BTD, (B, T, cfg.width))
  ones_BT, positions_BT = np.ones((B, T)), np.tile(np.arange(T, dtype=np.int32), (B, 1))
  batch = Batch(tokens_BT, targets_BT, ones_BT.astype(np.float32), positions_BT, ones_BT.astype(np.int32))
  return Inputs(cfg, depth, params, batch, s_BTD)


# --- states and logits -------------------------------------------------------------------------------


def _forward_errors(path: Path, inputs: Inputs) -> dict[str, float]:
  """Every depth that the file names, through one executable."""
  names = files.tensor_shapes(path).keys() - {'tokens', 'init_state'}
  matches = {name: re.fullmatch(rf'({"|".join(_FAMILIES)})({_NUMBER})', name) for name in names - {'prelude_out'}}
  _refuse_unknown(path, (name for name, match in matches.items() if match is None))
  by_family = {family: sorted(int(m[2]) for m in matches.values() if m[1] == family) for family in _FAMILIES}
  # At least one depth of each, whichever the file's author chose.
  _refuse_missing(path, ['prelude_out', *(f'{family}{(depths or [1])[0]}' for family, depths in by_family.items())])
  # A depth with one of its pair, or a gap in the states, is a tensor that got lost.
  reads = set(by_family['normed_state_r']) | set(by_family['logits_r'])
  lost = [f'{family}{n}' for family in _FAMILIES[1:] for n in reads - set(by_family[family])]
  lost += [f'state_{n}' for n in range(1, max(by_family['state_'])) if n not in by_family['state_']]
  _refuse_missing(path, lost)
  model = build(inputs.cfg, inputs.depth)
  run = lambda depth: _outputs(model, inputs.params, inputs.s_BTD, inputs.batch, jnp.int32(depth))
  errors = {'prelude_out': _abs_error(path, 'prelude_out', run(0)['prelude_out'])}
  for depth in sorted(set().union(*by_family.values())):
    outputs = run(depth)
    here = [family for family, depths in by_family.items() if depth in depths]
    errors |= {f'{family}{depth}': _abs_error(path, f'{family}{depth}', outputs[family]) for family in here}
  worst = lambda logits: float(np.max([e for name, e in errors.items() if name.startswith('logits_r') == logits]))
  return {'logits_max_abs_err': worst(True), 'states_max_abs_err': worst(False)}


@functools.partial(jax.jit, static_argnames='model')
def _outputs(model: Model, params: Params, s_BTD: jax.Array, batch: Batch, depth: jax.Array) -> dict[str, jax.Array]:
  """What the golden file holds of one depth: the states as evaluation gets them, the logits as training does."""
  rows, params = step.rows_of(batch), model.cast(params)
  k = jnp.minimum(depth, model.depth.backprop_depth)
  y_BTD = model.forward(params, s_BTD, batch.tokens_BT, rows, depth - k, k)
  e_BTD = model.embed_input(params, batch.tokens_BT, rows)
  state_BTD = model.advance(params, s_BTD, e_BTD, rows, depth)
  return {
    'prelude_out': e_BTD,
    'state_': state_BTD,
    'normed_state_r': model.leave_core(params, state_BTD),
    'logits_r': model.scores(params, y_BTD),
  }


# --- loss and gradients ------------------------------------------------------------------------------


def _gradient_errors(path: Path, inputs: Inputs) -> dict[str, float]:
  """Every (n, k) that the file names, through one executable."""
  known = ['loss', *(tensor.name for tensor in huggingface.table(inputs.cfg))]
  names = files.tensor_shapes(path)
  matches = {name: re.fullmatch(rf'n({_NUMBER})_k({_NUMBER})/(.+)', name) for name in names}
  _refuse_unknown(path, (name for name, match in matches.items() if match is None or match[3] not in known))
  splits = sorted({(int(match[1]), int(match[2])) for match in matches.values()})
  _refuse_missing(path, [f'n{n}_k{k}/{name}' for n, k in splits or [(0, 1)] for name in known])
  errors, max_k = [], max(k for _, k in splits)
  depth = dataclasses.replace(inputs.depth, mean=max(inputs.depth.mean, max_k), backprop_depth=max(max_k, 1))
  model = build(inputs.cfg, depth)
  for n, k in splits:
    loss, grads = _loss_and_gradients(model, inputs.params, inputs.s_BTD, inputs.batch, jnp.int32(n), jnp.int32(k))
    ours = {'loss': loss, **huggingface.to_hf(grads, inputs.cfg)}
    errors += [_rel_error(path, f'n{n}_k{k}/{name}', ours[name]) for name in known]
  return {'grads_max_rel_err': float(np.max(errors))}


@functools.partial(jax.jit, static_argnames='model')
def _loss_and_gradients(model: Model, params: Params, s_BTD: jax.Array, batch: Batch, n: jax.Array, k: jax.Array):
  """(loss, gradients) of n iterations without gradient, then k <= backprop_depth with, as in a training step."""
  # More than one chunk where the length allows it: that is how training runs.
  train = TrainConfig(loss_chunk=math.gcd(batch.tokens_BT.shape[1], 16))

  @jax.value_and_grad
  def loss_fn(params):
    params = model.cast(params)
    y_BTD = model.forward(params, s_BTD, batch.tokens_BT, step.rows_of(batch), n, k)
    return step.chunked_loss(model, params, y_BTD, batch, train).value()

  return loss_fn(params)


# --- generation --------------------------------------------------------------------------------------


def _generation_shares(path: Path, inputs: Inputs) -> dict[str, float]:
  model = build(dataclasses.replace(inputs.cfg, remat='none'), inputs.depth)
  params = jax.jit(model.cast)(inputs.params)
  return generation.matches(path, model, params, np.asarray(inputs.batch.tokens_BT[0]))


# --- optimizer ---------------------------------------------------------------------------------------


def _optimizer_errors(path: Path, info_path: Path) -> dict[str, float]:
  """Each tensor with its own weight decay, through the steps whose rates `lr` lists."""
  info = files.read_json(info_path)
  flags = {flag.strip() for flag in files.entry(info_path, info, 'flags', str).split(',')}
  if flags != _FLAGS:
    raise BadInput(
      f'{info_path}: flags={info["flags"]!r} is not supported; only {", ".join(sorted(_FLAGS))} together are'
    )
  lr, decays = files.read_tensor(path, 'lr'), files.entry(info_path, info, 'weight_decay', list)
  if lr.ndim != 1 or not lr.size or not decays:
    raise BadInput(f'{path}: lr has shape {lr.shape} with {len(decays)} weight decays; the rule is one step or more')
  expected = [f'p{i}_{t}' for i in range(len(decays)) for t in range(lr.size + 1)]
  expected += [f'g{i}_{t}' for i in range(len(decays)) for t in range(1, lr.size + 1)]
  _refuse_unknown(path, files.tensor_shapes(path).keys() - {'lr', *expected})
  _refuse_missing(path, expected)
  errors = [_tensor_errors(path, i, lr, _optim_config(info_path, info, i)) for i in range(len(decays))]
  return {'optimizer_max_abs_err': float(np.max(errors))}


def _optim_config(path: Path, info: dict, i: int) -> OptimConfig:
  number = lambda values, key: files.entry(path, values, key, float)
  betas = files.entry(path, info, 'betas', list)
  if len(betas) != 2:
    raise BadInput(f'{path}: betas={betas!r}; the rule is two numbers from 0 to 1, correct it')
  values = {
    'learning_rate': number(info, 'init_lr'),
    'b1': number({'betas[0]': betas[0]}, 'betas[0]'),
    'b2': number({'betas[1]': betas[1]}, 'betas[1]'),
    'eps': number(info, 'eps') if 'eps' in info else _REFERENCE_EPS,
    'weight_decay': number({f'weight_decay[{i}]': info['weight_decay'][i]}, f'weight_decay[{i}]'),
  }
  try:
    return OptimConfig(kind='adam_atan2', **values, no_decay=(), clip_norm=None)
  except BadInput as error:
    raise BadInput(f'{path}: {error}') from error


def _tensor_errors(path: Path, i: int, lr: np.ndarray, cfg: OptimConfig) -> float:
  """The worst error over the steps of tensor i."""
  rates = jnp.asarray(lr)
  optimizer = KINDS[cfg.kind](cfg, lambda count: rates[count])
  params = {'w': jnp.asarray(files.read_tensor(path, f'p{i}_0'))}
  state, errors = optimizer.init(params), []

  @jax.jit
  def update(grads, state, params):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for t in range(1, lr.size + 1):
    grads = {'w': files.read_tensor(path, f'g{i}_{t}')}
    _check_shape(path, f'g{i}_{t}', grads['w'], params['w'].shape)
    params, state = update(grads, state, params)
    errors.append(_abs_error(path, f'p{i}_{t}', params['w']))
  return float(np.max(errors))


# --- files and distances -----------------------------------------------------------------------------


def _refuse_unknown(path: Path, names: Iterable[str]) -> None:
  """Raises BadInput for the first name: a tensor that is not compared must not count as verified."""
  for name in sorted(names):
    raise BadInput(f'{path}: unknown tensor {name!r}; the names are listed in latent_loop/interop/verify.py')


def _refuse_missing(path: Path, names: Iterable[str]) -> None:
  stored = files.tensor_shapes(path)
  for name in names:
    if name not in stored:
      raise BadInput(f'{path}: tensor {name!r} is missing; write the file again with it')


def _check_shape(path: Path, name: str, stored: np.ndarray, shape: tuple[int, ...]) -> None:
  if stored.shape != shape:
    raise BadInput(f'{path}: {name} has shape {stored.shape}; it must have {shape}, write the file again')


def _difference(path: Path, name: str, ours: jax.Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(ours - theirs, theirs), in float64 so that taking distances adds no error."""
  theirs = files.read_tensor(path, name)
  _check_shape(path, name, theirs, ours.shape)
  return np.asarray(ours, np.float64) - theirs, theirs.astype(np.float64)


def _abs_error(path: Path, name: str, ours: jax.Array | np.ndarray) -> float:
  return float(np.max(np.abs(_difference(path, name, ours)[0])))


def _rel_error(path: Path, name: str, ours: jax.Array | np.ndarray) -> float:
  """Norm of the difference over the norm; where the reference is all zeros, the norm of what ours has."""
  difference, theirs = _difference(path, name, ours)
  norm = np.linalg.norm(theirs)
  return float(np.linalg.norm(difference) / (norm if norm else 1.0))
