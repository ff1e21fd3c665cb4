"""A run as a model of lm-eval-harness: --model latent_loop --model_args workdir=DIR,depth=N,exit=RULE

depths=1:4:8 in the place of depth=N gives the results at each: texts are scored at all of them in one unroll.
"""

import collections
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model, register_model

from latent_loop import storage, trained
from latent_loop.config.rules import count_of
from latent_loop.data import make_tokenizer
from latent_loop.errors import BadInput
from latent_loop.evals.depth import deepest, states_at
from latent_loop.inference.engine import ExitRule, round_up
from latent_loop.inference.text import request_of, text_of
from latent_loop.model import Model, Params
from latent_loop.model.layers import Rows

_NAME = 'latent_loop'
_NEW_TOKENS = 256  # of an answer, where a task does not say
_MOST_TOKENS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')  # what tasks call them
_SAMPLING = {'top_p': float, 'top_k': int, 'min_p': float}
_BATCH_SIZE, _MOST_ROWS = 8, 4096
_MODEL_ARGS = ('workdir', 'depth', 'depths', 'exit')
_HARNESS_ARGS = ('device', 'max_batch_size')  # which it gives to every model, and this one has no use for
_BY_TASK = ('results', 'groups', 'configs', 'versions', 'n-shot', 'higher_is_better', 'n-samples', 'samples')

Row = tuple[list[int], int]  # tokens, the first of them that is told
Score = dict[int, tuple[float, bool]]  # by depth: nats, whether greedy decoding would say it


