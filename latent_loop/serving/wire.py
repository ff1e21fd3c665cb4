"""Answers as OpenAI writes them: whole or as a stream of chunks, of the completions route or of the chat's."""

import json
import time
import uuid
from typing import Any

from latent_loop.inference.engine import Answer
from latent_loop.inference.text import Typist
from latent_loop.metrics import finite
from latent_loop.serving.fields import Asked
from latent_loop.tokenizer import Tokenizer


class Writer:
  """One answer on its way out. chat: of which route."""

  def __init__(self, chat: bool, model: str, asked: Asked, tokenizer: Tokenizer):
    kind = 'chat.completion' if chat else 'text_completion'
    self._chat, self._asked, self._tokenizer = chat, asked, tokenizer
    name = f'{"chatcmpl" if chat else "cmpl"}-{uuid.uuid4().hex}'
    self._head = {'id': name, 'object': kind, 'created': int(time.time()), 'model': model}
    self._typist, self._pieces, self._opened = Typist(tokenizer, asked.stops), [], False
    self._answer: Answer | None = None

  @property
  def finish(self) -> str | None:
    return self._typist.finish

  def read(self, answer: Answer) -> list[tuple[str, int]]:
    """The pieces that are new."""
    self._answer = answer
    new = self._typist.read(answer)
    self._pieces += new
    return new

  def whole(self) -> dict[str, Any]:
    text = ''.join(piece for piece, _ in self._pieces)
    choice = {'index': 0, 'finish_reason': self.finish, **self._log_probs(self._pieces), **self._depths(self._pieces)}
    choice |= {'message': {'role': 'assistant', 'content': text}} if self._chat else {'text': text}
    return {**self._head, 'choices': [choice], 'usage': self.usage()}

  def chunk(self, pieces: list[tuple[str, int]]) -> dict[str, Any]:
    """Of a stream: this text, and the finish where there is one."""
    text = ''.join(piece for piece, _ in pieces)
    choice = {'index': 0, 'finish_reason': self.finish, **self._log_probs(pieces), **self._depths(pieces)}
    if self._chat:
      role = {} if self._opened else {'role': 'assistant'}
      choice['delta'] = {**role, 'content': text}
    else:
      choice['text'] = text
    self._opened = True
    return self._chunk([choice])

  def last_chunk(self) -> dict[str, Any]:
    """Of a stream that was asked to include the usage."""
    return {**self._chunk([]), 'usage': self.usage()}

  def usage(self) -> dict[str, Any]:
    prompt, count = len(self._asked.request.tokens), self._typist.tokens
    total = sum(self._answer.depths[:count])
    return {
      'prompt_tokens': prompt,
      'completion_tokens': count,
      'total_tokens': prompt + count,
      'iterations': total,
      'mean_depth': total / count,
    }

  def _chunk(self, choices: list) -> dict[str, Any]:
    kind = 'chat.completion.chunk' if self._chat else 'text_completion'
    return {**self._head, 'object': kind, 'choices': choices}

  def _depths(self, pieces: list[tuple[str, int]]) -> dict[str, Any]:
    """Beyond OpenAI's: the text of each token, '' where it only begins a character, with its iterations."""
    return {'depths': [[piece, self._answer.depths[i]] for piece, i in pieces]}

  def _log_probs(self, pieces: list[tuple[str, int]]) -> dict[str, Any]:
    if not self._asked.log_probs:
      return {'logprobs': None}
    values = [self._answer.log_probs[i] for _, i in pieces]
    texts = [piece for piece, _ in pieces]
    if self._chat:
      one = lambda text, value: {'token': text, 'logprob': value, 'bytes': list(text.encode()), 'top_logprobs': []}
      return {'logprobs': {'content': [one(text, value) for text, value in zip(texts, values, strict=True)]}}
    return {'logprobs': {'tokens': texts, 'token_logprobs': values, 'text_offset': None, 'top_logprobs': None}}


def to_json(value: Any) -> bytes:
  """ASCII, whatever a client wrote; null for a number that is not finite."""
  return json.dumps(finite(value)).encode()


def event(value: Any) -> bytes:
  """A server-sent event."""
  return b'data: ' + to_json(value) + b'\n\n'


def error_body(sentence: str, status: int) -> dict[str, Any]:
  kinds = {429: 'rate_limit_error', 404: 'not_found_error'}
  kind = kinds.get(status, 'invalid_request_error' if status < 500 else 'server_error')
  return {'error': {'message': sentence, 'type': kind, 'param': None, 'code': None}}
