"""Plain generation at a chosen depth: the whole row is computed again for every token.

Simple and right by construction; a cache of keys and values is a later room's business.
"""

import functools

import jax
import jax.numpy as jnp

from latent_loop.model import Model, Params
from latent_loop.model.layers import Rows


@functools.partial(jax.jit, static_argnames=('model', 'eos'))
def generate(
  model: Model,
  params: Params,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  key: jax.Array,
  depth: jax.Array,
  temperature: jax.Array,
  eos: int,
) -> jax.Array:
  """Fills the free places of each row; returns tokens_BT, with `eos` from the end of each answer on.

  tokens_BT: prompts at the left, anything after. lengths_B: tokens in each prompt. depth: iterations
  per token, traced, so every depth shares one executable. temperature: 0 is greedy.
  """
  params = model.cast(params)
  B, T = tokens_BT.shape
  rows = Rows(jnp.broadcast_to(jnp.arange(T)[None], (B, T)), None)
  state_key, sample_key = jax.random.split(key)
  s_BTD = model.init_state(state_key, jnp.arange(B), T)
  row_B = jnp.arange(B)

  def next_token(i, carry):
    tokens_BT, done_B = carry
    e_BTD = model.embed_input(params, tokens_BT, rows)
    y_BTD = model.apply_coda(params, model.advance(params, s_BTD, e_BTD, rows, depth), rows)
    at_B = jnp.minimum(lengths_B + i, T - 1)
    logits_BV = model.scores(params, y_BTD[row_B, at_B - 1][:, None])[:, 0]
    noise_BV = jax.random.gumbel(jax.random.fold_in(sample_key, i), logits_BV.shape)
    chosen_B = jnp.argmax(logits_BV + temperature * noise_BV, axis=-1)
    chosen_B = jnp.where(done_B, eos, chosen_B).astype(tokens_BT.dtype)
    fits_B = lengths_B + i < T
    tokens_BT = tokens_BT.at[row_B, at_B].set(jnp.where(fits_B, chosen_B, tokens_BT[row_B, at_B]))
    return tokens_BT, done_B | (chosen_B == eos)

  steps = T - jnp.min(lengths_B)
  return jax.lax.fori_loop(0, steps, next_token, (tokens_BT, jnp.zeros((B,), bool)))[0]
