"""What a trained model's ways to answer take in seconds: stopping early, speculation, the parallel sampler.

They answer the same requests, alternating in one run.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator

import numpy as np

from latent_loop import data, trained
from latent_loop.benchmark import Effort, Line, Prompts
from latent_loop.errors import BadInput
from latent_loop.inference.engine import Answer, Engine, ExitRule, Request
from latent_loop.inference.exits import READING
from latent_loop.inference.speculate import Draft
from latent_loop.inference.wavefront import Wavefront
from latent_loop.model import cost


def exits(
  this: trained.Trained, rule: ExitRule, depth: int, cache: str, window: int, prompts: Prompts, effort: Effort
) -> Iterator[Line]:
  """Lines for fixed depth, for leaving early in step and for doing so in continuous depth batching; raises BadInput.

  Predicted is what counted FLOPs (model/cost.py) allow, once for the whole call, whose prompt is read at full depth,
  and once for what comes after the prompt.
  """
  fixed = _requests(this, depth, 1.0, prompts)
  early = [dataclasses.replace(request, exit=rule) for request in fixed]
  prompt = [dataclasses.replace(request, max_new_tokens=1) for request in fixed]
  engine = trained.engine_of(this, cache)
  ways = {
    'prompt': lambda: engine.answer(prompt),
    'fixed': lambda: engine.answer(fixed),
    'in_step': lambda: engine.answer(early),
    'continuous': lambda: engine.answer_flying(early, window),
  }
  answers, seconds = _alternate(ways, effort)
  counted = cost.count(engine.model, prompts.prompt_tokens + prompts.new_tokens)
  reading = prompts.batch_size * (prompts.prompt_tokens * (counted.outer + counted.core * depth) + counted.head)
  rules = {'fixed': ExitRule(), 'in_step': rule, 'continuous': rule}
  flops = {name: _flops(counted, answers[name], its) for name, its in rules.items()}
  medians = {name: statistics.median(values) for name, values in seconds.items()}
  for name in rules:
    predicted = (reading + flops['fixed']) / (reading + flops[name])
    speedup = medians['fixed'] / medians[name]
    decoding = (medians['fixed'] - medians['prompt']) / (medians[name] - medians['prompt'])
    yield {
      'mode': 'exits',
      'way': name,
      'exit': f'{rule.kind}:{rule.value:g}:{rule.min_depth}:{rule.every}' if name != 'fixed' else 'none',
      'depth': depth,
      'mean_depth': _mean_depth(answers[name]),
      'tokens_per_second': sum(len(answer.tokens) for answer in answers[name]) / medians[name],
      'seconds_median': medians[name],
      'seconds': seconds[name],
      'prompt_seconds_median': medians['prompt'],
      'speedup': speedup,
      'predicted_speedup': predicted,
      'share_of_predicted': speedup / predicted,
      'decoding_speedup': decoding,
      'predicted_decoding_speedup': flops['fixed'] / flops[name],
      'same_tokens_as_in_step': [a.tokens for a in answers[name]] == [a.tokens for a in answers['in_step']],
      'batch_size': prompts.batch_size,
      'window': window,
      'cache': cache,
    }


def ahead(
  this: trained.Trained,
  depth: int,
  drafts: list[Draft],
  fronts: list[Wavefront],
  temperature: float,
  prompts: Prompts,
  effort: Effort,
) -> Iterator[Line]:
  """Lines for plain decoding, full cache and ring:1, for each draft and for each front; raises BadInput.

  applications_per_token: of the core, one after the other, whatever the number of positions in each. iterations: of
  all positions that they computed, those thrown away too. The first token of a row, the prompt's, is not counted.
  """
  requests, parts = _requests(this, depth, temperature, prompts), {}
  for name, cache, options in [
    ('plain', 'full', {}),
    ('plain', 'ring:1', {}),
    *[(f'speculate {x.iterations}:{x.lookahead}', 'full', {'speculate': x}) for x in drafts],
    *[(f'parallel {x.width}', 'ring:1', {'wavefront': x}) for x in fronts],
  ]:
    parts[name, cache] = trained.engine_of(this, cache, **options)
  ways = {key: functools.partial(engine.answer, requests) for key, engine in parts.items()}
  answers, seconds = _alternate(ways, effort)
  medians = {key: statistics.median(values) for key, values in seconds.items()}
  for (name, cache), engine in parts.items():
    ours, plain = answers[name, cache], answers['plain', cache]
    applications, iterations = _work(engine, ours, depth)
    drafted = sum(answer.drafts for answer in ours)
    yield {
      'mode': 'ahead',
      'way': name,
      'cache': cache,
      'depth': depth,
      'tokens_per_second': sum(len(answer.tokens) for answer in ours) / medians[name, cache],
      'seconds_median': medians[name, cache],
      'seconds': seconds[name, cache],
      'speedup': medians['plain', cache] / medians[name, cache],
      'accepted': sum(answer.accepted for answer in ours) / drafted if drafted else None,
      'applications_per_token': applications,
      'iterations_per_token': iterations,
      'same_tokens_as_plain': [a.tokens for a in ours] == [a.tokens for a in plain],
      'different_tokens': len({token for answer in ours for token in answer.tokens}),
      'temperature': temperature,
      'batch_size': prompts.batch_size,
    }


def _requests(this: trained.Trained, depth: int, temperature: float, prompts: Prompts) -> list[Request]:
  """The beginnings of validation rows; raises BadInput where there are not so many, or not so long ones."""
  rows, seq_len = data.make_source(this.config).rows('validation'), this.config.data.seq_len
  if len(rows) < prompts.batch_size or seq_len < prompts.prompt_tokens:
    raise BadInput(
      f'--batch_size={prompts.batch_size} --prompt_tokens={prompts.prompt_tokens}: the validation data has {len(rows)} '
      f'rows of {seq_len} tokens; ask for no more'
    )
  first = lambda row: tuple(row['tokens_BT'][: prompts.prompt_tokens].tolist())
  options = {'max_new_tokens': prompts.new_tokens, 'temperature': temperature}
  return [Request(first(rows[i]), depth, seed=i, **options) for i in range(prompts.batch_size)]


def _alternate(ways: dict, effort: Effort) -> tuple[dict, dict]:
  """(the answers of each way, the seconds of each of its calls, compiled before)."""
  answers, seconds = {name: way() for name, way in ways.items()}, {name: [] for name in ways}
  for _ in range(effort.rounds * effort.repeats):
    for name, way in ways.items():
      start = time.perf_counter()
      way()
      seconds[name].append(time.perf_counter() - start)
  return answers, seconds


def _work(engine: Engine, answers: list[Answer], depth: int) -> tuple[float, float]:
  """(applications of the core one after the other, iterations of positions) for each token behind the first."""
  tokens = sum(len(answer.tokens) - 1 for answer in answers)
  if engine.speculate is not None:
    draft, rounds = engine.speculate, sum(answer.drafts for answer in answers) / engine.speculate.lookahead
    positions, drafted = draft.lookahead + 1, min(draft.iterations, depth)
    return rounds * (positions * drafted + depth - drafted) / tokens, rounds * positions * depth / tokens
  if engine.wavefront is not None:
    applications = sum(answer.steps for answer in answers) * engine.wavefront.inner / tokens
    return applications, applications * engine.wavefront.width
  return depth, depth


def _mean_depth(answers: list[Answer]) -> float:
  """Over the tokens that a rule could stop: the first of each row comes with the prompt, at full depth."""
  return float(np.mean([depth for answer in answers for depth in answer.depths[1:]]))


def _flops(counted: cost.Cost, answers: list[Answer], rule: ExitRule) -> float:
  """Of all tokens behind the first of each row: prelude, iterations, and coda and head as often as the rule reads."""
  depth = _mean_depth(answers)
  reads = max(1.0, (depth - rule.min_depth) / rule.every + 1) if rule.kind in READING else 1.0
  return counted.generated(depth, reads) * sum(len(answer.tokens) - 1 for answer in answers)
