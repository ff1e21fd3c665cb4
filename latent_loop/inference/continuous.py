"""Continuous depth batching: rows at different depths of different tokens share one application of the core.

Every iteration runs the same weights, so nobody has to wait for the slowest row: a row that has thought enough goes
through coda, sampling and prelude and starts its next token while the others go on. That passage is made for a few
rows at a time (the `window` of `fly`), gathered out of the batch, so time follows the mean depth, not the largest.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from latent_loop.inference.cache import Cache, Layer, Slots, fill_deeper
from latent_loop.inference.decode import Asks, Decoding, emit, start_states
from latent_loop.inference.exits import Memory
from latent_loop.inference.think import Feed, Reading, decide, embed, iterate, speak
from latent_loop.model import Model, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flight:
  """Rows between two iterations. t_B: iterations of the token each thinks about; left_B: has had enough, waits."""

  decoding: Decoding  # s_BTD: the states now
  e_BTD: jax.Array
  t_B: jax.Array
  memory: Memory
  left_B: jax.Array

  @property
  def thinking_B(self) -> jax.Array:
    return self.decoding.running_B & ~self.left_B


def _feed(this: Decoding, s_BTD: jax.Array, real_B: jax.Array) -> Feed:
  return Feed(this.token_B[:, None], this.position_B[:, None], real_B[:, None], s_BTD)


def _part(tree, rows_G: jax.Array):
  return jax.tree.map(lambda x: x[rows_G], tree)


@functools.partial(jax.jit, static_argnames=('model',), donate_argnames='decoding')
def take_off(model: Model, params: Params, decoding: Decoding, asks: Asks) -> Flight:
  """Rows whose next token is chosen, at its depth 0."""
  B = len(decoding.token_B)
  fields = {
    'e_BTD': jnp.zeros_like(decoding.s_BTD),
    't_B': jnp.zeros((B,), jnp.int32),
    'memory': Memory.empty(decoding.s_BTD[:, 0], model.cfg.vocab_size),
    'left_B': jnp.zeros((B,), bool),
  }
  return start_tokens(model, params, Flight(decoding, **fields), asks, jnp.arange(B))


@functools.partial(jax.jit, static_argnames=('model', 'slots', 'window'), donate_argnames='flight')
def fly(
  model: Model, params: Params, flight: Flight, asks: Asks, iterations: jax.Array, *, slots: Slots, window: int
) -> Flight:
  """Up to `iterations` applications of the core to all rows; ends early once no row runs.

  After each of them rows pass, `window` at a time, as long as so many wait, or some do and none thinks. Fewer
  have to wait in the measure that fewer rows run, or a shallow row would wait for each token of a deep one.
  """

  def due(flight):
    waiting, running_B = jnp.sum(flight.left_B), flight.decoding.running_B
    enough = jnp.maximum(1, window * jnp.sum(running_B) // len(running_B))
    return (waiting >= enough) | (waiting > 0) & ~jnp.any(flight.thinking_B)

  def turn(loop):
    i, flight = loop
    flight = _think(model, params, flight, asks, slots)
    speak = lambda flight: _next_tokens(model, params, flight, asks, window)
    return i + 1, jax.lax.while_loop(due, speak, flight)

  runs = lambda loop: (loop[0] < iterations) & jnp.any(loop[1].decoding.running_B)
  return jax.lax.while_loop(runs, turn, (0, flight))[1]


def _think(model: Model, params: Params, flight: Flight, asks: Asks, slots: Slots) -> Flight:
  """One application of the core, and who leaves after it."""
  this, thinking_B = flight.decoding, flight.thinking_B
  feed = _feed(this, this.s_BTD, this.running_B)
  slot = 0 if slots.count == 1 else slots.of(flight.t_B)
  s_BTD, layers = iterate(model, params, this.cache.core, feed, flight.e_BTD, slot, thinking_B, fresh=False)
  s_BTD = jnp.where(thinking_B[:, None, None], s_BTD, this.s_BTD)
  t_B = flight.t_B + thinking_B
  say = lambda coda, feed: speak(model, params, coda, feed)
  reading = Reading(this.cache.coda, jnp.zeros((len(t_B), model.cfg.vocab_size)), flight.memory)
  now = _feed(this, s_BTD, thinking_B)
  reading, leaves_B = decide(say, asks.exits, reading, this.s_BTD, now, t_B, thinking_B, last=False)
  leaves_B = leaves_B & thinking_B
  layers = fill_deeper(layers, slots, t_B, feed.positions_BT, leaves_B[:, None])
  cache = Cache(this.cache.prelude, layers, reading.coda)
  # A row that waits keeps what it compares with; it is not asked again.
  return Flight(
    dataclasses.replace(this, cache=cache, s_BTD=s_BTD), flight.e_BTD, t_B, reading.memory, flight.left_B | leaves_B
  )


def _next_tokens(model: Model, params: Params, flight: Flight, asks: Asks, window: int) -> Flight:
  """The first `window` waiting rows through coda, sampling and prelude."""
  rows_G = jnp.argsort(~flight.left_B)[:window]
  cache, few, asks = flight.decoding.cache, _part(_without_cache(flight), rows_G), _part(asks, rows_G)
  ready_G = few.left_B
  feed = dataclasses.replace(_feed(few.decoding, few.decoding.s_BTD, ready_G), rows_B=rows_G)
  logits_GV, coda = speak(model, params, cache.coda, feed)
  few = dataclasses.replace(few, decoding=emit(few.decoding, asks, logits_GV, few.t_B, ready_G))
  few, prelude = _at_depth_0(model, params, cache.prelude, few, asks, rows_G, ready_G)
  return _put_back(flight, few, rows_G, ready_G, dataclasses.replace(cache, prelude=prelude, coda=coda))


def start_tokens(model: Model, params: Params, flight: Flight, asks: Asks, rows_G: jax.Array) -> Flight:
  """These rows at depth 0 of their chosen token."""
  cache, few = flight.decoding.cache, _part(_without_cache(flight), rows_G)
  every_G = jnp.ones_like(few.left_B)
  few, prelude = _at_depth_0(model, params, cache.prelude, few, _part(asks, rows_G), rows_G, every_G)
  return _put_back(flight, few, rows_G, every_G, dataclasses.replace(cache, prelude=prelude))


def _at_depth_0(
  model: Model, params: Params, prelude: list[Layer], few: Flight, asks: Asks, rows_G: jax.Array, who_G: jax.Array
) -> tuple[Flight, list[Layer]]:
  """(few rows, `rows_G` of the buffers, at depth 0 of their chosen token, the prelude's buffers).

  Only rows `who_G` that still run write there.
  """
  this = few.decoding
  positions_G1 = this.position_B[:, None]
  s_G1D = jnp.where(
    asks.warm_B[:, None, None], model.leave_core(params, this.s_BTD), start_states(model, asks, positions_G1)
  )
  feed = dataclasses.replace(_feed(this, s_G1D, who_G & this.running_B), rows_B=rows_G)
  e_G1D, prelude = embed(model, params, prelude, feed, fresh=False)
  empty = Memory.empty(s_G1D[:, 0], model.cfg.vocab_size)
  this, none_G = dataclasses.replace(this, s_BTD=s_G1D), jnp.zeros_like(few.left_B)
  return Flight(this, e_G1D, jnp.zeros_like(few.t_B), empty, none_G), prelude


def _without_cache(flight: Flight) -> Flight:
  return dataclasses.replace(flight, decoding=dataclasses.replace(flight.decoding, cache=None))


def _put_back(flight: Flight, few: Flight, rows_G: jax.Array, who_G: jax.Array, cache: Cache) -> Flight:
  """The flight with those of the few rows that are `who_G` in their places, over these buffers."""
  rows_G = jnp.where(who_G, rows_G, len(flight.left_B))  # one behind the last is dropped
  flight = jax.tree.map(lambda old, new: old.at[rows_G].set(new, mode='drop'), _without_cache(flight), few)
  return dataclasses.replace(flight, decoding=dataclasses.replace(flight.decoding, cache=cache))
