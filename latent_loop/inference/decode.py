"""Prompts in, tokens out, for a batch of rows that each keep their own depth rule, sampling rule, seed and length."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from latent_loop.inference.cache import Cache, Slots, new_cache
from latent_loop.inference.exits import Exits
from latent_loop.inference.sampling import Sampling, draw
from latent_loop.inference.think import Feed, absorb, ponder
from latent_loop.model import Model, Params
from latent_loop.parallel.sharding import constrain

_STATE, NO_TOKEN = 1, -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asks:
  """What each row wants.

  limit_B: new tokens at most. stops_BK: tokens that end a row, NO_TOKEN where there are fewer. warm_B: a token starts
  from the state of the one before, as the coda reads it (`leave_core`), instead of from noise. noise_B: scale of the
  initial state; 0 starts at zero.
  """

  exits: Exits
  sampling: Sampling
  limit_B: jax.Array
  stops_BK: jax.Array
  warm_B: jax.Array
  noise_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
  """Rows in flight: token_B at position_B is chosen but not yet in the cache; *_BM are of the new tokens so far."""

  cache: Cache
  token_B: jax.Array
  position_B: jax.Array
  s_BTD: jax.Array  # of the last token, T = 1
  seen_BV: jax.Array
  running_B: jax.Array
  count_B: jax.Array
  tokens_BM: jax.Array
  log_p_BM: jax.Array  # of the model, before any sampling rule
  depth_BM: jax.Array


def start_states(model: Model, asks: Asks, positions_BT: jax.Array) -> jax.Array:
  """s_0 of tokens at these positions, from the row's seed and the position alone."""
  key = lambda seed: jax.random.fold_in(jax.random.key(_STATE), seed)
  return states_of(model, asks, jax.vmap(key)(asks.sampling.seed_B), positions_BT)


def states_of(model: Model, asks: Asks, keys_B: jax.Array, positions_BT: jax.Array) -> jax.Array:
  """Initial states by the key of a row and the position."""
  s_BTD = jax.vmap(lambda key, ids_T: model.init_state(key, ids_T, 1)[:, 0])(keys_B, positions_BT)
  return s_BTD * asks.noise_B[:, None, None].astype(s_BTD.dtype)


@functools.partial(jax.jit, static_argnames=('model', 'slots', 'places', 'new'))
def begin(
  model: Model,
  params: Params,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  asks: Asks,
  *,
  slots: Slots,
  places: int,
  new: int,
) -> Decoding:
  """Reads the prompts, `lengths_B` tokens at the left of each row, at the largest depth, and chooses the first token.

  params: cast. places: of the cache, prompt and new tokens. new: columns for new tokens.
  """
  B, T = tokens_BT.shape
  positions_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
  real_BT = positions_BT < lengths_B[:, None]
  feed = Feed(tokens_BT, positions_BT, real_BT, start_states(model, asks, positions_BT))
  cache = new_cache(model.cfg, slots, B, places)
  cache, s_BTD, y_BTD = absorb(model, params, cache, feed, asks.exits.max_depth_B, slots, fresh=True)
  row_B, last_B = jnp.arange(B), lengths_B - 1
  logits_BV = model.scores(params, y_BTD[row_B, last_B][:, None])[:, 0]
  V = logits_BV.shape[-1]
  places_BT = jnp.where(real_BT, tokens_BT, V)
  seen_BV = jnp.zeros((B, V), bool).at[row_B[:, None], places_BT].set(True, mode='drop')
  empty = lambda fill, dtype: jnp.full((B, new), fill, dtype)
  decoding = Decoding(
    cache,
    token_B=tokens_BT[row_B, last_B],
    position_B=last_B,
    s_BTD=s_BTD[row_B, last_B][:, None],
    seen_BV=seen_BV,
    running_B=asks.limit_B > 0,
    count_B=jnp.zeros((B,), jnp.int32),
    tokens_BM=empty(NO_TOKEN, jnp.int32),
    log_p_BM=empty(0, jnp.float32),
    depth_BM=empty(0, jnp.int32),
  )
  return emit(decoding, asks, logits_BV, asks.exits.max_depth_B, decoding.running_B)


