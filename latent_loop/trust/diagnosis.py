"""Where in a step the first value that is not finite appears: the forward pass once more, each iteration watched."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from latent_loop.batch import Batch
from latent_loop.config import Config
from latent_loop.model import Model, Params
from latent_loop.model.depth_loop import iterate
from latent_loop.parallel.sharding import BATCH, ROW_AXES, specs_of
from latent_loop.parallel.weights import gather, on_rows
from latent_loop.step import STATE, chunked_loss, rows_of


def first_place(config: Config, model: Model, mesh: Mesh, params: Params, batch: Batch, step: int, depth: int) -> str:
  """In words, the first place that was not finite in `step` at total depth `depth`, from the parameters it began with.

  batch: placed on the mesh. Of many rows, microbatches and devices, the earliest place counts.
  """
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), STATE)
  find = jax.jit(
    on_rows(_finder(config, model, specs_of(params)), mesh, (specs_of(params), BATCH, BATCH, P(), P()), P())
  )
  with jax.set_mesh(mesh):
    place = int(find(params, batch, jnp.arange(batch.tokens_BT.shape[0]), key, depth))
  words = {
    0: 'the embedded input, ahead of the loop',
    depth + 1: 'the coda',
    depth + 2: 'the loss',
    depth + 3: 'the gradient: the forward pass is finite',
  }
  return words.get(place, f'iteration {place} of {depth}')


def _finder(config: Config, model: Model, specs: Any) -> Callable:
  """(params, batch, example ids, key, depth) -> place: 0 the prelude, then the iterations, coda, loss, gradient."""

  def find(params, batch, example_ids_B, key, depth):
    params = gather(model.cast(params), specs)

    def place(part):
      batch, example_ids_B = part
      rows = rows_of(batch, config.data.one_document)
      e_BTD = model.embed_input(params, batch.tokens_BT, rows)

      def core(carry):
        s_BTD, i, first = carry
        s_BTD = model.apply_core(params, s_BTD, e_BTD, rows)
        return s_BTD, i + 1, jnp.where((first == 0) & _bad(s_BTD), i + 1, first)

      s_BTD = model.init_state(key, example_ids_B, batch.tokens_BT.shape[1])
      s_BTD, _, first = iterate(core, (s_BTD, 0, 0), depth)
      y_BTD = model.apply_coda(params, s_BTD, rows)
      loss = chunked_loss(model, params, y_BTD, batch, config.train).total
      found = jnp.stack([_bad(e_BTD), first > 0, _bad(y_BTD), _bad(loss), True])
      return jnp.stack([0, first, depth + 1, depth + 2, depth + 3])[jnp.argmax(found)]

    count = config.train.num_microbatches
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), (batch, example_ids_B))
    return jax.lax.pmin(jnp.min(jax.lax.map(place, parts)), ROW_AXES)

  return find


def _bad(x: jax.Array) -> jax.Array:
  return ~jnp.all(jnp.isfinite(x))
