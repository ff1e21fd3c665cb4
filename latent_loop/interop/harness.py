"""A run as a model of lm-eval-harness: --model latent_loop --model_args workdir=DIR,depth=N,exit=RULE"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from latent_loop import trained
from latent_loop.data import make_tokenizer
from latent_loop.errors import BadInput
from latent_loop.inference.engine import ExitRule, round_up
from latent_loop.inference.text import request_of, text_of
from latent_loop.model import Model, Params
from latent_loop.model.layers import Rows

_NEW_TOKENS = 256  # of an answer, where a task does not say


@register_model('latent_loop')
class LatentLoop(LM):
  """depth: iterations per token, the mean of training where it is not given. exit: of generated tokens, as in
  launch.generate; a text that is scored takes `depth` for every token. Raises BadInput.
  """

  def __init__(self, workdir: str, depth: int | None = None, exit: str = 'none', batch_size: int = 8, **_: object):
    super().__init__()
    found = trained.load(Path(workdir))
    self._engine, self._tokenizer = trained.engine_of(found), make_tokenizer(found.config.data)
    self._depth, self._exit = int(depth or found.config.depth.mean), ExitRule.parse(exit)
    if self._depth < 1:
      raise BadInput(f'--model_args depth={depth}: the core runs at least once; give 1 or more')
    self._batch_size, self._width = int(batch_size), found.config.data.seq_len

  def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """(nats of the continuation, whether greedy decoding would give it), the context cut at its left to fit a row."""
    pairs = []
    for request in requests:
      context, continuation = request.args
      whole, start = self._tokens(context + continuation), len(self._tokens(context))
      pairs.append(([self._tokenizer.bos, *whole], 1 + min(start, len(whole))))
    return self._score(pairs)

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Nats of a whole text; one longer than a row is read in rows whose first half is context already scored."""
    out = []
    for request in requests:
      tokens, pairs, at = [self._tokenizer.bos, *self._tokens(request.args[0])], [], 1
      while at < len(tokens):
        begin = 0 if at == 1 else max(at - self._width // 2, 0)
        end = min(begin + self._width, len(tokens))
        pairs.append((tokens[begin:end], at - begin))
        at = end
      out.append(sum(nats for nats, _ in self._score(pairs)))
    return out

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """The text up to the first of a task's stop strings."""
    out = []
    for i in range(0, len(requests), self._batch_size):
      group = [request.args for request in requests[i : i + self._batch_size]]
      asked = [self._request(context, options) for context, options in group]
      for (_, options), answer in zip(group, self._engine.answer(asked), strict=True):
        until = options.get('until') or []
        out.append(text_of(self._tokenizer, answer, tuple([until] if isinstance(until, str) else until))[0])
    return out

  def _request(self, context: str, options: dict):
    drawn = options.get('do_sample', False)
    return request_of(
      self._tokenizer,
      context,
      depth=self._depth,
      exit=self._exit,
      max_new_tokens=int(options.get('max_gen_toks', _NEW_TOKENS)),
      temperature=float(options.get('temperature', 1.0)) if drawn else 0.0,
    )

  def _tokens(self, text: str) -> list[int]:
    return self._tokenizer.encode([text])[0].tolist()

  def _score(self, pairs: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """For (tokens, first): (nats, all greedy) of tokens[first:], each given those before it."""
    out = []
    for i in range(0, len(pairs), self._batch_size):
      rows = [(tokens[-self._width :], max(first - max(len(tokens) - self._width, 0), 1))
              for tokens, first in pairs[i : i + self._batch_size]]  # fmt: skip
      tokens_BT = np.zeros((self._batch_size, round_up(max(len(tokens) for tokens, _ in rows))), np.int32)
      for row, (tokens, _) in zip(tokens_BT, rows, strict=False):
        row[: len(tokens)] = tokens
      with jax.set_mesh(self._engine.mesh):
        scores = jax.device_get(_read(self._engine.model, self._engine.params, tokens_BT, np.int32(self._depth)))
      for nats_T, right_T, (tokens, first) in zip(*scores, rows, strict=False):
        told = slice(first - 1, len(tokens) - 1)
        out.append((float(nats_T[told].sum()), bool(right_T[told].all())))
    return out


@functools.partial(jax.jit, static_argnames='model')
def _read(model: Model, params: Params, tokens_BT: jax.Array, depth: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(log p of each next token, whether it is the best one), both [B, T - 1]."""
  B, T = tokens_BT.shape
  rows = Rows(jnp.broadcast_to(jnp.arange(T), (B, T)), None)
  s_BTD = model.init_state(jax.random.key(0), jnp.zeros((B,), jnp.int32), T)  # the same noise for every text
  s_BTD = model.advance(params, s_BTD, model.embed_input(params, tokens_BT, rows), rows, depth)
  log_p_BTV = jax.nn.log_softmax(model.scores(params, model.apply_coda(params, s_BTD, rows))[:, :-1])
  log_p_BT = jnp.take_along_axis(log_p_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
  return log_p_BT, jnp.argmax(log_p_BTV, axis=-1) == tokens_BT[:, 1:]
