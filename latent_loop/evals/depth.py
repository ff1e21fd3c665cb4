"""Loss, accuracy and the state's behavior at many depths from one unroll.

The states at the asked depths are kept as they pass and read by the coda one after the other, so a sweep
costs one pass to the deepest depth plus one coda per depth, not one pass per depth.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from latent_loop.batch import Batch
from latent_loop.errors import BadInput
from latent_loop.metrics import Mean
from latent_loop.model import Model, Params
from latent_loop.model.layers import Rows
from latent_loop.parallel.sharding import BATCH, ROW_AXES, specs_of
from latent_loop.parallel.weights import gather, on_rows

_DEEPEST = 4096  # iterations, where four times the mean of training is less


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DepthMeans:
  """Sums over batches, one entry per depth on the leading axis R."""

  nll: Mean  # nats per token
  accuracy: Mean
  kl_to_deepest: Mean  # KL(deepest || this), nats
  residual: Mean  # |s_r - s_{r-1}| / |s_r| of the raw states, per token
  token_correlation: Mean  # near 1: the states of a row are all alike (collapse)
  text_bytes: jax.Array  # target tokens that are bytes, for bits per byte

  def __add__(self, other: 'DepthMeans') -> 'DepthMeans':
    return jax.tree.map(jnp.add, self, other)


def default_depths(mean_depth: int) -> tuple[int, ...]:
  """1, 2, 4, ... up to 4 times the mean depth, the mean always among them."""
  powers = [2**i for i in range(20) if 2**i <= 4 * mean_depth]
  return tuple(sorted({*powers, mean_depth, 4 * mean_depth}))


def deepest(mean_depth: int) -> int:
  """The depth beyond which nobody means what he asks: it would compute for days and say nothing."""
  return max(_DEEPEST, 4 * mean_depth)


def check_depths(depths: tuple[int, ...], mean_depth: int) -> tuple[int, ...]:
  """Sorted and without repeats; raises BadInput below 1 and above what `deepest` says."""
  most = deepest(mean_depth)
  for depth in depths:
    if not 1 <= depth <= most:
      raise BadInput(
        f'--depths={depth}: the core runs at least once, and a model trained at a mean depth of {mean_depth} is '
        f'evaluated down to {most} at most; give depths from 1 to {most}'
      )
  return tuple(sorted(set(depths)))


def states_at(
  model: Model, params: Params, s_BTD: jax.Array, e_BTD: jax.Array, rows: Rows, gaps_R: jax.Array
) -> jax.Array:
  """[R, B, T, D]: the states gaps_R[0] iterations after s_BTD, gaps_R[1] more, and so on."""

  def visit(s_BTD, gap):
    s_BTD = model.advance(params, s_BTD, e_BTD, rows, gap)
    return s_BTD, s_BTD

  return jax.lax.scan(visit, s_BTD, gaps_R)[1]


def make_depth_eval(model: Model, mesh: Mesh, depths: tuple[int, ...], loss_chunk: int):
  """(params, batch, key) -> DepthMeans; the number of depths is compiled in, the depths are not."""
  gaps_R = jnp.diff(jnp.array((0, *depths)))

  def evaluate(params: Params, batch: Batch, example_ids_B: jax.Array, key: jax.Array, gaps_R: jax.Array):
    """The sums over all rows; runs on each device, over its own."""
    params = gather(model.cast(params), specs_of(params))
    T = batch.tokens_BT.shape[1]
    rows = Rows(batch.positions_BT, batch.segment_ids_BT).ready(model.cfg)
    e_BTD = model.embed_input(params, batch.tokens_BT, rows)
    real_BT = (batch.segment_ids_BT > 0).astype(jnp.float32)

    def visit(s_BTD, gap):
      before_BTD = model.advance(params, s_BTD, e_BTD, rows, gap - 1)
      s_BTD = model.apply_core(params, before_BTD, e_BTD, rows)
      step_BT = _norm(s_BTD - before_BTD) / jnp.maximum(_norm(s_BTD), 1e-9)
      return s_BTD, (s_BTD, Mean.of(step_BT, real_BT), token_correlation(s_BTD, real_BT))

    s_BTD = model.init_state(key, example_ids_B, T)
    deepest_BTD, (states_RBTD, residual, correlation) = jax.lax.scan(visit, s_BTD, gaps_R)
    deepest_BTD = model.apply_coda(params, deepest_BTD, rows)

    def read(s_BTD):
      y_BTD = model.apply_coda(params, s_BTD, rows)
      return _predictions(model, params, y_BTD, deepest_BTD, batch, min(loss_chunk, T))

    nll, accuracy, kl = jax.lax.map(read, states_RBTD)
    text_bytes = jnp.sum(batch.weights_BT * (batch.targets_BT < 256))
    return jax.lax.psum(DepthMeans(nll, accuracy, kl, residual, correlation, text_bytes), ROW_AXES)

  @jax.jit
  def everywhere(params, batch, key, gaps_R):
    rows = (BATCH, BATCH)
    run = on_rows(evaluate, mesh, (specs_of(params), *rows, P(), P()), P())
    return run(params, batch, jnp.arange(batch.tokens_BT.shape[0]), key, gaps_R)

  @functools.wraps(everywhere)
  def run(params: Params, batch: Batch, key: jax.Array) -> DepthMeans:
    with jax.set_mesh(mesh):
      return everywhere(params, batch, key, gaps_R)

  return run


def _norm(x_BTD: jax.Array) -> jax.Array:
  return jnp.linalg.norm(x_BTD.astype(jnp.float32), axis=-1)


def token_correlation(s_BTD: jax.Array, real_BT: jax.Array) -> Mean:
  """Mean cosine of the centered states of two tokens of a row, minus the share of a token with itself.

  Near 0 when tokens differ, near 1 when all are alike: how the paper's first run failed (section 4.3).
  """
  x_BTD = s_BTD.astype(jnp.float32)
  x_BTD = x_BTD - jnp.mean(x_BTD, axis=-1, keepdims=True)
  x_BTD = x_BTD / jnp.maximum(jnp.linalg.norm(x_BTD, axis=-1, keepdims=True), 1e-9) * real_BT[..., None]
  tokens_B = jnp.maximum(jnp.sum(real_BT, axis=1), 1)
  squared_B = jnp.sum(jnp.square(jnp.sum(x_BTD, axis=1)), axis=-1)
  return Mean.of(squared_B / tokens_B**2 - 1 / tokens_B, jnp.ones_like(tokens_B))


def _predictions(
  model: Model, params: Params, y_BTD: jax.Array, deepest_BTD: jax.Array, batch: Batch, chunk: int
) -> tuple[Mean, Mean, Mean]:
  """(nll, accuracy, KL to the deepest prediction), over chunks of positions."""

  def one(means, chunk):
    y_BTD, deepest_BTD, targets_BT, weights_BT = chunk
    log_p_BTV = jax.nn.log_softmax(model.scores(params, y_BTD))
    log_q_BTV = jax.nn.log_softmax(model.scores(params, deepest_BTD))
    nll_BT = -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0]
    right_BT = jnp.argmax(log_p_BTV, axis=-1) == targets_BT
    kl_BT = jnp.sum(jnp.exp(log_q_BTV) * (log_q_BTV - log_p_BTV), axis=-1)
    new = tuple(Mean.of(x, weights_BT) for x in (nll_BT, right_BT.astype(jnp.float32), kl_BT))
    return jax.tree.map(jnp.add, means, new), None

  B = y_BTD.shape[0]
  split = lambda x: x.reshape(B, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
  zero = Mean(jnp.float32(0), jnp.float32(0))
  chunks = tuple(split(x) for x in (y_BTD, deepest_BTD, batch.targets_BT, batch.weights_BT))
  return jax.lax.scan(one, (zero, zero, zero), chunks)[0]


def summarize(means: DepthMeans, depths: tuple[int, ...]) -> dict[str, Any]:
  """Plain numbers by depth, keyed as in depth_report.json."""
  by_depth = lambda values_R: {str(r): float(v) for r, v in zip(depths, values_R, strict=True)}
  means = jax.device_get(means)
  bits_R = means.nll.total / math.log(2) / max(float(means.text_bytes), 1.0)
  return {
    'loss_by_depth': by_depth(means.nll.value()),
    'bits_per_byte_by_depth': by_depth(bits_R),
    'accuracy_by_depth': by_depth(means.accuracy.value()),
    'residual_by_depth': by_depth(means.residual.value()),
    'kl_to_deepest_by_depth': by_depth(means.kl_to_deepest.value()),
    'token_correlation_by_depth': by_depth(means.token_correlation.value()),
  }


def table(numbers: dict[str, Any]) -> list[str]:
  """Loss, accuracy and residual by depth as lines of text."""
  chance = numbers['chance_accuracy']
  lines = ['depth   loss   bits/byte  accuracy  residual' + ('' if chance is None else f'   (chance {chance:.3f})')]
  bits_by_depth = numbers.get('bits_per_byte_by_depth', {})
  for depth, loss in numbers['loss_by_depth'].items():
    bits = f'{bits_by_depth[depth]:.4f}' if bits_by_depth else '-'
    right, residual = numbers['accuracy_by_depth'][depth], numbers['residual_by_depth'][depth]
    lines.append(f'{depth:>5}  {loss:.4f}   {bits:<6}    {right:.3f}    {residual:.1e}')
  return lines
