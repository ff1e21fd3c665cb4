"""Tokens through prelude, core and coda over a cache: many at a given depth, or one per row until it has had enough."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from latent_loop.inference import exits as rules
from latent_loop.inference.cache import Cache, CachedRows, Layer, Slots, fill_deeper
from latent_loop.inference.exits import Exits
from latent_loop.model import Model, Params
from latent_loop.model.depth_loop import iterate_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Feed:
  """T tokens for each row, at positions_BT; those that are not `real_BT` leave nothing in the cache.

  s_BTD: their first states. A row without a real token does not think.
  """

  tokens_BT: jax.Array
  positions_BT: jax.Array
  real_BT: jax.Array
  s_BTD: jax.Array

  @property
  def running_B(self) -> jax.Array:
    return jnp.any(self.real_BT, axis=1)


def _through(stage: Callable, layers: list[Layer], slot, feed: Feed, writes_BT: jax.Array, fresh: bool):
  """(what `stage` makes of these rows, the buffers it leaves)."""
  rows = CachedRows(layers, slot, feed.positions_BT, writes_BT, fresh)
  return stage(rows), rows.written


def _embed(model: Model, params: Params, cache: Cache, feed: Feed, fresh: bool) -> tuple[Callable, list[Layer]]:
  """(iteration t of the core on these tokens, the prelude's buffers)."""
  stage = lambda rows: model.embed_input(params, feed.tokens_BT, rows)
  e_BTD, prelude = _through(stage, cache.prelude, 0, feed, feed.real_BT, fresh)

  def core(layers, s_BTD, slot, running_B):
    stage = lambda rows: model.apply_core(params, s_BTD, e_BTD, rows)
    s_BTD, layers = _through(stage, layers, slot, feed, feed.real_BT & running_B[:, None], fresh)
    return layers, s_BTD

  return core, prelude


def absorb(
  model: Model, params: Params, cache: Cache, feed: Feed, depth_B: jax.Array, slots: Slots, fresh: bool
) -> tuple[Cache, jax.Array, jax.Array]:
  """(cache, s_BTD, y_BTD) after depth_B iterations of every token of a row; y is ready for `model.scores`."""
  iteration, prelude = _embed(model, params, cache, feed, fresh)
  core = lambda layers, s_BTD, t, running_B: iteration(layers, s_BTD, slots.of(t), running_B)
  leave = lambda layers, before_BTD, s_BTD, t, running_B: (layers, t >= depth_B)
  layers, s_BTD, depth_B = iterate_rows(core, leave, cache.core, feed.s_BTD, feed.running_B)
  layers = fill_deeper(layers, slots, depth_B, feed.positions_BT, feed.real_BT)
  stage = lambda rows: model.apply_coda(params, s_BTD, rows)
  y_BTD, coda = _through(stage, cache.coda, 0, feed, feed.real_BT, fresh)
  return Cache(prelude, layers, coda), s_BTD, y_BTD


def ponder(
  model: Model, params: Params, cache: Cache, feed: Feed, exits: Exits, slots: Slots
) -> tuple[Cache, jax.Array, jax.Array, jax.Array]:
  """(cache, s_BTD, depth_B, logits_BV) of one token per row, each at the depth where its exit rule let it go.

  A row's numbers do not depend on the others: it is compared at its own checks only, and once it has left, neither
  its state nor its cache moves. The coda reads all rows when one has to check, and when the last one leaves.
  """
  B, V = len(feed.tokens_BT), model.cfg.vocab_size
  iteration, prelude = _embed(model, params, cache, feed, fresh=False)

  def core(carry, s_BTD, t, running_B):
    layers, s_BTD = iteration(carry[0], s_BTD, slots.of(t), running_B)
    return (layers, *carry[1:]), s_BTD

  def leave(carry, before_BTD, s_BTD, t, running_B):
    layers, memory, coda, logits_BV = carry
    memory, latent_values = rules.look(memory, before_BTD[:, 0], s_BTD[:, 0])
    due_B, deepest_B = exits.due(t), t >= exits.max_depth_B
    reads_B = due_B & running_B & exits.reads_B

    def read(memory, coda, _):
      stage = lambda rows: model.apply_coda(params, s_BTD, rows)
      y_BTD, coda = _through(stage, coda, 0, feed, feed.real_BT, fresh=False)
      logits_BV = model.scores(params, y_BTD)[:, 0]
      memory, values = rules.read(memory, logits_BV, reads_B)
      return memory, coda, logits_BV, values

    unread = jnp.full((B, len(rules.READING)), jnp.inf)
    skip = lambda memory, coda, logits_BV: (memory, coda, logits_BV, unread)
    leaves_B = due_B & rules.leaves(exits, unread, latent_values) | deepest_B
    reads = jnp.any(reads_B) | ~jnp.any(running_B & ~leaves_B)
    memory, coda, logits_BV, values = jax.lax.cond(reads, read, skip, memory, coda, logits_BV)
    leaves_B = due_B & rules.leaves(exits, values, latent_values) | deepest_B
    return (layers, memory, coda, logits_BV), leaves_B

  carry = cache.core, rules.Memory.empty(feed.s_BTD[:, 0], V), cache.coda, jnp.zeros((B, V))
  (layers, _, coda, logits_BV), s_BTD, depth_B = iterate_rows(core, leave, carry, feed.s_BTD, feed.running_B)
  layers = fill_deeper(layers, slots, depth_B, feed.positions_BT, feed.real_BT)
  return Cache(prelude, layers, coda), s_BTD, depth_B, logits_BV
