"""What each exit rule would save and cost, from one deep unroll of validation rows (2502.05171 section 6.1).

Every position is asked after every iteration, all positions being at the same depth; so what a token that stopped
early looks like to later ones is not part of these numbers (the engine's own runs have it).
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_loop.batch import Batch
from latent_loop.inference import exits as rules
from latent_loop.inference.exits import Memory
from latent_loop.model import Model, Params
from latent_loop.model.layers import Rows

_THRESHOLDS = 40  # tried per criterion
TOLERANCE_NATS = 0.01  # how much loss a recommended threshold may cost


def make_exit_eval(model: Model, depth: int) -> Callable[[Params, Batch, jax.Array], dict[str, jax.Array]]:
  """(params, batch, key) -> nll_RBT, right_RBT, values_RBTC (of rules.CRITERIA but the last) at depths 1 to `depth`."""

  @jax.jit
  def evaluate(params: Params, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
    params = model.cast(params)
    B, T = batch.tokens_BT.shape
    rows = Rows(batch.positions_BT, batch.segment_ids_BT)
    e_BTD = model.embed_input(params, batch.tokens_BT, rows)
    as_rows = lambda x: x.reshape(B * T, *x.shape[2:])
    as_tokens = lambda x: x.reshape(B, T, *x.shape[1:])
    every_X = jnp.ones((B * T,), bool)

    def visit(carry, _):
      before_BTD, memory = carry
      s_BTD = model.apply_core(params, before_BTD, e_BTD, rows)
      logits_BTV = model.scores(params, model.apply_coda(params, s_BTD, rows))
      memory, latent_XC = rules.look(memory, as_rows(before_BTD), as_rows(s_BTD))
      memory, reading_XC = rules.read(memory, as_rows(logits_BTV), every_X)
      log_p_BTV = as_tokens(memory.log_p_BV)
      nll_BT = -jnp.take_along_axis(log_p_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
      right_BT = jnp.argmax(logits_BTV, axis=-1) == batch.targets_BT
      values_BTC = as_tokens(jnp.concatenate([reading_XC, latent_XC], axis=-1))
      return (s_BTD, memory), {'nll_RBT': nll_BT, 'right_RBT': right_BT, 'values_RBTC': values_BTC}

    s_BTD = model.init_state(key, jnp.arange(B), T)
    memory = Memory.empty(as_rows(s_BTD), model.cfg.vocab_size)
    return jax.lax.scan(visit, (s_BTD, memory), None, length=depth)[1]

  return evaluate


def flatten(parts: Iterable[tuple[dict[str, Any], Batch]]) -> dict[str, np.ndarray]:
  """The scored tokens of several batches side by side: nll_RX, right_RX, values_RXC, targets_X."""
  out: dict[str, list[np.ndarray]] = {}
  for numbers, batch in parts:
    scored_BT = np.asarray(batch.weights_BT) > 0
    out.setdefault('targets_X', []).append(np.asarray(batch.targets_BT)[scored_BT])
    for name, values in jax.device_get(numbers).items():
      out.setdefault(name.replace('BT', 'X'), []).append(values[:, scored_BT])
  return {name: np.concatenate(values, axis=int(name != 'targets_X')) for name, values in out.items()}


def only(numbers: dict[str, np.ndarray], which_X: np.ndarray) -> dict[str, np.ndarray]:
  """The numbers of these tokens."""
  return {name: values[which_X] if name == 'targets_X' else values[:, which_X] for name, values in numbers.items()}


def curves(numbers: dict[str, np.ndarray], target_depth: float | None = None) -> dict[str, Any]:
  """By criterion a list of {threshold, mean_depth, loss, accuracy}, by rising mean depth, and what is recommended.

  target_depth: where given, also the threshold of the lowest loss whose mean depth is at most that.
  """
  nll_RX, right_RX, values_RXC = numbers['nll_RX'], numbers['right_RX'], numbers['values_RXC']
  R = len(nll_RX)
  by_criterion = {}
  for c, kind in enumerate(rules.CRITERIA[:-1]):
    rows = [
      {'threshold': threshold, **_cost(stop_depths(values_RXC[..., c], kind, threshold), nll_RX, right_RX)}
      for threshold in _thresholds(values_RXC[..., c], kind)
    ]
    by_criterion[kind] = sorted(rows, key=lambda row: row['mean_depth'])
  full = {'loss': float(np.mean(nll_RX[-1])), 'accuracy': float(np.mean(right_RX[-1]))}
  tokens = nll_RX.shape[1]
  found = {'depth': R, 'tokens': tokens, 'full': full, 'criteria': by_criterion, 'best': recommend(by_criterion, full)}
  if target_depth is not None:
    found['target'] = {'mean_depth': target_depth, 'best': meet(by_criterion, target_depth)}
  return found


def histogram(numbers: dict[str, np.ndarray], kind: str, threshold: float) -> dict[str, Any]:
  """What leaving by this rule costs these tokens, and left_at: how many of them leave after 1, 2, ... iterations."""
  depth_X = stop_depths(numbers['values_RXC'][..., rules.CRITERIA.index(kind)], kind, threshold)
  left_at = np.bincount(depth_X, minlength=len(numbers['nll_RX']) + 1)[1:].tolist()
  return {'tokens': len(depth_X), **_cost(depth_X, numbers['nll_RX'], numbers['right_RX']), 'left_at': left_at}


def stop_depths(values_RX: np.ndarray, kind: str, threshold: float) -> np.ndarray:
  """At which of the depths 1 to R each token leaves."""
  leaves_RX = values_RX >= threshold if kind == 'argmax-stability' else values_RX < threshold
  return np.where(leaves_RX.any(axis=0), leaves_RX.argmax(axis=0) + 1, len(values_RX))


def recommend(by_criterion: dict[str, list[dict]], full: dict[str, float]) -> dict[str, dict]:
  """By criterion the threshold of the lowest mean depth whose loss is within TOLERANCE_NATS of full depth."""
  best = {}
  for kind, rows in by_criterion.items():
    good = [row for row in rows if row['loss'] <= full['loss'] + TOLERANCE_NATS]
    if good:
      best[kind] = min(good, key=lambda row: row['mean_depth'])
  return best


def meet(by_criterion: dict[str, list[dict]], target_depth: float) -> dict[str, dict]:
  """By criterion the threshold of the lowest loss whose mean depth is at most target_depth."""
  good = {kind: [row for row in rows if row['mean_depth'] <= target_depth] for kind, rows in by_criterion.items()}
  return {kind: min(rows, key=lambda row: row['loss']) for kind, rows in good.items() if rows}


def _thresholds(values_RX: np.ndarray, kind: str) -> list[float]:
  """Candidates that let few to nearly all tokens out early."""
  if kind == 'argmax-stability':
    return [float(count) for count in range(1, len(values_RX))]
  finite = values_RX[np.isfinite(values_RX) & (values_RX > 0)]
  if not len(finite):
    return []
  low, high = np.quantile(finite, [0.01, 0.99])
  return [float(f'{x:.3g}') for x in np.geomspace(low, high, _THRESHOLDS)]


def _cost(depth_X: np.ndarray, nll_RX: np.ndarray, right_RX: np.ndarray) -> dict[str, float]:
  at = (depth_X - 1, np.arange(len(depth_X)))
  mean = lambda values: float(np.mean(values, dtype=np.float64))
  return {'mean_depth': mean(depth_X), 'loss': mean(nll_RX[at]), 'accuracy': mean(right_RX[at])}


def table(numbers: dict[str, Any]) -> list[str]:
  """The recommended threshold of every criterion, and who leaves where, as lines of text."""
  full, depth = numbers['full'], numbers['depth']
  lines = [
    f'{numbers["tokens"]} tokens; at depth {depth} for all: loss {full["loss"]:.4f}, accuracy {full["accuracy"]:.3f}',
    f'at most {TOLERANCE_NATS} nats above that:',
    *_rows(numbers['best'], depth, 'every criterion costs more; train longer or allow more depth'),
  ]
  if 'target' in numbers:
    target = numbers['target']
    lines += [f'a mean depth of at most {target["mean_depth"]:g}:']
    lines += _rows(target['best'], depth, 'no threshold tried is so early; give a larger --target_depth')
  if 'groups' in numbers:
    lines += [f'by kl:{numbers["best"]["kl"]["threshold"]:.3g}, tokens that leave after 1, 2, ... iterations:']
    for name, row in sorted(numbers['groups'].items(), key=lambda item: item[1]['mean_depth']):
      share = ' '.join(f'{count / row["tokens"]:.0%}' for count in row['left_at'])
      lines += [f'{name:<20} {row["tokens"]:>9}  {row["mean_depth"]:>10.2f}  {share}']
  return lines


def _rows(best: dict[str, dict], depth: int, none: str) -> list[str]:
  lines = ['criterion            threshold  mean depth  saved    loss   accuracy']
  for kind, row in sorted(best.items(), key=lambda item: item[1]['mean_depth']):
    lines.append(
      f'{kind:<20} {row["threshold"]:>9.3g}  {row["mean_depth"]:>10.2f}  {1 - row["mean_depth"] / depth:>5.0%}'
      f'  {row["loss"]:.4f}  {row["accuracy"]:.3f}'
    )
  return lines if best else [f'none: {none}']
