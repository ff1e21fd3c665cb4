"""Bodies of requests to what the board is asked: every field by its type, everything else refused in a sentence."""

import dataclasses
import json
import secrets
from typing import Any

from latent_loop.config.rules import LARGEST
from latent_loop.errors import BadInput
from latent_loop.inference.engine import ExitRule, Request
from latent_loop.inference.text import request_of
from latent_loop.tokenizer import Tokenizer, messages

_MAX_TOKENS = 128  # of an answer, where the request does not say
_MAX_STOP_STRINGS = 8

NUMBER, WHOLE, TEXT, FLAG, LIST, OBJECT = (int, float), (int,), (str,), (bool,), (list,), (dict,)
_BOTH = {
  'model': TEXT,
  'max_tokens': WHOLE,
  'temperature': NUMBER,
  'top_p': NUMBER,
  'n': WHOLE,
  'stream': FLAG,
  'stream_options': OBJECT,
  'stop': (str, list),
  'seed': WHOLE,
  'presence_penalty': NUMBER,
  'frequency_penalty': NUMBER,
  'user': TEXT,
  # Beyond OpenAI's.
  'depth': WHOLE,
  'exit': TEXT,
  'warm_start': FLAG,
  'top_k': WHOLE,
  'min_p': NUMBER,
  'repetition_penalty': NUMBER,
}
COMPLETION = {**_BOTH, 'prompt': (str, list), 'logprobs': WHOLE, 'echo': FLAG, 'best_of': WHOLE}
CHAT = {**_BOTH, 'messages': LIST, 'logprobs': FLAG, 'top_logprobs': WHOLE, 'max_completion_tokens': WHOLE}
# Fields of OpenAI's that are taken only with the value that changes nothing.
_ONLY = {
  'n': 1,
  'best_of': 1,
  'echo': False,
  'presence_penalty': 0,
  'frequency_penalty': 0,
  'top_logprobs': 0,
}
_NAMES = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'a text',
  list: 'a list',
  dict: 'an object',
}


class NoSuchModel(BadInput):
  """The model that was named is not the one here."""


@dataclasses.dataclass(frozen=True)
class Asked:
  """A request with what HTTP adds: stops are texts that end the answer."""

  request: Request
  stops: tuple[str, ...]
  stream: bool
  include_usage: bool
  log_probs: bool


@dataclasses.dataclass(frozen=True)
class Limits:
  """What there is. depth: where a request does not say. max_total_tokens: of a prompt and its answer."""

  model: str
  depth: int
  max_depth: int
  max_total_tokens: int


def parse(body: bytes, known: dict[str, tuple[type, ...]]) -> dict[str, Any]:
  """The fields that are given, by type; raises BadInput."""
  try:
    values = json.loads(body)
  except (ValueError, RecursionError) as error:
    raise BadInput(f'the body is not JSON ({error}); send an object such as {{"prompt": "..."}}') from error
  if not isinstance(values, dict):
    raise BadInput('the body is no object; send one such as {"prompt": "..."}')
  values = {key: value for key, value in values.items() if value is not None}
  for key, value in values.items():
    if key not in known:
      raise BadInput(f'{key!r}: this server has no such field; it has {", ".join(sorted(known))}')
    kinds = known[key]
    if type(value) not in kinds:
      wanted = ' or '.join(_NAMES[kind] for kind in kinds if kinds != NUMBER or kind is float)
      raise BadInput(f'{key}={_short(value)}: the rule is {wanted}')
    if key in _ONLY and value != _ONLY[key]:
      raise BadInput(f'{key}={_short(value)}: this server knows only {json.dumps(_ONLY[key])}; leave it out')
  return values


def asked_of(values: dict[str, Any], tokenizer: Tokenizer, limits: Limits) -> Asked:
  """What the fields of either route ask for; raises BadInput, NoSuchModel."""
  if values.get('model', limits.model) != limits.model:
    raise NoSuchModel(f'model={_short(values["model"])}: the one model here is {limits.model!r}')
  chat = 'messages' in values
  tokens = messages.prompt_of(tokenizer, _messages(values['messages'])) if chat else _prompt(values, tokenizer)
  request = _request(values, tokens, tokenizer, limits)
  options = values.get('stream_options', {})
  for key in options.keys() - {'include_usage'}:
    raise BadInput(f'stream_options: it has include_usage, not {key!r}; leave that out')
  usage = options.get('include_usage', False)
  if type(usage) is not bool:
    raise BadInput(f'stream_options.include_usage={_short(usage)}: the rule is true or false')
  stops = _stops(values) + (messages.stops_of(tokenizer) if chat else ())
  log_probs = values.get('logprobs')
  if not chat and log_probs is not None and log_probs not in (0, 1):
    raise BadInput(f'logprobs={log_probs}: this server tells those of the chosen tokens only; give 1, or leave it out')
  return Asked(request, stops, values.get('stream', False), usage, log_probs is not None and log_probs is not False)


def _request(values: dict[str, Any], tokens: tuple[int, ...], tokenizer: Tokenizer, limits: Limits) -> Request:
  most = values.get('max_completion_tokens', values.get('max_tokens'))
  if most is None:
    most = max(1, min(_MAX_TOKENS, limits.max_total_tokens - len(tokens)))
  names = ('top_p', 'warm_start', 'top_k', 'min_p', 'repetition_penalty')
  temperature = values.get('temperature', 1.0)
  # As OpenAI's: who samples and gives no seed wants another answer each time.
  seed = values.get('seed', secrets.randbelow(LARGEST) if temperature else 0)
  return Request(
    tokens,
    depth=values.get('depth', limits.depth),
    max_new_tokens=most,
    exit=ExitRule.parse(values.get('exit', 'none')),
    temperature=temperature,
    seed=seed,
    stops=tokenizer.ends,
    **{name: values[name] for name in names if name in values},
  )


def _prompt(values: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
  prompt = values.get('prompt')
  if prompt is None:
    raise BadInput('prompt is missing; give a text')
  if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
    (prompt,) = prompt
  if isinstance(prompt, str):
    return request_of(tokenizer, prompt, depth=1).tokens
  if not all(type(token) is int for token in prompt):
    raise BadInput('prompt: the rule is one text, or one list of token ids; send a request for each of several prompts')
  return tuple(prompt)


def _messages(given: list) -> list[dict[str, str]]:
  if not given:
    raise BadInput('messages is empty; give at least {"role": "user", "content": "..."}')
  for i, one in enumerate(given):
    if not isinstance(one, dict) or not isinstance(one.get('content'), str) or one.get('role') not in messages.ROLES:
      raise BadInput(
        f'messages[{i}]={_short(one)}: the rule is an object with a role, one of {", ".join(messages.ROLES)}, and a '
        'text as its content'
      )
  return given


def _stops(values: dict[str, Any]) -> tuple[str, ...]:
  stops = values.get('stop', [])
  stops = [stops] if isinstance(stops, str) else stops
  if len(stops) > _MAX_STOP_STRINGS or not all(isinstance(stop, str) and stop for stop in stops):
    raise BadInput(f'stop={_short(stops)}: the rule is a text, or a list of up to {_MAX_STOP_STRINGS}, none empty')
  return tuple(stops)


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 60 else text[:60] + '...'
