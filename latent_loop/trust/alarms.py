"""Alarms about depth, from the numbers of evals/depth.py: how the paper's two failed runs looked, and what is near.

The paper's first run collapsed: the states of all tokens became alike. Its second ignored the state: one iteration
predicted as well as all (arXiv 2502.05171, section 4.3). A third: iterations that move the state more and more.
"""

from collections.abc import Callable
from typing import Any

from latent_loop.config import GuardConfig

_CONVERGED = 1e-3  # residuals below it are noise, and so is their ratio


def sentences(history: list[dict[str, Any]], cfg: GuardConfig, seq_len: int) -> list[str]:
  """One for each alarm that every one of the last cfg.alarm_patience evaluations raises; history: oldest first."""
  last = history[-cfg.alarm_patience :]
  if len(last) < cfg.alarm_patience:
    return []
  found = [[alarm(numbers, cfg, seq_len) for numbers in last] for alarm in _ALARMS]
  return [said[-1] for said in found if all(said)]


def readable(numbers: dict[str, Any]) -> bool:
  """Whether an evaluation that was read from a file holds what the alarms look at."""
  mean = numbers.get('mean_depth')
  tables = [numbers.get(f'{name}_by_depth') for name in ('loss', 'residual', 'token_correlation')]
  return type(mean) is int and all(
    isinstance(table, dict)
    and {'1', str(mean)} <= table.keys()
    and all(depth.isdecimal() and (value is None or isinstance(value, float)) for depth, value in table.items())
    for table in tables
  )


def _collapse(numbers: dict[str, Any], cfg: GuardConfig, seq_len: int) -> str | None:
  mean = str(numbers['mean_depth'])
  correlation = numbers['token_correlation_by_depth'][mean]
  if correlation is None or correlation / (1 - 1 / seq_len) <= cfg.max_token_correlation:
    return None
  return (
    f'step {numbers["step"]}: collapse: the states of the tokens of a row correlate by {correlation:.3f} at depth '
    f'{mean}, so they are nearly one state (config.guard.max_token_correlation={cfg.max_token_correlation}); a lower '
    'learning rate, sandwich norms and the linear injection have helped'
  )


def _ignored(numbers: dict[str, Any], cfg: GuardConfig, seq_len: int) -> str | None:
  mean, losses = str(numbers['mean_depth']), numbers['loss_by_depth']
  if mean == '1' or numbers['step'] < cfg.alarm_after_steps or None in (losses['1'], losses[mean]):
    return None
  gain = losses['1'] - losses[mean]
  if gain >= cfg.min_depth_gain:
    return None
  return (
    f'step {numbers["step"]}: the state is ignored: depth {mean} is better than depth 1 by {gain:.4f} nats only, less '
    f'than config.guard.min_depth_gain={cfg.min_depth_gain}; sandwich norms and a lower learning rate have helped'
  )


def contraction(numbers: dict[str, Any]) -> float | None:
  """What one more iteration multiplies the residual by, between the mean depth and the deepest; None: converged."""
  residuals = {int(depth): value for depth, value in numbers['residual_by_depth'].items()}
  mean, deepest = numbers['mean_depth'], max(residuals)
  first, last = residuals[mean], residuals[deepest]
  if deepest == mean or first is None or last is None or last < _CONVERGED:
    return None
  return (last / max(first, _CONVERGED)) ** (1 / (deepest - mean))


def _expansion(numbers: dict[str, Any], cfg: GuardConfig, seq_len: int) -> str | None:
  rate = contraction(numbers)
  if numbers['step'] < cfg.alarm_after_steps or rate is None or rate <= cfg.max_contraction:
    return None
  return (
    f'step {numbers["step"]}: iterations past depth {numbers["mean_depth"]} multiply the residual by {rate:.3f} each, '
    f'above config.guard.max_contraction={cfg.max_contraction}: deeper than in training the state runs away'
  )


_ALARMS: tuple[Callable[[dict[str, Any], GuardConfig, int], str | None], ...] = (_collapse, _ignored, _expansion)


def loss_too_high(step: int, tokens: int, loss: float, cfg: GuardConfig) -> str | None:
  """The guardrail on the training loss, after `tokens` tokens."""
  if cfg.max_loss is None or tokens < cfg.max_loss_after_tokens or loss <= cfg.max_loss:
    return None
  return (
    f'step {step}: loss {loss:.4f} after {tokens:,} tokens is above config.guard.max_loss={cfg.max_loss}, which counts '
    f'from {cfg.max_loss_after_tokens:,} tokens on'
  )