@register_model(_NAME)
class LatentLoop(LM):
  """depth: iterations per token, the mean of training where it is not given. exit: of generated tokens, as in
  launch.generate; a text that is scored takes `depth` for every token. depths: those to score at, as 1:4:8, of which
  `depth` is the one that is answered for. Raises BadInput.
  """

  def __init__(
    self,
    workdir: str | None = None,
    depth: int | None = None,
    depths: str | int | None = None,
    exit: str = 'none',
    batch_size: int | str = _BATCH_SIZE,
    **others: object,
  ):
    super().__init__()
    self._batch_size = _batch_size_of(batch_size)
    unknown = sorted(others.keys() - {*_HARNESS_ARGS})
    if unknown:
      known = ', '.join(_MODEL_ARGS)
      raise BadInput(f'--model_args {unknown[0]}={others[unknown[0]]}: no such argument; choose from {known}')
    if workdir is None:
      raise BadInput('--model_args has no workdir; give the folder of a run, as workdir=runs/tiny_text,depth=8')
    found = trained.load(storage.path(str(workdir), '--model_args workdir'))
    self._engine, self._tokenizer = trained.engine_of(found), make_tokenizer(found.config.data)
    self.depths = _depths_of(depth, depths, found.config.depth.mean)
    self.depth, self._exit = self.depths[0], ExitRule.parse(exit)
    self._width = max(found.config.data.seq_len, 2)  # a token and the one before it
    self._known: dict[tuple, Score] = {}  # what was asked -> the answers at all depths

  def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """(nats of the continuation, whether greedy decoding would give it), the context cut at its left to fit a row.

    A continuation longer than a row is read in rows whose first half is context.
    """
    return self._answers(requests, self._continuations)

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Nats of a whole text; one longer than a row is read in rows whose first half is context already scored."""
    return [nats for nats, _ in self._answers(requests, self._texts)]

  def _answers(self, requests, score: Callable[[list[tuple]], list[Score]]) -> list[tuple[float, bool]]:
    """What `score` finds at this depth; it is asked once for all depths."""
    new = [request.args for request in requests if request.args not in self._known]
    self._known |= zip(new, score(new), strict=True)
    return [self._known[request.args][self.depth] for request in requests]

  def _continuations(self, asked: list[tuple[str, str]]) -> list[Score]:
    rows = []
    for context, continuation in asked:
      tokens, first = self._behind(context, continuation)
      cut = max(len(tokens) - self._width, 0)
      rows.append([(tokens[cut:], first - cut)] if cut < first < len(tokens) else [*self._rows(tokens, first)])
    return self._told(rows)

  def _behind(self, context: str, continuation: str) -> tuple[list[int], int]:
    """(the tokens of both, the first of the continuation); that one may have letters of the context before its own."""
    words = context.rstrip()  # a tokenizer joins a space with the word behind it
    continuation = context[len(words) :] + continuation
    whole, before = self._tokens(words + continuation), self._tokens(words)
    common = len(os.path.commonprefix([whole, before]))  # of lists too
    first = min(common, len(whole) - 1) if continuation else len(whole)
    return [self._tokenizer.bos, *whole], 1 + first

  def _texts(self, asked: list[tuple[str]]) -> list[Score]:
    return self._told([[*self._rows([self._tokenizer.bos, *self._tokens(text)], 1)] for (text,) in asked])

  def _rows(self, tokens: list[int], first: int) -> Iterator[Row]:
    """Rows that tell every token from `first` on once."""
    while first < len(tokens):
      begin = max(first - self._width // 2, 0)
      end = min(begin + self._width, len(tokens))
      yield tokens[begin:end], first - begin
      first = end

  def _told(self, asked: list[list[Row]]) -> list[Score]:
    """What the rows of each text say together."""
    scores = iter(self._score([row for rows in asked for row in rows]))
    parts = [[next(scores) for _ in rows] for rows in asked]
    both = lambda of: (float(sum(nats for nats, _ in of)), all(right for _, right in of))
    return [{depth: both([part[depth] for part in one]) for depth in self.depths} for one in parts]

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """The text up to the first of a task's stop strings. What is asked several times is drawn anew each time."""
    out, times = [], collections.Counter()
    for i in range(0, len(requests), self._batch_size):
      group, asked = [request.args for request in requests[i : i + self._batch_size]], []
      for context, options in group:
        asked.append(self._request(context, options, times[context]))
        times[context] += 1
      for (_, options), answer in zip(group, self._engine.answer(asked), strict=True):
        until = options.get('until') or []
        out.append(text_of(self._tokenizer, answer, tuple([until] if isinstance(until, str) else until))[0])
    return out

  def _request(self, context: str, options: dict, seed: int):
    """options: of a task. One that gives a temperature alone draws too, as with the harness's own models."""
    drawn = options.get('do_sample', float(options.get('temperature', 0.0)) > 0)
    rule = {'temperature': float(options.get('temperature', 1.0)), 'seed': seed}
    rule |= {name: kind(options[name]) for name, kind in _SAMPLING.items() if name in options}
    return request_of(
      self._tokenizer,
      context,
      depth=self.depth,
      exit=self._exit,
      max_new_tokens=int(next((options[name] for name in _MOST_TOKENS if name in options), _NEW_TOKENS)),
      **(rule if drawn else {}),
    )

  def _tokens(self, text: str) -> list[int]:
    return self._tokenizer.encode([text])[0].tolist()

  def _score(self, asked: list[Row]) -> list[Score]:
    """Nats and greediness of tokens[first:] of each row, each given those before it."""
    out = []
    for i in range(0, len(asked), self._batch_size):
      rows = asked[i : i + self._batch_size]
      tokens_BT = np.zeros((self._batch_size, round_up(max(len(tokens) for tokens, _ in rows))), np.int32)
      for row, (tokens, _) in zip(tokens_BT, rows, strict=False):
        row[: len(tokens)] = tokens
      gaps_R = np.diff(np.array((0, *self.depths), np.int32))
      with jax.set_mesh(self._engine.mesh):
        nats_RBT, right_RBT = jax.device_get(_read(self._engine.model, self._engine.params, tokens_BT, gaps_R))
      for b, (tokens, first) in enumerate(rows):
        told = slice(first - 1, len(tokens) - 1)
        each = zip(self.depths, nats_RBT[:, b, told], right_RBT[:, b, told], strict=True)
        out.append({depth: (float(nats_T.sum()), bool(right_T.all())) for depth, nats_T, right_T in each})
    return out


