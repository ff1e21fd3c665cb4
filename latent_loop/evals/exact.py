"""Whether whole answers are right, by depth, from one unroll."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from latent_loop.batch import Batch
from latent_loop.evals.depth import states_at
from latent_loop.model import Model, Params
from latent_loop.model.layers import Rows


def make_right_eval(model: Model, depths: tuple[int, ...]) -> Callable[[Params, Batch, jax.Array], jax.Array]:
  """(params, batch, key) -> right_RBT: whether the likeliest token after each place is its target, at rising depths."""
  gaps_R = jnp.diff(jnp.array((0, *depths)))

  @jax.jit
  def evaluate(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
    params = model.cast(params)
    B, T = batch.tokens_BT.shape
    rows = Rows(batch.positions_BT, batch.segment_ids_BT).ready(model.cfg)
    e_BTD = model.embed_input(params, batch.tokens_BT, rows)

    def is_right(s_BTD):
      logits_BTV = model.scores(params, model.apply_coda(params, s_BTD, rows))
      return jnp.argmax(logits_BTV, axis=-1) == batch.targets_BT

    s_BTD = model.init_state(key, jnp.arange(B), T)
    return jax.lax.map(is_right, states_at(model, params, s_BTD, e_BTD, rows, gaps_R))

  return evaluate


def whole_answers(right_RBT: np.ndarray, batch: Batch) -> np.ndarray:
  """[R, X]: whether everything that counts in document X of `batch` is right; documents without such are left out."""
  counts_BT = np.asarray(batch.weights_BT) > 0
  segments_BT = np.asarray(batch.segment_ids_BT)
  documents_BT = np.arange(len(segments_BT))[:, None] * (segments_BT.max() + 1) + segments_BT
  _, document_C = np.unique(documents_BT[counts_BT], return_inverse=True)
  wrong_RX = [np.bincount(document_C, ~right_BT[counts_BT]) for right_BT in np.asarray(right_RBT)]
  return np.stack(wrong_RX) == 0
