"""What stopping early saves in seconds: a trained model at fixed depth, in step, and by continuous depth batching.

The three answer the same requests, alternating in one run; predicted is what counted FLOPs (model/cost.py) allow, once
for the whole call, whose prompt is read at full depth, and once for what comes after the prompt.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator

import numpy as np

from latent_loop import data, trained
from latent_loop.benchmark import Effort, Line, Prompts
from latent_loop.errors import BadInput
from latent_loop.inference.engine import Answer, ExitRule, Request
from latent_loop.inference.exits import READING
from latent_loop.model import Model, cost


def exits(
  this: trained.Trained, rule: ExitRule, depth: int, cache: str, window: int, prompts: Prompts, effort: Effort
) -> Iterator[Line]:
  """A line for each way to answer; raises BadInput. Prompts are the beginnings of validation rows."""
  rows, seq_len = data.make_source(this.config).rows('validation'), this.config.data.seq_len
  if len(rows) < prompts.batch_size or seq_len < prompts.prompt_tokens:
    raise BadInput(
      f'--batch_size={prompts.batch_size} --prompt_tokens={prompts.prompt_tokens}: the validation data has {len(rows)} '
      f'rows of {seq_len} tokens; ask for no more'
    )
  first = lambda row: tuple(row['tokens_BT'][: prompts.prompt_tokens].tolist())
  texts = [first(rows[i]) for i in range(prompts.batch_size)]
  fixed = [
    Request(text, depth, max_new_tokens=prompts.new_tokens, temperature=1.0, seed=i) for i, text in enumerate(texts)
  ]
  early = [dataclasses.replace(request, exit=rule) for request in fixed]
  engine = trained.engine_of(this, cache)
  prompt = [dataclasses.replace(request, max_new_tokens=1) for request in fixed]
  ways = {
    'prompt': lambda: engine.answer(prompt),
    'fixed': lambda: engine.answer(fixed),
    'in_step': lambda: engine.answer(early),
    'continuous': lambda: engine.answer_flying(early, window),
  }
  answers, seconds = {name: way() for name, way in ways.items()}, {name: [] for name in ways}
  for _ in range(effort.rounds * effort.repeats):
    for name, way in ways.items():
      start = time.perf_counter()
      way()
      seconds[name].append(time.perf_counter() - start)
  counted = cost.count(engine.model, prompts.prompt_tokens + prompts.new_tokens)
  reading = prompts.batch_size * (prompts.prompt_tokens * (counted.outer + counted.core * depth) + counted.head)
  rules = {'fixed': ExitRule(), 'in_step': rule, 'continuous': rule}
  flops = {name: _flops(engine.model, counted, answers[name], its) for name, its in rules.items()}
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


def _mean_depth(answers: list[Answer]) -> float:
  """Over the tokens that a rule could stop: the first of each row comes with the prompt, at full depth."""
  return float(np.mean([depth for answer in answers for depth in answer.depths[1:]]))


def _flops(model: Model, counted: cost.Cost, answers: list[Answer], rule: ExitRule) -> float:
  """Of all tokens behind the first of each row: prelude, iterations, and coda and head as often as the rule reads."""
  depth, cfg = _mean_depth(answers), model.cfg
  reads = max(1.0, (depth - rule.min_depth) / rule.every + 1) if rule.kind in READING else 1.0
  coda_share = cfg.num_coda_layers / max(cfg.num_prelude_layers + cfg.num_coda_layers, 1)
  coda = counted.outer_blocks * coda_share + counted.outer - counted.outer_blocks
  per_token = counted.outer - coda + counted.core * depth + reads * (coda + counted.head)
  return per_token * sum(len(answer.tokens) - 1 for answer in answers)
