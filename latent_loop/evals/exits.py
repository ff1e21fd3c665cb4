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
from latent_loop.model.cost import Cost
from latent_loop.model.layers import Rows

_THRESHOLDS = 40  # tried per criterion and interval
_INTERVALS = (1, 2, 4)  # iterations between checks
TOLERANCE_NATS = 0.01  # how much loss a recommended threshold may cost


def intervals(depth: int) -> tuple[int, ...]:
  """The check intervals that are tried up to this depth."""
  return tuple(every for every in _INTERVALS if every == 1 or every < depth)


def num_bytes(depth: int, tokens: int) -> int:
  """What the numbers of so many tokens up to `depth` take: a loss, whether it is right, a value of each criterion."""
  values = len(intervals(depth)) * (len(rules.CRITERIA) - 1)
  return depth * tokens * (4 + 1 + 4 * values)


def make_exit_eval(model: Model, depth: int) -> Callable[[Params, Batch, jax.Array], dict[str, jax.Array]]:
  """(params, batch, key) -> nll_RBT, right_RBT and values_RBTEC at depths 1 to `depth`.

  values_RBTEC: of rules.CRITERIA but the last, with the check intervals of `intervals(depth)` as E. A reading
  criterion compares with the last check, so its values differ by interval; they count where a check is due.
  """

  @jax.jit
  def evaluate(params: Params, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
    params = model.cast(params)
    B, T = batch.tokens_BT.shape
    rows = Rows(batch.positions_BT, batch.segment_ids_BT).ready(model.cfg)
    e_BTD = model.embed_input(params, batch.tokens_BT, rows)
    as_rows = lambda x: x.reshape(B * T, *x.shape[2:])
    as_tokens = lambda x: x.reshape(B, T, *x.shape[1:])

    def visit(carry, t):
      before_BTD, memories = carry
      s_BTD = model.apply_core(params, before_BTD, e_BTD, rows)
      logits_BTV = model.scores(params, model.apply_coda(params, s_BTD, rows))
      after, values = [], []
      for every, memory in zip(intervals(depth), memories, strict=True):
        memory, latent_XC = rules.look(memory, as_rows(before_BTD), as_rows(s_BTD))
        due_X = jnp.broadcast_to(t % every == 0, (B * T,))
        memory, reading_XC = rules.read(memory, as_rows(logits_BTV), due_X)
        after.append(memory)
        values.append(jnp.concatenate([reading_XC, latent_XC], axis=-1))
      log_p_BTV = as_tokens(after[0].log_p_BV)  # the first interval is 1
      nll_BT = -jnp.take_along_axis(log_p_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
      right_BT = jnp.argmax(logits_BTV, axis=-1) == batch.targets_BT
      values_BTEC = as_tokens(jnp.stack(values, axis=1))
      return (s_BTD, after), {'nll_RBT': nll_BT, 'right_RBT': right_BT, 'values_RBTEC': values_BTEC}

    s_BTD = model.init_state(key, jnp.arange(B), T)
    memories = [Memory.empty(as_rows(s_BTD), model.cfg.vocab_size) for _ in intervals(depth)]
    return jax.lax.scan(visit, (s_BTD, memories), jnp.arange(depth))[1]

  return evaluate


def flatten(parts: Iterable[tuple[dict[str, Any], Batch]]) -> dict[str, np.ndarray]:
  """The scored tokens of several batches side by side: nll_RX, right_RX, values_RXEC, targets_X."""
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


def curves(numbers: dict[str, np.ndarray], counted: Cost, target_depth: float | None = None) -> dict[str, Any]:
  """By criterion a list of rules with what each costs, by rising FLOPs, and what is recommended; fixed: no rule.

  A rule is {threshold, every}; its cost {mean_depth, reads, flops_per_token, loss, accuracy}, the FLOPs being those of
  a token behind the prompt. target_depth: where given, also the rule of the lowest loss with at most that mean depth.
  """
  depth, tokens = numbers['nll_RX'].shape
  by_criterion = {}
  for c, kind in enumerate(rules.CRITERIA[:-1]):
    rows = [
      _priced(numbers, kind, threshold, every, counted)
      for e, every in enumerate(intervals(depth))
      for threshold in _thresholds(numbers['values_RXEC'][::every, :, e, c], kind)
    ]
    by_criterion[kind] = sorted(rows, key=lambda row: row['flops_per_token'])
  fixed = [
    {
      'depth': r,
      'flops_per_token': counted.generated(r, 1),
      'loss': float(np.mean(numbers['nll_RX'][r - 1])),
      'accuracy': float(np.mean(numbers['right_RX'][r - 1])),
    }
    for r in range(1, depth + 1)
  ]
  full = {name: value for name, value in fixed[-1].items() if name != 'depth'}
  best = recommend(by_criterion, full)
  found = {'depth': depth, 'tokens': tokens, 'full': full, 'fixed': fixed, 'criteria': by_criterion, 'best': best}
  if best:
    kind = min(best, key=lambda kind: best[kind]['flops_per_token'])
    found['cheapest'] = as_flag(kind, best[kind])
  if target_depth is not None:
    found['target'] = {'mean_depth': target_depth, 'best': meet(by_criterion, target_depth)}
  return found


def histogram(numbers: dict[str, np.ndarray], kind: str, rule: dict[str, Any]) -> dict[str, Any]:
  """What leaving by this rule costs these tokens, and left_at: how many of them leave after 1, 2, ... iterations."""
  depth_X = _left_at(numbers, kind, rule['threshold'], rule['every'])
  left_at = np.bincount(depth_X, minlength=len(numbers['nll_RX']) + 1)[1:].tolist()
  return {'tokens': len(depth_X), **_cost(depth_X, numbers), 'left_at': left_at}


def stop_depths(values_RX: np.ndarray, kind: str, threshold: float, every: int = 1) -> np.ndarray:
  """At which of the depths 1 to R each token leaves; it is asked after 1, 1 + every, 1 + 2 every ... iterations."""
  leaves_RX = values_RX >= threshold if kind == 'argmax-stability' else values_RX < threshold
  due_R1 = np.arange(len(values_RX))[:, None] % every == 0
  leaves_RX = leaves_RX & due_R1
  return np.where(leaves_RX.any(axis=0), leaves_RX.argmax(axis=0) + 1, len(values_RX))


def recommend(by_criterion: dict[str, list[dict]], full: dict[str, float]) -> dict[str, dict]:
  """By criterion the rule of the fewest FLOPs whose loss is within TOLERANCE_NATS of full depth."""
  best = {}
  for kind, rows in by_criterion.items():
    good = [row for row in rows if row['loss'] <= full['loss'] + TOLERANCE_NATS]
    if good:
      best[kind] = min(good, key=lambda row: row['flops_per_token'])
  return best


def meet(by_criterion: dict[str, list[dict]], target_depth: float) -> dict[str, dict]:
  """By criterion the rule of the lowest loss whose mean depth is at most target_depth."""
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


def _left_at(numbers: dict[str, np.ndarray], kind: str, threshold: float, every: int) -> np.ndarray:
  e, c = intervals(len(numbers['nll_RX'])).index(every), rules.CRITERIA.index(kind)
  return stop_depths(numbers['values_RXEC'][:, :, e, c], kind, threshold, every)


def _priced(numbers: dict[str, np.ndarray], kind: str, threshold: float, every: int, counted: Cost) -> dict[str, float]:
  """A rule and its cost. A token that is read at every check pays coda and head each time, others once."""
  depth_X = _left_at(numbers, kind, threshold, every)
  reads = float(np.mean(-(-(depth_X - 1) // every) + 1)) if kind in rules.READING else 1.0
  cost = _cost(depth_X, numbers)
  flops = counted.generated(cost['mean_depth'], reads)
  return {'threshold': threshold, 'every': every, 'reads': reads, 'flops_per_token': flops, **cost}


def _cost(depth_X: np.ndarray, numbers: dict[str, np.ndarray]) -> dict[str, float]:
  at = (depth_X - 1, np.arange(len(depth_X)))
  mean = lambda values: float(np.mean(values, dtype=np.float64))
  return {'mean_depth': mean(depth_X), 'loss': mean(numbers['nll_RX'][at]), 'accuracy': mean(numbers['right_RX'][at])}


def as_flag(kind: str, rule: dict[str, Any]) -> str:
  """As launch.generate's --exit takes it."""
  return f'{kind}:{rule["threshold"]:.3g}:1:{rule["every"]}'


def table(numbers: dict[str, Any]) -> list[str]:
  """The recommended rule of every criterion, and who leaves where, as lines of text."""
  full, depth = numbers['full'], numbers['depth']
  lines = [
    f'{numbers["tokens"]} tokens; at depth {depth} for all: loss {full["loss"]:.4f}, accuracy {full["accuracy"]:.3f}',
    f'The cheapest rule of each kind that loses at most {TOLERANCE_NATS} nats more, as KIND:THRESHOLD:MIN_DEPTH:EVERY;',
    'readings: how often a token is read out to be asked.',
    *_rows(numbers['best'], full, 'every criterion costs more; train longer or allow more depth'),
  ]
  if 'cheapest' in numbers:
    lines += [f'the fewest FLOPs: --exit={numbers["cheapest"]}']
  if 'target' in numbers:
    target = numbers['target']
    lines += [f'a mean depth of at most {target["mean_depth"]:g}:']
    lines += _rows(target['best'], full, 'no threshold tried is so early; give a larger --target_depth')
  if 'groups' in numbers:
    lines += [f'by {numbers["groups"]["exit"]}, tokens that leave after 1, 2, ... iterations:']
    for name, row in sorted(numbers['groups']['of'].items(), key=lambda item: item[1]['mean_depth']):
      share = ' '.join(f'{count / row["tokens"]:.0%}' for count in row['left_at'])
      lines += [f'{name:<20} {row["tokens"]:>9}  {row["mean_depth"]:>10.2f}  {share}']
  return lines


def _rows(best: dict[str, dict], full: dict[str, float], none: str) -> list[str]:
  lines = ['rule                         mean depth  readings  FLOPs saved    loss  accuracy']
  for kind, row in sorted(best.items(), key=lambda item: item[1]['flops_per_token']):
    lines.append(
      f'{as_flag(kind, row):<28} {row["mean_depth"]:>10.2f}  {row["reads"]:>8.2f}'
      f'  {1 - row["flops_per_token"] / full["flops_per_token"]:>11.0%}  {row["loss"]:.4f}  {row["accuracy"]:>8.3f}'
    )
  return lines if best else [f'none: {none}']
