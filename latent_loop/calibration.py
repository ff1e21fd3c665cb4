"""Where tokens of a trained model stop thinking: exit rules compared, and depths by kind of token, task or text."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from latent_loop import data, storage, trained
from latent_loop.config import Config
from latent_loop.errors import BadInput
from latent_loop.evals import exits as exit_eval
from latent_loop.model import cost
from latent_loop.parallel import memory
from latent_loop.storage import Path
from latent_loop.tokenizer import Tokenizer


def write_exits(
  this: trained.Trained,
  workdir: Path,
  source: data.Source,
  depth: int,
  target_depth: float | None = None,
  difficulties: Sequence[int] = (),
) -> tuple[Path, dict[str, Any]]:
  """exits.json in the run's folder: what each exit rule saves and costs up to `depth`; (its path, the numbers).

  target_depth: also the rules that keep to this mean depth. difficulties: of a task, whose tokens are counted apart;
  default those of training. Raises BadInput, also for a depth whose numbers do not fit the memory.
  """
  pieces, parts = parts_of(this.config, difficulties), {}
  tokens = this.config.train.batch_size * this.config.eval.num_batches * this.config.data.seq_len
  memory.check_unroll(exit_eval.num_bytes(depth, tokens), depth)
  evaluate = exit_eval.make_exit_eval(this.model, depth)

  def unroll(source: data.Source) -> dict[str, np.ndarray]:
    batches, count = trained.validation_batches(this.config, this.mesh, source)
    out = []
    for i in range(count):
      batch = batches.batch(i)
      key = jax.random.fold_in(jax.random.key(trained.VALIDATION_SEED), i)
      out.append((jax.device_get(evaluate(this.params, trained.place(batch, this.mesh), key)), batch))
    return exit_eval.flatten(out)

  counted = cost.count(this.model, this.config.data.seq_len)
  with jax.set_mesh(this.mesh):
    numbers = unroll(source)
    found = exit_eval.curves(numbers, counted, target_depth)
    for name, config in pieces.items():
      # Of those that nobody asked for, an easy one may have no instance that is for validation.
      with contextlib.suppress(*(() if difficulties else (BadInput,))):
        parts[name] = unroll(data.make_source(config))
  # Asked after every iteration, or who leaves where would show the interval.
  each = {'kl': [row for row in found['criteria']['kl'] if row['every'] == 1]}
  rule = exit_eval.recommend(each, found['full']).get('kl')
  if rule:
    kinds = kinds_of_tokens(data.make_tokenizer(this.config.data), numbers['targets_X'])
    groups = parts or {kind: exit_eval.only(numbers, kinds == kind) for kind in sorted(set(kinds))}
    groups = {name: exit_eval.histogram(one, 'kl', rule) for name, one in groups.items()}
    found['groups'] = {'exit': exit_eval.as_flag('kl', rule), 'of': groups}
  path = workdir / 'exits.json'
  who = {'name': this.config.name, 'seed': this.config.seed, 'mean_depth': this.config.depth.mean, 'step': this.step}
  storage.write(path, json.dumps({**who, **found}, indent=1) + '\n')
  return path, found


def parts_of(config: Config, difficulties: Sequence[int] = ()) -> dict[str, Config]:
  """A config for each difficulty of a task, or for each folder of a mixture; none where the data is of one piece.

  difficulties: default those of training. Raises BadInput where there is no task to have them.
  """
  of = lambda **changes: dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
  if config.data.source in data.tasks.TASKS:
    asked = sorted(set(difficulties)) or range(config.data.min_difficulty, config.data.max_difficulty + 1)
    return {f'difficulty {d}': of(min_difficulty=d, max_difficulty=d) for d in asked}
  if difficulties:
    raise BadInput(f'--difficulty={difficulties[0]}: trained on {config.data.source}, which has no difficulties')
  paths = config.data.paths if len(config.data.paths) > 1 else ()
  return {path: of(paths=(path,), weights=(), weight_changes=()) for path in paths}


def kinds_of_tokens(tokenizer: Tokenizer, tokens_X: np.ndarray) -> np.ndarray:
  """What each token is, as text: what it begins with decides."""
  ids, at_X = np.unique(tokens_X, return_inverse=True)
  return np.array([_kind(tokenizer.decode([int(i)])) for i in ids])[at_X]


def _kind(text: str) -> str:
  first = text.strip()[:1]
  if not first:
    return 'line break' if '\n' in text else 'blank'
  return 'letter' if first.isalpha() else 'digit' if first.isdigit() else 'other'
