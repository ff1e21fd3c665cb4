"""Compares the inference engine with the token lists of the reference: generation.json of a golden folder.

greedy/rR/full: from the first tokens of row 0, states from zero, R iterations for every token. greedy/rR/compress-sK:
the cache of K layer slots, which iterations share in a ring. continuous/rR: warm start.
adaptive_prefill/CRITERION/THRESHOLD: the first tokens of row 0 one by one, each left to its criterion.
"""

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latent_loop.errors import BadInput
from latent_loop.inference.cache import Cache, Slots, new_cache
from latent_loop.inference.decode import begin, go_on
from latent_loop.inference.engine import ExitRule, Request, asks_of
from latent_loop.inference.exits import Exits
from latent_loop.inference.think import Feed, ponder
from latent_loop.interop import files
from latent_loop.model import Model, Params

PROMPT_TOKENS, MAX_DEPTH = 10, 32  # of the golden runs
_NUMBER = r'[1-9]\d{0,3}'


def matches(path: Path, model: Model, params: Params, tokens_T: np.ndarray) -> dict[str, float]:
  """Share of the lists that are equal, and of the tokens whose iterations are; raises BadInput for a faulty file.

  tokens_T: row 0 of the golden tokens.
  """
  golden, prompt = files.read_json(path), tuple(tokens_T[:PROMPT_TOKENS].tolist())
  runs = {
    name: re.fullmatch(rf'(greedy|continuous)/r({_NUMBER})(/full|/compress-s({_NUMBER}))?', name) for name in golden
  }
  deepest = max((int(match[2]) for match in runs.values() if match), default=1)  # one cache serves all depths
  groups: dict[str, list[float]] = {}
  for name, expected in golden.items():
    if match := runs[name]:
      tokens = _whole_numbers(path, name, expected)
      if (match[1] == 'greedy') != (match[3] is not None) or len(tokens) <= PROMPT_TOKENS:
        raise BadInput(f'{path}: {name!r} with {len(tokens)} tokens is not a run that the reference makes; remove it')
      key = 'warm_start_match' if match[1] == 'continuous' else 'ring_match' if match[4] else 'greedy_match'
      slots = _slots(path, name, model, match[4]) if match[4] else Slots(deepest)
      ours = _greedy(model, params, prompt, int(match[2]), slots, len(tokens), match[1] == 'continuous')
      groups.setdefault(key, []).append(float(ours == tokens))
    elif match := re.fullmatch(r'adaptive_prefill/([a-z-]+)/([-+.e\d]+)', name):
      steps = _whole_numbers(path, f'{name}/steps', expected.get('steps') if isinstance(expected, dict) else None)
      if not 0 < len(steps) <= len(tokens_T):
        raise BadInput(f'{path}: {name} has {len(steps)} steps; row 0 has {len(tokens_T)} tokens, write it again')
      ours = _adaptive_steps(model, params, tokens_T[: len(steps)], ExitRule.parse(f'{match[1]}:{match[2]}'))
      groups.setdefault('adaptive_steps_match', []).append(float(np.mean(np.array(ours) == np.array(steps))))
    else:
      raise BadInput(f'{path}: unknown run {name!r}; the names are listed in latent_loop/interop/generation.py')
  out = {key: float(np.mean(values)) for key, values in groups.items()}
  if worst := groups.get('adaptive_steps_match'):
    out['adaptive_steps_match_worst'] = min(worst)
  return out


def _whole_numbers(path: Path, name: str, values: Any) -> list[int]:
  if not isinstance(values, list) or not all(type(value) is int for value in values):
    raise BadInput(f'{path}: {name} is not a list of whole numbers; write it again')
  return values


def _slots(path: Path, name: str, model: Model, layer_slots: str) -> Slots:
  count, rest = divmod(int(layer_slots), model.cfg.num_core_layers)
  if rest or not count:
    raise BadInput(
      f'{path}: {name}: {layer_slots} layer slots are no multiple of {model.cfg.num_core_layers} core layers'
    )
  return Slots(count, ring=True)


def _greedy(
  model: Model, params: Params, prompt: tuple[int, ...], depth: int, slots: Slots, length: int, warm: bool
) -> list[int]:
  new = length - len(prompt)
  request = Request(prompt, depth, max_new_tokens=new, warm_start=warm, state_scale=0.0)
  asks, lengths_B = asks_of([request]), jnp.array([len(prompt)])
  made = begin(model, params, jnp.array([prompt]), lengths_B, asks, slots=slots, places=length, new=new)
  made = go_on(model, params, made, asks, jnp.int32(new), slots=slots)
  return [*prompt, *np.asarray(made.tokens_BM)[0].tolist()]


def _adaptive_steps(model: Model, params: Params, tokens_T: Iterable[int], rule: ExitRule) -> list[int]:
  exits = asks_of([Request((0,), MAX_DEPTH, exit=rule)]).exits
  return np.asarray(_walk(model, params, jnp.asarray(tokens_T, jnp.int32), exits)).tolist()


@functools.partial(jax.jit, static_argnames='model')
def _walk(model: Model, params: Params, tokens_T: jax.Array, exits: Exits) -> jax.Array:
  """Iterations spent on each of the tokens in turn."""
  T, slots = len(tokens_T), Slots(MAX_DEPTH)
  zero_BTD = jnp.zeros((1, 1, model.cfg.width), model.cfg.compute_dtype)

  def step(cache: Cache, place: tuple[jax.Array, jax.Array]):
    token, position = place
    feed = Feed(token[None, None], position[None, None], jnp.ones((1, 1), bool), zero_BTD)
    cache, _, depth_B, _ = ponder(model, params, cache, feed, exits, slots)
    return cache, depth_B[0]

  return jax.lax.scan(step, new_cache(model.cfg, slots, 1, T), (tokens_T, jnp.arange(T)))[1]
