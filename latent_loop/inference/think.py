"""Tokens through prelude, core and coda over a cache: many at a given depth, or one per row until it has had enough."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from latent_loop.inference import exits as rules
from latent_loop.inference.cache import Cache, CachedRows, Layer, Slots, fill_deeper
from latent_loop.inference.exits import Exits, Memory
from latent_loop.model import Model, Params
from latent_loop.model.depth_loop import iterate_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Feed:
  """T tokens for each row, at positions_BT; those that are not `real_BT` leave nothing in the cache.

  s_BTD: their first states. A row without a real token does not think. rows_B: as in CachedRows.
  """

  tokens_BT: jax.Array
  positions_BT: jax.Array
  real_BT: jax.Array
  s_BTD: jax.Array
  rows_B: jax.Array | None = None

  @property
  def running_B(self) -> jax.Array:
    return jnp.any(self.real_BT, axis=1)


def _through(stage: Callable, layers: list[Layer], slot, feed: Feed, fresh: bool):
  """(what `stage` makes of these rows, the buffers it leaves)."""
  rows = CachedRows(layers, slot, feed.positions_BT, feed.real_BT, fresh, feed.rows_B)
  return stage(rows), rows.written


def embed(model: Model, params: Params, prelude: list[Layer], feed: Feed, fresh: bool) -> tuple[jax.Array, list[Layer]]:
  """(e_BTD, the prelude's buffers)."""
  return _through(lambda rows: model.embed_input(params, feed.tokens_BT, rows), prelude, 0, feed, fresh)


def iterate(
  model: Model, params: Params, layers: list[Layer], feed: Feed, e_BTD: jax.Array, slot, running_B, fresh: bool
) -> tuple[jax.Array, list[Layer]]:
  """(the next states, the core's buffers); rows that do not run write nothing. slot: scalar, or one per row."""
  feed = dataclasses.replace(feed, real_BT=feed.real_BT & running_B[:, None])
  return _through(lambda rows: model.apply_core(params, feed.s_BTD, e_BTD, rows), layers, slot, feed, fresh)


def deepen(
  model: Model, params: Params, layers: list[Layer], feed: Feed, e_BTD, span, slots: Slots, fresh: bool
) -> tuple[list[Layer], jax.Array, jax.Array]:
  """(the core's buffers, s_BTD, iterations made) after iterations first, first + 1, ..., last_B - 1 of each row.

  span: (first, last_B). A row without real tokens makes none.
  """
  first, last_B = span

  def core(layers, s_BTD, t, running_B):
    now = dataclasses.replace(feed, s_BTD=s_BTD)
    s_BTD, layers = iterate(model, params, layers, now, e_BTD, slots.of(first + t), running_B, fresh)
    return layers, s_BTD

  leave = lambda layers, before_BTD, s_BTD, t, running_B: (layers, first + t >= last_B)
  return iterate_rows(core, leave, layers, feed.s_BTD, feed.running_B & (first < last_B))


def speak_all(model: Model, params: Params, coda: list[Layer], feed: Feed) -> tuple[jax.Array, list[Layer]]:
  """(logits_BTV, the coda's buffers)."""
  y_BTD, coda = _through(lambda rows: model.apply_coda(params, feed.s_BTD, rows), coda, 0, feed, fresh=False)
  return model.scores(params, y_BTD), coda


def speak(model: Model, params: Params, coda: list[Layer], feed: Feed) -> tuple[jax.Array, list[Layer]]:
  """(logits_BV of one state per row, the coda's buffers)."""
  logits_BTV, coda = speak_all(model, params, coda, feed)
  return logits_BTV[:, 0], coda


def absorb(
  model: Model, params: Params, cache: Cache, feed: Feed, depth_B: jax.Array, slots: Slots, fresh: bool
) -> tuple[Cache, jax.Array, jax.Array]:
  """(cache, s_BTD, y_BTD) after depth_B iterations of every token of a row; y is ready for `model.scores`."""
  e_BTD, prelude = embed(model, params, cache.prelude, feed, fresh)
  layers, s_BTD, depth_B = deepen(model, params, cache.core, feed, e_BTD, (0, depth_B), slots, fresh)
  layers = fill_deeper(layers, slots, depth_B, feed.positions_BT, feed.real_BT)
  y_BTD, coda = _through(lambda rows: model.apply_coda(params, s_BTD, rows), cache.coda, 0, feed, fresh)
  return Cache(prelude, layers, coda), s_BTD, y_BTD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
  """The coda's buffers, what it last said, and what the next check compares with."""

  coda: list[Layer]
  logits_BV: jax.Array
  memory: Memory


def decide(
  say: Callable, exits: Exits, reading: Reading, before_BTD: jax.Array, feed: Feed, t, running_B: jax.Array, last: bool
) -> tuple[Reading, jax.Array]:
  """(reading, which rows leave) after t iterations, scalar or one number per row, that led to feed.s_BTD.

  say(coda, feed) -> (logits_BV, coda) reads all rows when one that runs has to check a prediction, and, with `last`,
  when none would run on.
  """
  memory, latent_values = rules.look(reading.memory, before_BTD[:, 0], feed.s_BTD[:, 0])
  due_B, deepest_B = exits.due(t), t >= exits.max_depth_B
  reads_B = due_B & running_B & exits.reads_B

  def read(reading: Reading) -> tuple[Reading, jax.Array]:
    logits_BV, coda = say(reading.coda, feed)
    memory, values = rules.read(reading.memory, logits_BV, reads_B)
    return Reading(coda, logits_BV, memory), values

  unread = jnp.full((len(reads_B), len(rules.READING)), jnp.inf)
  leaves_B = due_B & rules.leaves(exits, unread, latent_values) | deepest_B
  reads = jnp.any(reads_B) | (last & ~jnp.any(running_B & ~leaves_B))
  reading = dataclasses.replace(reading, memory=memory)
  reading, values = jax.lax.cond(reads, read, lambda reading: (reading, unread), reading)
  return reading, due_B & rules.leaves(exits, values, latent_values) | deepest_B


def ponder(
  model: Model, params: Params, cache: Cache, feed: Feed, exits: Exits, slots: Slots
) -> tuple[Cache, jax.Array, jax.Array, jax.Array]:
  """(cache, s_BTD, depth_B, logits_BV) of one token per row, each at the depth where its exit rule let it go.

  A row's numbers do not depend on the others: it is compared at its own checks only, and once it has left, neither
  its state nor its cache moves.
  """
  e_BTD, prelude = embed(model, params, cache.prelude, feed, fresh=False)

  def core(carry, s_BTD, t, running_B):
    now = dataclasses.replace(feed, s_BTD=s_BTD)
    s_BTD, layers = iterate(model, params, carry[0], now, e_BTD, slots.of(t), running_B, fresh=False)
    return (layers, carry[1]), s_BTD

  say = lambda coda, feed: speak(model, params, coda, feed)

  def leave(carry, before_BTD, s_BTD, t, running_B):
    now = dataclasses.replace(feed, s_BTD=s_BTD)
    reading, leaves_B = decide(say, exits, carry[1], before_BTD, now, t, running_B, last=True)
    return (carry[0], reading), leaves_B

  V = model.cfg.vocab_size
  reading = Reading(cache.coda, jnp.zeros((len(feed.tokens_BT), V)), Memory.empty(feed.s_BTD[:, 0], V))
  carry, s_BTD, depth_B = iterate_rows(core, leave, (cache.core, reading), feed.s_BTD, feed.running_B)
  layers = fill_deeper(carry[0], slots, depth_B, feed.positions_BT, feed.real_BT)
  return Cache(prelude, layers, carry[1].coda), s_BTD, depth_B, carry[1].logits_BV
