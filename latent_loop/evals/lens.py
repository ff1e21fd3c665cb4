"""The latent lens: what a model would have said after every iteration of every token, and how its states move.

The figures follow section 7 of 2502.05171: distances to a late state, and states in the principal directions of
all states of the prompt.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_loop.errors import BadInput
from latent_loop.inference import exits
from latent_loop.inference.decode import start_states
from latent_loop.inference.engine import Request, asks_of
from latent_loop.model import Model, Params
from latent_loop.model.layers import Rows
from latent_loop.tokenizer import utf8 as tokenizer

MAX_TOKENS, MAX_CELLS = 512, 65536  # what one page can show
TOP = 5  # tokens named per cell
COMPONENTS = 6
THRESHOLD = exits.THRESHOLDS['kl']
SETTLED = 0.01  # a last move below this share of the state's length
_KL = exits.READING.index('kl')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lens:
  """Row i - 1 of R is iteration i. After position t of T, the model predicts token t + 1."""

  top_RTK: jax.Array  # the likeliest tokens, best first
  top_p_RTK: jax.Array
  next_p_RT: jax.Array  # probability of the token that the prompt goes on with; meaningless for the last
  entropy_RT: jax.Array  # nats
  kl_RT: jax.Array  # KL(iteration before | this), nats; the first is compared with the uniform distribution
  distance_RT: jax.Array  # |s_i - s_2R|
  states_STD: jax.Array  # s_0 to s_R, raw, float32: S = R + 1


def check(request: Request) -> None:
  """Raises BadInput when the prompt (its first token begins the text) is empty or the page would be too large."""
  tokens, depth = len(request.tokens), request.depth
  if tokens < 2:
    raise BadInput('--prompt: it is empty; give a text to look at, such as --prompt="def "')
  if tokens > MAX_TOKENS:
    raise BadInput(f'--prompt: it has {tokens} tokens and a page shows {MAX_TOKENS}; shorten it')
  if tokens * depth > MAX_CELLS:
    raise BadInput(
      f'--depth={depth}: {tokens} tokens at that depth are {tokens * depth} cells and a page shows {MAX_CELLS}; '
      f'give --depth={MAX_CELLS // tokens} or less, or a shorter prompt'
    )


def look(model: Model, params: Params, request: Request) -> Lens:
  """Every iteration up to request.depth of every token, as numbers on the host; raises BadInput (see check).

  The start states are those that launch.generate gives the prompt with the same seed.
  """
  check(request)
  if max(request.tokens) >= model.cfg.vocab_size:
    raise BadInput(f'--prompt: the model has {model.cfg.vocab_size} tokens and does not know {max(request.tokens)}')
  tokens_BT = jnp.array([request.tokens], jnp.int32)
  positions_BT = jnp.arange(tokens_BT.shape[1])[None]
  s_BTD = start_states(model, asks_of([request]), positions_BT)
  return jax.device_get(_unroll(model, params, s_BTD, tokens_BT, positions_BT, request.depth))


@functools.partial(jax.jit, static_argnames=('model', 'depth'))
def _unroll(
  model: Model, params: Params, s_BTD: jax.Array, tokens_BT: jax.Array, positions_BT: jax.Array, depth: int
) -> Lens:
  params, rows = model.cast(params), Rows(positions_BT, None).ready(model.cfg)
  e_BTD = model.embed_input(params, tokens_BT, rows)
  next_T1 = jnp.roll(tokens_BT[0], -1)[:, None]
  always_T = jnp.ones(next_T1.shape[:1], bool)

  def visit(carry, _):
    s_BTD, memory = carry
    s_BTD = model.apply_core(params, s_BTD, e_BTD, rows)
    logits_TV = model.scores(params, model.apply_coda(params, s_BTD, rows))[0]
    memory, values = exits.read(memory, logits_TV, always_T)
    p_TV = jnp.exp(memory.log_p_BV)
    top_p_TK, top_TK = jax.lax.top_k(p_TV, min(TOP, model.cfg.vocab_size))
    next_p_T = jnp.take_along_axis(p_TV, next_T1, axis=-1)[:, 0]
    return (s_BTD, memory), (top_TK, top_p_TK, next_p_T, memory.entropy_B, values[:, _KL], s_BTD[0])

  memory = exits.Memory.empty(s_BTD[0].astype(jnp.float32), model.cfg.vocab_size)
  (last_BTD, _), (*seen, states_RTD) = jax.lax.scan(visit, (s_BTD, memory), length=depth)
  late_TD = model.advance(params, last_BTD, e_BTD, rows, depth)[0].astype(jnp.float32)
  states_STD = jnp.concatenate([s_BTD, states_RTD]).astype(jnp.float32)
  return Lens(*seen, jnp.linalg.norm(states_STD[1:] - late_TD[None], axis=-1), states_STD)


def exit_steps(kl_RT: np.ndarray, threshold: float = THRESHOLD) -> list[int | None]:
  """Per token the first iteration whose KL is below the threshold; None where there is none."""
  below_RT = kl_RT < threshold
  return [int(np.argmax(below_R)) + 1 if below_R.any() else None for below_R in below_RT.T]


def principal(states_STD: np.ndarray, count: int = COMPONENTS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(coordinates [S, T, P], directions [P, D], share of the variance that each explains [P]), largest first.

  Over all states of all tokens; none where a state is not finite. A direction's largest entry is positive, so
  pictures do not flip between runs.
  """
  S, T, D = states_STD.shape
  if not np.isfinite(states_STD).all():
    return np.zeros((S, T, 0)), np.zeros((0, D)), np.zeros(0)
  x_CD = states_STD.reshape(S * T, D).astype(np.float64)
  x_CD = x_CD - x_CD.mean(axis=0)
  variances_D, directions_DD = np.linalg.eigh(x_CD.T @ x_CD)
  directions_PD = directions_DD[:, ::-1][:, :count].T
  largest_P = np.take_along_axis(directions_PD, np.argmax(np.abs(directions_PD), axis=1)[:, None], axis=1)
  directions_PD = directions_PD * np.sign(largest_P)
  shares_P = np.maximum(variances_D[::-1][:count], 0) / max(variances_D.sum(), 1e-30)
  return (x_CD @ directions_PD.T).reshape(S, T, -1), directions_PD, shares_P


