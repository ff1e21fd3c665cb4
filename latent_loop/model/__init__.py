"""The seam between the model and everything else: `build(cfg, depth) -> Model`, pure functions on a dict.

NNX declares the model; from here on parameters are a plain nested dict (`core/0/attn/q/kernel`) and only
JAX transforms touch them, so checkpoints, sharding rules and optimizer masks see names and arrays.

Letters in names: B batch, T tokens, D width, F mlp_dim, N heads, H head_dim, V vocabulary, R depths,
C any contracted axis.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from latent_loop.config import DepthConfig, ModelConfig
from latent_loop.model import initializers
from latent_loop.model.depth_loop import LOOP_SCOPE, iterate, iterate_with_gradient
from latent_loop.model.injection import Drive
from latent_loop.model.layers import Rows
from latent_loop.model.looped_lm import LoopedLM

Params = dict[str, Any]
Fetch = Callable[[Params, jax.Array], Params]


@dataclasses.dataclass(frozen=True)
class Model:
  """Pure functions of (params, arrays). Every function but `init` and `cast` takes cast params."""

  cfg: ModelConfig
  depth: DepthConfig
  graphdef: nnx.GraphDef

  def init(self, key: jax.Array) -> Params:
    """Fresh float32 parameters."""
    return nnx.to_pure_dict(nnx.state(LoopedLM(self.cfg, self.depth.mean, key), nnx.Param))

  def cast(self, params: Params) -> Params:
    """Kernels, biases and embedding in the compute dtype; call once, ahead of the loops over depth."""
    dtype = jnp.dtype(self.cfg.compute_dtype)
    matrix = lambda path: path[-1].key in ('kernel', 'bias', 'embedding')
    return jax.tree_util.tree_map_with_path(lambda path, p: p.astype(dtype) if matrix(path) else p, params)

  def init_state(self, key: jax.Array, example_ids_B: jax.Array, seq_len: int) -> jax.Array:
    """s_0: truncated normal of deviation sqrt(2/(5D)) times the embedding scale, or zero.

    Keyed by the global index of the example, so it does not depend on the mesh or the number of hosts.
    """
    cfg, shape = self.cfg, (seq_len, self.cfg.width)
    if cfg.state_init == 'zero':
      return jnp.zeros((len(example_ids_B), *shape), jnp.dtype(cfg.compute_dtype))
    std = initializers.base_std(cfg) * (cfg.width**0.5 if cfg.scale_embedding else 1.0)
    draw = lambda i: initializers.truncated_normal(std)(jax.random.fold_in(key, i), shape)
    return jax.vmap(draw)(example_ids_B).astype(jnp.dtype(cfg.compute_dtype))

  def embed_input(self, params: Params, tokens_BT: jax.Array, rows: Rows) -> jax.Array:
    return self._bind(params).embed_input(tokens_BT, rows)

  def drive(self, params: Params, e_BTD: jax.Array) -> Drive:
    return self._bind(params).drive(e_BTD)

  def iterate(self, params: Params, s_BTD: jax.Array, drive: Drive, rows: Rows) -> jax.Array:
    """One iteration; for a loop, which makes the drive ahead of it."""
    return self._bind(params).iterate(s_BTD, drive, rows)

  def apply_core(self, params: Params, s_BTD: jax.Array, e_BTD: jax.Array, rows: Rows) -> jax.Array:
    return self.iterate(params, s_BTD, self.drive(params, e_BTD), rows)

  def leave_core(self, params: Params, s_BTD: jax.Array) -> jax.Array:
    return self._bind(params).leave_core(s_BTD)

  def apply_coda(self, params: Params, s_BTD: jax.Array, rows: Rows) -> jax.Array:
    return self._bind(params).apply_coda(s_BTD, rows)

  def scores(self, params: Params, y_BTD: jax.Array) -> jax.Array:
    return self._bind(params).scores(y_BTD)

  def advance(self, params: Params, s_BTD: jax.Array, e_BTD: jax.Array, rows: Rows, count) -> jax.Array:
    """The state `count` iterations on; for evaluation and decoding, without gradient."""
    rows, drive = rows.ready(self.cfg), self.drive(params, e_BTD)
    with jax.named_scope(LOOP_SCOPE):
      return iterate(lambda s: self.iterate(params, s, drive, rows), s_BTD, count)

  def forward(
    self, params: Params, s_BTD: jax.Array, tokens_BT: jax.Array, rows: Rows, n, k, fetch: Fetch | None = None
  ) -> jax.Array:
    """y after n iterations without gradient, then k <= backprop_depth with (2502.05171 section 3.3).

    fetch: makes the core's weights whole inside each iteration, where they are not whole yet.
    """
    rows = rows.ready(self.cfg)
    drive = self.drive(params, self.embed_input(params, tokens_BT, rows))

    def core(params, s_BTD, drive):
      whole = params if fetch is None else fetch(params, s_BTD)
      return self.iterate(whole, s_BTD, drive, rows)

    with jax.named_scope(LOOP_SCOPE):
      # Cut on the way in and on the way out: a loop of unknown length has no reverse mode.
      stopped, s_BTD, stopped_drive = jax.lax.stop_gradient((params, s_BTD, drive))
      s_BTD = jax.lax.stop_gradient(iterate(lambda s: core(stopped, s, stopped_drive), s_BTD, n))
      # What an iteration fetches must not be kept for the backward pass, or all of it would be whole at once.
      remat = self.cfg.remat if fetch is None else 'iteration'
      iteration = lambda s: core(params, s, drive)
      s_BTD = iterate_with_gradient(iteration, s_BTD, k, self.depth.backprop_depth, remat)
    return self.apply_coda(params, s_BTD, rows)

  def _bind(self, params: Params) -> LoopedLM:
    return nnx.merge(self.graphdef, params)


def build(cfg: ModelConfig, depth: DepthConfig) -> Model:
  """The model that `cfg` describes; allocates nothing. Raises BadInput never: cfg is already sealed."""
  declare = lambda: LoopedLM(cfg, depth.mean, jax.random.key(0))
  return Model(cfg, depth, nnx.graphdef(nnx.eval_shape(declare)))
