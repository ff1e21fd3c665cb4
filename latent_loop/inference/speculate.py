"""Self-speculative decoding: a few tokens drafted with few iterations, all of them verified at full depth at once.

The verifier goes on from the drafted states. That is exact where every iteration has its own slot of the cache: the
first iterations of a token read the first iterations of the tokens before it, so a draft does for its tokens what
plain decoding would do first, and only the iterations beyond it are left. With sampling, the rejection rule of
2211.17192 keeps the distribution.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from latent_loop.config.rules import count_of
from latent_loop.errors import BadInput
from latent_loop.inference.cache import Cache, Slots
from latent_loop.inference.decode import Asks, Decoding, note, start_states
from latent_loop.inference.sampling import Sampling, keys_of, pick, probabilities
from latent_loop.inference.think import Feed, deepen, embed, speak, speak_all
from latent_loop.model import Model, Params

# Each random number is used for one purpose at one position, or a rejected draft would be seen in what follows.
_DRAFT, _ACCEPT, _REPLACE = 2, 3, 4
_MOST = 1024


@dataclasses.dataclass(frozen=True)
class Draft:
  """lookahead tokens at a time, drafted with so many iterations each; raises BadInput."""

  iterations: int
  lookahead: int

  def __post_init__(self):
    for name in ('iterations', 'lookahead'):
      if not 1 <= vars(self)[name] <= _MOST:
        raise BadInput(f'--speculate: {name}={vars(self)[name]} is out of range; give a number from 1 to {_MOST}')

  @classmethod
  def parse(cls, text: str) -> 'Draft':
    """'4:8': drafts of 8 tokens with 4 iterations each; raises BadInput."""
    iterations, lookahead = map(count_of, text.partition(':')[::2])
    if iterations is None or lookahead is None:
      raise BadInput(f'--speculate={text}: not DRAFT:LOOKAHEAD; write iterations and tokens of a draft, such as 4:8')
    return cls(iterations, lookahead)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Speculation:
  """drafts_B, accepted_B: tokens drafted for each row, and how many of them were accepted."""

  decoding: Decoding
  drafts_B: jax.Array
  accepted_B: jax.Array

  @property
  def counts(self) -> dict[str, jax.Array]:
    return {'drafts': self.drafts_B, 'accepted': self.accepted_B}

  @staticmethod
  def of(decoding: Decoding) -> 'Speculation':
    # Two arrays: a buffer can be donated once.
    return Speculation(decoding, jnp.zeros_like(decoding.count_B), jnp.zeros_like(decoding.count_B))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Drafted:
  """The chosen token and the lookahead ones drafted behind it, T in all.

  s_BTD, e_BTD: states and inputs after the draft's iterations. q_BTV: what the next token was drawn from; nothing for
  the last. seen_BTV: tokens seen before the next.
  """

  tokens_BT: jax.Array
  s_BTD: jax.Array
  e_BTD: jax.Array
  q_BTV: jax.Array
  seen_BTV: jax.Array


@functools.partial(jax.jit, static_argnames=('model', 'slots', 'lookahead'), donate_argnames='speculation')
def leap(
  model: Model,
  params: Params,
  speculation: Speculation,
  asks: Asks,
  iterations: jax.Array,
  rounds: jax.Array,
  *,
  slots: Slots,
  lookahead: int,
) -> Speculation:
  """Up to `rounds` drafts of `lookahead` tokens, each verified; a row gains 1 to lookahead + 1 tokens in each.

  slots: one for every iteration. Exits and warm starts of `asks` are not looked at.
  """

  def body(loop):
    i, now = loop
    running_B = now.decoding.running_B
    decoding, accepted_B = _round(model, params, now.decoding, asks, iterations, slots, lookahead)
    gained = jnp.where(running_B, lookahead, 0), jnp.where(running_B, accepted_B, 0)
    return i + 1, Speculation(decoding, now.drafts_B + gained[0], now.accepted_B + gained[1])

  runs = lambda loop: (loop[0] < rounds) & jnp.any(loop[1].decoding.running_B)
  return jax.lax.while_loop(runs, body, (0, speculation))[1]


def _round(model, params, this: Decoding, asks: Asks, iterations, slots: Slots, lookahead: int):
  """(the rows with what they gained, how many drafts each accepted)."""
  depth_B = asks.exits.max_depth_B
  cache, drafted = _draft(model, params, this, asks, jnp.minimum(iterations, depth_B), slots, lookahead)
  positions_BT = this.position_B[:, None] + jnp.arange(lookahead + 1)[None]
  real_BT = jnp.broadcast_to(this.running_B[:, None], positions_BT.shape)
  feed = Feed(drafted.tokens_BT, positions_BT, real_BT, drafted.s_BTD)
  span = iterations, depth_B
  layers, s_BTD, _ = deepen(model, params, cache.core, feed, drafted.e_BTD, span, slots, fresh=False)
  logits_BTV, coda = speak_all(model, params, cache.coda, dataclasses.replace(feed, s_BTD=s_BTD))
  this = dataclasses.replace(this, cache=Cache(cache.prelude, layers, coda))
  tokens_BT, accepted_B = judge(logits_BTV, drafted, asks.sampling, positions_BT + 1)
  depth_BT = jnp.broadcast_to(depth_B[:, None], tokens_BT.shape)
  return note(this, asks, tokens_BT, logits_BTV, depth_BT, jnp.where(this.running_B, accepted_B + 1, 0)), accepted_B


def _draft(model, params, this: Decoding, asks: Asks, count_B, slots: Slots, lookahead: int) -> tuple[Cache, _Drafted]:
  """Each token from the one before; the last is only iterated, since the verifier may reach it."""
  row_B, V = jnp.arange(len(this.token_B)), model.cfg.vocab_size

  def step(carry, i):
    cache, token_B, seen_BV = carry
    position_B1 = this.position_B[:, None] + i
    feed = Feed(token_B[:, None], position_B1, this.running_B[:, None], start_states(model, asks, position_B1))
    e_BTD, prelude = embed(model, params, cache.prelude, feed, fresh=False)
    layers, s_BTD, _ = deepen(model, params, cache.core, feed, e_BTD, (0, count_B), slots, fresh=False)

    def say(coda):
      logits_BV, coda = speak(model, params, coda, dataclasses.replace(feed, s_BTD=s_BTD))
      q_BV = probabilities(logits_BV, seen_BV, asks.sampling)
      keys_B = keys_of(_DRAFT, asks.sampling, position_B1[:, 0] + 1)
      return coda, q_BV, pick(jnp.log(q_BV), keys_B).astype(jnp.int32)

    silent = lambda coda: (coda, jnp.zeros((len(row_B), V)), token_B)
    coda, q_BV, next_B = jax.lax.cond(i < lookahead, say, silent, cache.coda)
    done = _Drafted(token_B, s_BTD[:, 0], e_BTD[:, 0], q_BV, seen_BV)
    return (Cache(prelude, layers, coda), next_B, seen_BV.at[row_B, next_B].set(True)), done

  carry = this.cache, this.token_B, this.seen_BV
  (cache, *_), drafted = jax.lax.scan(step, carry, jnp.arange(lookahead + 1))
  return cache, jax.tree.map(lambda x: x.swapaxes(0, 1), drafted)


def judge(
  logits_BTV: jax.Array, drafted: _Drafted, rule: Sampling, positions_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(next tokens_BT, of which a row gets the first accepted_B + 1; accepted_B): the rejection rule of 2211.17192.

  positions_BT: of the tokens judged. A draft x ~ q is accepted with probability min(1, p(x) / q(x)), where p is what
  the verifier draws from; the first rejected one is drawn again from max(p - q, 0), and when none is, one more
  token comes from p.
  """
  p_BTV = jax.vmap(probabilities, in_axes=(1, 1, None), out_axes=1)(logits_BTV, drafted.seen_BTV, rule)
  next_BL = drafted.tokens_BT[:, 1:]
  of_next = lambda x_BTV: jnp.take_along_axis(x_BTV[:, :-1], next_BL[..., None], axis=-1)[..., 0]
  keys_BL = jax.vmap(keys_of, in_axes=(None, None, 1), out_axes=1)(_ACCEPT, rule, positions_BT[:, :-1])
  chance_BL = jax.vmap(jax.vmap(jax.random.uniform))(keys_BL)
  accepts_BL = chance_BL * of_next(drafted.q_BTV) < of_next(p_BTV)
  accepted_B = jnp.sum(jnp.cumprod(accepts_BL, axis=1), axis=1)

  row_B = jnp.arange(len(accepted_B))
  p_BV = p_BTV[row_B, accepted_B]
  rest_BV = jnp.maximum(p_BV - drafted.q_BTV[row_B, accepted_B], 0)
  rest_BV = jnp.where(jnp.any(rest_BV > 0, axis=-1, keepdims=True), rest_BV, p_BV)  # p = q but for rounding
  token_B = pick(jnp.log(rest_BV), keys_of(_REPLACE, rule, positions_BT[row_B, accepted_B]))
  index_1T = jnp.arange(positions_BT.shape[1])[None]
  next_BT = jnp.pad(next_BL, ((0, 0), (0, 1)))
  return jnp.where(index_1T == accepted_B[:, None], token_B[:, None], next_BT).astype(jnp.int32), accepted_B