@functools.partial(jax.jit, static_argnames='model')
def _read(model: Model, params: Params, tokens_BT: jax.Array, gaps_R: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(log p of each next token, whether it is the best one), both [R, B, T - 1]; gaps_R: from depth to depth."""
  B, T = tokens_BT.shape
  rows = Rows(jnp.broadcast_to(jnp.arange(T), (B, T)), None)
  e_BTD = model.embed_input(params, tokens_BT, rows)

  def read(s_BTD):
    log_p_BTV = jax.nn.log_softmax(model.scores(params, model.apply_coda(params, s_BTD, rows))[:, :-1])
    log_p_BT = jnp.take_along_axis(log_p_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    return log_p_BT, jnp.argmax(log_p_BTV, axis=-1) == tokens_BT[:, 1:]

  s_BTD = model.init_state(jax.random.key(0), jnp.zeros((B,), jnp.int32), T)  # the same noise for every text
  return jax.lax.map(read, states_at(model, params, s_BTD, e_BTD, rows, gaps_R))


def _depths_of(depth: object, depths: object, mean: int) -> tuple[int, ...]:
  """Ascending, of depth=4 or depths=1:4:8; raises BadInput."""
  if depth is not None and depths is not None:
    raise BadInput(f'--model_args depth={depth},depths={depths}: give one of the two')
  name, value = ('depth', depth) if depths is None else ('depths', depths)
  parts = str(value).split(':') if name == 'depths' else [str(mean if value is None else value)]
  found, most = {count_of(part) or 0 for part in parts}, deepest(mean)
  if min(found) < 1 or max(found) > most:
    raise BadInput(f'--model_args {name}={value}: no depth from 1 to {most}; give one, several as depths=1:4:8')
  return tuple(sorted(found))


def _batch_size_of(value: object) -> int:
  """Of --batch_size, which may also be auto, or auto:N; raises BadInput."""
  rows = _BATCH_SIZE if str(value).partition(':')[0] == 'auto' else count_of(str(value)) or 0
  if not 1 <= rows <= _MOST_ROWS:
    raise BadInput(f'--batch_size={value}: no number from 1 to {_MOST_ROWS}; give one, or auto, which is {_BATCH_SIZE}')
  return rows


def by_depth(evaluate: Callable) -> Callable:
  """lm_eval.simple_evaluate that answers depths=1:4:8 with every task three times, as task_depth_1 and so on.

  One model serves all of them, so that only what is generated is computed again.
  """

  @functools.wraps(evaluate)
  def run(model: Any, model_args: Any = None, batch_size: Any = None, **options: Any) -> dict[str, Any] | None:
    if model != _NAME or 'depths' not in (model_args or {}):
      return evaluate(model=model, model_args=model_args, batch_size=batch_size, **options)
    lm = get_model(_NAME).create_from_arg_obj(model_args, {'batch_size': batch_size})
    merged: dict[str, Any] = {}
    for depth in lm.depths:
      lm.depth = depth
      label = f'_depth_{depth:0{len(str(lm.depths[-1]))}d}'
      cache = options.get('use_cache') and f'{options["use_cache"]}{label}'  # whose key knows no depth
      found = evaluate(model=lm, batch_size=batch_size, **{**options, 'use_cache': cache})
      merged |= {key: merged.get(key, {}) | _renamed(key, found[key], label) for key in found.keys() & {*_BY_TASK}}
      groups = {group + label: [task + label for task in tasks] for group, tasks in found['group_subtasks'].items()}
      merged['group_subtasks'] = merged.get('group_subtasks', {}) | groups
      merged = {**found, **merged}
    return merged

  return run


def _renamed(key: str, by_task: dict[str, Any], label: str) -> dict[str, Any]:
  """Names with the depth behind them, also as a table shows them."""
  named = {task + label: value for task, value in by_task.items()}
  if key in ('results', 'groups'):
    named = {task: {**values, 'alias': values['alias'] + label} for task, values in named.items()}
  return named
