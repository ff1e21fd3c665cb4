"""Continuous depth batching: rows at different depths of different tokens share one application of the core.

Every iteration runs the same weights, so nobody has to wait for the slowest row: a row that has thought enough goes
through coda, sampling and prelude and starts its next token while the others go on. That passage is made for a few
rows at a time (`Flight.window` of them), gathered out of the batch, so time follows the mean depth, not the largest.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from latent_loop.inference.cache import Cache, Slots, fill_deeper
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
  return start_tokens(model, params, Flight(decoding, **fields), asks, jnp.arange(B), decoding.running_B)


@functools.partial(jax.jit, static_argnames=('model', 'slots', 'window'), donate_argnames='flight')
def fly(
  model: Model, params: Params, flight: Flight, asks: Asks, iterations: jax.Array, *, slots: Slots, window: int
) -> Flight:
  """Up to `iterations` applications of the core to all rows; ends early once no row runs."""

  def body(loop):
    i, flight = loop
    flight = _think(model, params, flight, asks, slots)
    waiting = jnp.sum(flight.left_B)
    full = (waiting >= window) | (waiting > 0) & ~jnp.any(flight.thinking_B)
    speak = lambda flight: _next_tokens(model, params, flight, asks, window)
    return i + 1, jax.lax.cond(full, speak, lambda flight: flight, flight)

  runs = lambda loop: (loop[0] < iterations) & jnp.any(loop[1].decoding.running_B)
  return jax.lax.while_loop(runs, body, (0, flight))[1]


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
  this = flight.decoding
  rows_G = jnp.argsort(~flight.left_B)[:window]
  ready_G = flight.left_B[rows_G]
  feed = dataclasses.replace(_part(_feed(this, this.s_BTD, flight.left_B), rows_G), rows_B=rows_G)
  logits_GV, coda = speak(model, params, this.cache.coda, feed)
  logits_BV = jnp.zeros((len(this.token_B), logits_GV.shape[1])).at[rows_G].set(logits_GV)
  who_B = jnp.zeros_like(flight.left_B).at[rows_G].set(ready_G)
  this = dataclasses.replace(this, cache=dataclasses.replace(this.cache, coda=coda))
  this = emit(this, asks, logits_BV, flight.t_B, who_B)
  flight = dataclasses.replace(flight, decoding=this, left_B=flight.left_B & ~who_B)
  return start_tokens(model, params, flight, asks, rows_G, ready_G & this.running_B[rows_G])


def start_tokens(
  model: Model, params: Params, flight: Flight, asks: Asks, rows_G: jax.Array, who_G: jax.Array
) -> Flight:
  """The rows `who_G` of rows_G at depth 0 of their chosen token."""
  this = flight.decoding
  B = len(this.token_B)
  old_G1D, asks_G = this.s_BTD[rows_G], _part(asks, rows_G)
  positions_G1 = this.position_B[rows_G][:, None]
  warm_G1D = jnp.where(
    asks_G.warm_B[:, None, None], model.leave_core(params, old_G1D), start_states(model, asks_G, positions_G1)
  )
  feed = Feed(this.token_B[rows_G][:, None], positions_G1, who_G[:, None], warm_G1D, rows_G)
  e_G1D, prelude = embed(model, params, this.cache.prelude, feed, fresh=False)
  rows_G = jnp.where(who_G, rows_G, B)  # one behind the last is dropped
  put = lambda old, new: old.at[rows_G].set(new, mode='drop')
  empty = Memory.empty(warm_G1D[:, 0], model.cfg.vocab_size)
  this = dataclasses.replace(
    this, cache=dataclasses.replace(this.cache, prelude=prelude), s_BTD=put(this.s_BTD, warm_G1D)
  )
  memory = jax.tree.map(put, flight.memory, empty)
  return Flight(this, put(flight.e_BTD, e_G1D), put(flight.t_B, jnp.zeros_like(rows_G)), memory, flight.left_B)