def motion(states_SD: np.ndarray) -> str:
  """How a token's states move in the second half of its iterations; a rule of thumb, not a proof.

  settled: the last move is below SETTLED of the state's length. settling: moves at least halve over that half.
  sliding: they do not, and go one way (net / path >= 0.8). turning: they do not, and turn: an orbit, or wandering.
  """
  moves_RD = np.diff(states_SD.astype(np.float64), axis=0)
  lengths_R = np.linalg.norm(moves_RD, axis=-1)
  if not np.isfinite(lengths_R).all():
    return 'not finite'
  if lengths_R[-1] < SETTLED * np.linalg.norm(states_SD[-1]):
    return 'settled'
  late_RD, late_R = moves_RD[len(moves_RD) // 2 :], lengths_R[len(moves_RD) // 2 :]
  if len(late_R) < 4:
    return 'too few steps'
  if late_R[-1] <= late_R[0] / 2:
    return 'settling'
  return 'sliding' if np.linalg.norm(late_RD.sum(axis=0)) >= 0.8 * late_R.sum() else 'turning'


def summarize(lens: Lens, request: Request, about: Mapping[str, Any]) -> dict[str, Any]:
  """What the page shows, as plain lists, tokens first: `top[t][i]` belongs to token t and iteration i + 1."""
  coordinates_STP, _, shares_P = principal(lens.states_STD)
  swap = lambda x_RT: x_RT.swapaxes(0, 1).tolist()
  moves_RT = np.linalg.norm(np.diff(lens.states_STD, axis=0), axis=-1) / np.linalg.norm(lens.states_STD[1:], axis=-1)
  named = sorted({*request.tokens, *lens.top_RTK.ravel().tolist()})
  return {
    **about,
    'depth': request.depth,
    'seed': request.seed,
    'threshold': THRESHOLD,
    'tokens': list(request.tokens),
    'labels': {str(token): tokenizer.label(token) for token in named},
    'prompt_labels': tokenizer.labels_in_text(request.tokens),
    'top': swap(lens.top_RTK),
    'top_p': swap(lens.top_p_RTK),
    'next_p': swap(lens.next_p_RT),
    'entropy': swap(lens.entropy_RT),
    'kl': swap(lens.kl_RT),
    'distance': swap(lens.distance_RT),
    'residual': swap(moves_RT),
    'exit': exit_steps(lens.kl_RT),
    'motion': [motion(states_SD) for states_SD in lens.states_STD.swapaxes(0, 1)],
    'coordinates': swap(coordinates_STP),
    'explained': shares_P.tolist(),
  }