@functools.partial(jax.jit, static_argnames=('model', 'slots'), donate_argnames='decoding')
def go_on(model: Model, params: Params, decoding: Decoding, asks: Asks, steps: jax.Array, *, slots: Slots) -> Decoding:
  """Up to `steps` more tokens for every running row."""

  def body(loop):
    i, this = loop
    feed = Feed(this.token_B[:, None], this.position_B[:, None], this.running_B[:, None], this.s_BTD)
    fresh_BTD = start_states(model, asks, feed.positions_BT)
    warm_BTD = jnp.where(asks.warm_B[:, None, None], model.leave_core(params, this.s_BTD), fresh_BTD)
    feed = dataclasses.replace(feed, s_BTD=warm_BTD)
    cache, s_BTD, depth_B, logits_BV = ponder(model, params, this.cache, feed, asks.exits, slots)
    this = dataclasses.replace(this, cache=cache, s_BTD=s_BTD)
    return i + 1, emit(this, asks, logits_BV, depth_B, this.running_B)

  return jax.lax.while_loop(lambda loop: (loop[0] < steps) & jnp.any(loop[1].running_B), body, (0, decoding))[1]


def emit(this: Decoding, asks: Asks, logits_BV: jax.Array, depth_B: jax.Array, who_B: jax.Array) -> Decoding:
  """Chooses the next token of the rows `who_B` and notes it."""
  token_B = draw(logits_BV, this.seen_BV, asks.sampling, this.position_B + 1)
  return note(this, asks, token_B[:, None], logits_BV[:, None], depth_B[:, None], who_B.astype(jnp.int32))


def note(
  this: Decoding, asks: Asks, tokens_BT: jax.Array, logits_BTV: jax.Array, depth_BT: jax.Array, offered_B: jax.Array
) -> Decoding:
  """Notes the first offered_B of the next tokens of each row, but none past its limit or behind a stop token."""
  B, M = this.tokens_BM.shape
  index_1T = jnp.arange(tokens_BT.shape[1])[None]
  stops_BT = jnp.any(tokens_BT[..., None] == asks.stops_BK[:, None], axis=-1)
  behind_BT = jnp.cumsum(stops_BT, axis=1) > stops_BT
  most_B = jnp.minimum(offered_B, asks.limit_B - this.count_B)
  kept_BT = (index_1T < most_B[:, None]) & ~behind_BT
  kept_B = jnp.sum(kept_BT, axis=1)
  count_B = this.count_B + kept_B
  ends_B = jnp.any(stops_BT & kept_BT, axis=1) | (kept_B > 0) & (count_B >= asks.limit_B)

  row_B = jnp.arange(B)
  at_BT = jnp.where(kept_BT, this.count_B[:, None] + index_1T, M)  # one behind the last is dropped
  write = lambda old_BM, new_BT: everywhere(old_BM.at[row_B[:, None], at_BT].set(new_BT, mode='drop'))
  everywhere = lambda x: constrain(x, *[None] * x.ndim)  # so that every process can read it
  log_p_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_BT[..., None], axis=-1)[..., 0]
  seen_at_BT = jnp.where(kept_BT, tokens_BT, this.seen_BV.shape[1])
  return dataclasses.replace(
    this,
    token_B=jnp.where(kept_B > 0, tokens_BT[row_B, kept_B - 1], this.token_B),
    position_B=this.position_B + kept_B,
    seen_BV=this.seen_BV.at[row_B[:, None], seen_at_BT].set(True, mode='drop'),
    running_B=everywhere(this.running_B & ~ends_B),
    count_B=everywhere(count_B),
    tokens_BM=write(this.tokens_BM, tokens_BT),
    log_p_BM=write(this.log_p_BM, log_p_BT),
    depth_BM=write(this.depth_BM, depth_BT),
  )
