"""One training step: (state, batch, key) -> (state, metrics). Nothing it does depends on anything else."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from latent_loop.batch import Batch
from latent_loop.config import Config, TrainConfig
from latent_loop.metrics import Mean
from latent_loop.model import Model, Params, depth
from latent_loop.model.layers import Rows
from latent_loop.optim import make_schedule
from latent_loop.parallel import sharding
from latent_loop.parallel.mesh import with_mesh
from latent_loop.parallel.sharding import ROW_AXES
from latent_loop.parallel.weights import Gathering, on_rows
from latent_loop.trust import guards

STATE = 1  # what the key of a step is folded with for its first state; its depth has 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything a run carries from step to step. `ema` is None unless config.optim.ema_decay is set."""

  step: jax.Array  # batches seen; the optimizer made step - skips.total updates
  params: Params
  opt_state: optax.OptState
  ema: Params | None
  skips: guards.Skips

  @property
  def averaged_params(self) -> Params:
    """What evaluation and generation use: the moving average where there is one."""
    return self.params if self.ema is None else self.ema


def init_state(config: Config, model: Model, optimizer: optax.GradientTransformation) -> TrainState:
  """Step 0; call under jit with out_shardings, or the moments end up on one device."""
  params = model.init(jax.random.key(config.seed))
  ema = params if config.optim.ema_decay else None
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, guards.Skips.none())


def make_sharded_state(config: Config, model: Model, optimizer: optax.GradientTransformation, mesh: Mesh):
  """(function that makes the initial state under its shardings, those shardings)."""
  init = lambda: init_state(config, model, optimizer)
  specs = sharding.shardings(jax.eval_shape(init), mesh)
  # Runs once: on a CPU, unoptimized code compiles in a quarter of the time.
  options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
  return jax.jit(init, out_shardings=specs, compiler_options=options), specs


def rows_of(batch: Batch, one_document: bool = False) -> Rows:
  """What attention must know. one_document: rows are known to need no mask but the causal one."""
  return Rows(batch.positions_BT, None if one_document else batch.segment_ids_BT)


def chunked_loss(model: Model, params: Params, y_BTD: jax.Array, batch: Batch, cfg: TrainConfig) -> Mean:
  """Cross entropy over chunks of positions, whose logits are computed again in the backward pass, or in one chunk."""

  def chunk_loss(y_BTD, targets_BT, weights_BT):
    logits_BTV = model.scores(params, y_BTD)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A masked sum, not a lookup: where the vocabulary is split, each device sums its own part.
    is_target_BTV = jnp.arange(logits_BTV.shape[-1])[None, None] == targets_BT[..., None]
    target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0), axis=-1)
    return Mean.of(log_z_BT - target_BT + cfg.z_loss * jnp.square(log_z_BT), weights_BT)

  with jax.named_scope('loss'):
    B, T, _ = y_BTD.shape
    if cfg.loss_chunk >= T:
      return chunk_loss(y_BTD, batch.targets_BT, batch.weights_BT)
    split = lambda x: x.reshape(B, -1, cfg.loss_chunk, *x.shape[2:]).swapaxes(0, 1)
    chunks = (split(y_BTD), split(batch.targets_BT), split(batch.weights_BT))
    add = lambda mean, chunk: (mean + jax.checkpoint(chunk_loss)(*chunk), None)
    return jax.lax.scan(add, Mean(jnp.float32(0), jnp.float32(0)), chunks)[0]


def make_train_step(config: Config, model: Model, optimizer: optax.GradientTransformation, mesh: Mesh, specs: Any):
  """The compiled step; donates the state. One executable serves every depth."""
  schedule = make_schedule(config.optim, config.train.num_steps)
  param_specs = jax.tree.map(lambda s: s.spec, specs.params)
  gathering = Gathering(config.mesh.weights, param_specs)
  fetch = gathering.ahead_of_iteration if config.mesh.weights == 'gather_per_iteration' else None

  def loss_fn(weights, batch, example_ids_B, key, n, k, total_weight):
    weights = gathering.ahead_of_microbatch(weights, batch)
    s_BTD = model.init_state(key, example_ids_B, batch.tokens_BT.shape[1])
    y_BTD = model.forward(weights, s_BTD, batch.tokens_BT, rows_of(batch, config.data.one_document), n, k, fetch)
    return chunked_loss(model, weights, y_BTD, batch, config.train).total / total_weight

  def gradients(params, batch, example_ids_B, *scalars):
    """(loss, gradients in shards); runs on each device, over its own rows."""
    weights = gathering.ahead_of_step(model.cast(params))

    def microbatch(*rows):
      loss, grads = jax.value_and_grad(loss_fn)(weights, *rows, *scalars)
      return loss, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    loss, grads = accumulate(microbatch, (batch, example_ids_B), config.train.num_microbatches)
    return jax.lax.psum(loss, ROW_AXES), gathering.reduce(grads)

  gradients = on_rows(
    gradients, mesh, (param_specs, sharding.BATCH, sharding.BATCH, P(), P(), P(), P()), (P(), param_specs)
  )

  @functools.partial(jax.jit, donate_argnames='state', out_shardings=(specs, None))
  def train_step(state: TrainState, batch: Batch, key: jax.Array):
    state_key = jax.random.fold_in(jax.random.fold_in(key, state.step), STATE)
    n, k = depth.draw(config.depth, key, state.step)
    total_weight = jnp.maximum(jnp.sum(batch.weights_BT), 1)
    example_ids_B = jnp.arange(batch.tokens_BT.shape[0])
    loss, grads = gradients(state.params, batch, example_ids_B, state_key, n, k, total_weight)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if config.optim.ema_decay:
      ema = optax.incremental_update(params, ema, 1 - config.optim.ema_decay)
    finite, old = jnp.isfinite(loss) & jnp.isfinite(grad_norm), (state.params, state.opt_state, state.ema)
    new, skips = guards.choose(finite, (params, opt_state, ema), old, state.skips, config.guard.max_skips_in_row)
    metrics = {
      'loss': loss,
      'grad_norm': grad_norm,
      'param_norm': optax.tree.norm(new[0]),
      'learning_rate': schedule(state.step - state.skips.total),
      'n': n,
      'k': k,
      'next_n': depth.draw(config.depth, key, state.step + 1)[0],  # how long the host may wait for the step to come
      'skipped': skips.total,
      'skipped_in_row': skips.in_row,
    }
    return TrainState(state.step + 1, *new, skips), metrics

  return with_mesh(train_step, mesh)


def accumulate(microbatch: Callable, rows: tuple, count: int) -> tuple[jax.Array, Params]:
  """Sum of microbatch(*part of rows) over `count` interleaved parts; part j holds rows j, j + count, ..."""
  if count == 1:
    return microbatch(*rows)
  parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), rows)
  zeros = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(microbatch, *jax.tree.map(lambda x: x[0], parts))
  )
  add = lambda total, part: (jax.tree.map(jnp.add, total, microbatch(*part)), None)
  return jax.lax.scan(add, zeros, parts)[0]
