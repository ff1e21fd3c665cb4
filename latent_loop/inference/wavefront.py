"""The parallel (diffusion-forcing) sampler: a wavefront of positions thinks together (2510.14961).

Row by row, the first position of the front holds a chosen token; each later one holds the token that the one before
would say now. A step gives all of them `inner` iterations and adds one position, up to the width of the front. Whoever
has settled leaves at the front's head, in order, and its word stands: a settled position counts only when everything
before it has left and it was computed from the very token that was said.

Positions differ in their iterations, so all iterations share one slot of the cache.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from latent_loop.errors import BadInput
from latent_loop.inference.cache import Cache
from latent_loop.inference.decode import Asks, Decoding, note, start_states, states_of
from latent_loop.inference.exits import moved
from latent_loop.inference.sampling import draw, keys_of
from latent_loop.inference.think import Feed, embed, iterate, speak_all
from latent_loop.model import Model, Params

_NOISE = 5  # random numbers for noise; sampling.py and speculate.py have 0 to 4
_MOST = 4096


@dataclasses.dataclass(frozen=True)
class Wavefront:
  """How a front moves; raises BadInput. width: positions at most. inner: iterations per step.

  threshold: a position has settled when a step moved its state by less, relative to its length, or when it has made
  the row's depth as the head of the front. At 0 nothing settles early and a head starts anew, which, without noise,
  is plain decoding. momentum: how much of a position's old input stays in its new one. noise: how much of its state
  becomes noise at a step, less with every iteration that it has made.
  """

  width: int = 8
  inner: int = 4
  threshold: float = 0.03
  momentum: float = 0.1
  noise: float = 0.0

  def __post_init__(self):
    for name, low, high in (
      ('width', 1, _MOST),
      ('inner', 1, _MOST),
      ('threshold', 0, math.inf),
      ('momentum', 0, 1),
      ('noise', 0, 1),
    ):
      value = vars(self)[name]
      if not low <= value <= high:
        raise BadInput(f'wavefront {name}={value} is out of range; give a number from {low} to {high}')

  @property
  def numbers(self) -> tuple[np.number, ...]:
    """What a compiled front reads; its width alone is shape."""
    return np.int32(self.inner), *(np.float32(x) for x in (self.threshold, self.momentum, self.noise))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Front:
  """Rows in flight; column i of *_BW thinks about position decoding.position_B + i. Letter: W width.

  t_BW: iterations made. size_B: columns in use. head_B: iterations that the first column made as the head.
  """

  decoding: Decoding
  tokens_BW: jax.Array
  s_BWD: jax.Array
  e_BWD: jax.Array
  t_BW: jax.Array
  size_B: jax.Array
  head_B: jax.Array
  steps_B: jax.Array

  @property
  def counts(self) -> dict[str, jax.Array]:
    return {'steps': self.steps_B}


@functools.partial(jax.jit, static_argnames=('model', 'width'), donate_argnames='decoding')
def line_up(model: Model, decoding: Decoding, asks: Asks, *, width: int) -> Front:
  """Rows whose next token is chosen, as fronts of that token alone."""
  B = len(decoding.token_B)
  index_1W = jnp.arange(width)[None]
  s_BWD = start_states(model, asks, decoding.position_B[:, None] + index_1W)
  tokens_BW = jnp.broadcast_to(decoding.token_B[:, None], (B, width))
  zero_B = jnp.zeros((B,), jnp.int32)
  return Front(decoding, tokens_BW, s_BWD, jnp.zeros_like(s_BWD), jnp.zeros_like(tokens_BW), zero_B + 1, zero_B, zero_B)


@functools.partial(jax.jit, static_argnames='model', donate_argnames='front')
def roll(model: Model, params: Params, front: Front, asks: Asks, numbers, steps: jax.Array) -> Front:
  """Up to `steps` steps of all fronts, by Wavefront.numbers; exits and warm starts of `asks` are not looked at."""
  body = lambda loop: (loop[0] + 1, _step(model, params, loop[1], asks, numbers))
  runs = lambda loop: (loop[0] < steps) & jnp.any(loop[1].decoding.running_B)
  return jax.lax.while_loop(runs, body, (0, front))[1]


def _step(model: Model, params: Params, front: Front, asks: Asks, numbers) -> Front:
  inner, threshold, momentum, noise = numbers
  this, depth_B = front.decoding, asks.exits.max_depth_B
  index_1W = jnp.arange(front.tokens_BW.shape[1])[None]
  positions_BW = this.position_B[:, None] + index_1W
  real_BW = this.running_B[:, None] & (index_1W < front.size_B[:, None])
  feed = Feed(front.tokens_BW, positions_BW, real_BW, front.s_BWD)
  e_BWD, prelude = embed(model, params, this.cache.prelude, feed, fresh=False)
  e_BWD = jnp.where((front.t_BW > 0)[..., None], _blend(e_BWD, front.e_BWD, momentum), e_BWD)
  share_BW = noise / (1 + front.t_BW)
  keys_B = keys_of(_NOISE, asks.sampling, front.steps_B)  # other ones at each step
  mixed = lambda s_BWD: _blend(s_BWD, states_of(model, asks, keys_B, positions_BW), share_BW[..., None])
  s_BWD = jax.lax.cond(noise > 0, mixed, lambda s_BWD: s_BWD, front.s_BWD)
  # The head makes the row's depth and no more.
  count_BW = jnp.where(index_1W == 0, jnp.minimum(inner, depth_B - front.head_B)[:, None], inner)
  layers, s_BWD = _think(model, params, this.cache.core, dataclasses.replace(feed, s_BTD=s_BWD), e_BWD, count_BW, inner)

  logits_BWV, coda = speak_all(model, params, this.cache.coda, dataclasses.replace(feed, s_BTD=s_BWD))
  seen_BWV = seen_so_far(this.seen_BV, front.tokens_BW)
  said_BW = jax.vmap(draw, in_axes=(1, 1, None, 1), out_axes=1)(logits_BWV, seen_BWV, asks.sampling, positions_BW + 1)
  head_B = front.head_B + count_BW[:, 0]
  settled_BW = (moved(front.s_BWD, s_BWD) < threshold) | (index_1W == 0) & (head_B >= depth_B)[:, None]
  # What was computed from another token than the one before says now is not settled, however still it stands.
  asked_BW = jnp.pad(front.tokens_BW[:, 1:] == said_BW[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  leaves_B = jnp.sum(jnp.cumprod(real_BW & settled_BW & asked_BW, axis=1), axis=1)

  this = dataclasses.replace(this, cache=Cache(prelude, layers, coda))
  t_BW = front.t_BW + jnp.where(real_BW, count_BW, 0)
  front = dataclasses.replace(front, s_BWD=s_BWD, e_BWD=e_BWD, t_BW=t_BW, head_B=head_B)
  front = dataclasses.replace(front, steps_B=front.steps_B + this.running_B)
  front = dataclasses.replace(front, decoding=note(this, asks, said_BW, logits_BWV, t_BW, leaves_B))
  return _advance(model, front, asks, said_BW, leaves_B, starts_anew=threshold == 0)


def _think(model, params, layers, feed: Feed, e_BWD: jax.Array, count_BW: jax.Array, inner: jax.Array):
  """(the core's buffers, states) after count_BW <= inner iterations of the real tokens."""

  def body(i, loop):
    layers, s_BWD = loop
    goes_BW = feed.real_BT & (i < count_BW)
    now = dataclasses.replace(feed, s_BTD=s_BWD, real_BT=goes_BW)
    new_BWD, layers = iterate(model, params, layers, now, e_BWD, 0, feed.running_B, fresh=False)
    return layers, jnp.where(goes_BW[..., None], new_BWD, s_BWD)

  return jax.lax.fori_loop(0, inner, body, (layers, feed.s_BTD))


def _advance(model: Model, front: Front, asks: Asks, said_BW: jax.Array, leaves_B: jax.Array, starts_anew) -> Front:
  """The front without the columns that left, every word passed on to its right, and one more position."""
  W = said_BW.shape[1]
  index_1W = jnp.arange(W)[None]
  from_BW = index_1W + leaves_B[:, None]
  shifted = lambda x, at_BW: jnp.take_along_axis(
    x, at_BW.reshape(*at_BW.shape, *[1] * (x.ndim - 2)).clip(0, W - 1), axis=1
  )
  new_head_B = leaves_B > 0
  fresh_BW = (from_BW >= front.size_B[:, None]) | starts_anew & new_head_B[:, None] & (index_1W == 0)
  first_BWD = start_states(model, asks, front.decoding.position_B[:, None] + index_1W)
  return Front(
    front.decoding,
    jnp.where(index_1W == 0, front.decoding.token_B[:, None], shifted(said_BW, from_BW - 1)),
    jnp.where(fresh_BW[..., None], first_BWD, shifted(front.s_BWD, from_BW)),
    shifted(front.e_BWD, from_BW),
    jnp.where(fresh_BW, 0, shifted(front.t_BW, from_BW)),
    jnp.minimum(front.size_B - leaves_B + 1, W),
    jnp.where(new_head_B, 0, front.head_B),
    front.steps_B,
  )


def _blend(new: jax.Array, old: jax.Array, share: jax.Array) -> jax.Array:
  return new + jnp.asarray(share, new.dtype) * (old - new)


def seen_so_far(seen_BV: jax.Array, tokens_BW: jax.Array) -> jax.Array:
  """Tokens seen up to each column, its own included."""
  (B, V), W = seen_BV.shape, tokens_BW.shape[1]
  index_1W = jnp.arange(W)[None]
  first_BV = jnp.full((B, V), W).at[jnp.arange(B)[:, None], tokens_BW].min(jnp.broadcast_to(index_1W, tokens_BW.shape))
  return seen_BV[:, None] | (first_BV[:, None] <= index_1W[..., None])
