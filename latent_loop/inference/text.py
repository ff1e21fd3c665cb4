"""Text around the engine: prompts to requests, answers to text, stop strings."""

import dataclasses
from typing import Any

from latent_loop.errors import BadInput
from latent_loop.inference.engine import Answer, Request
from latent_loop.metrics import finite
from latent_loop.tokenizer import Tokenizer

_BROKEN = '\ufffd'  # what a decoder shows for bytes that are no whole character


def request_of(tokenizer: Tokenizer, prompt: str, **options: Any) -> Request:
  """The request for what follows `prompt`; options as in Request. Raises BadInput."""
  try:
    (tokens,) = tokenizer.encode([prompt])
  except UnicodeEncodeError as error:
    raise BadInput(f'--prompt: not UTF-8 text ({error}); write it in UTF-8') from error
  return Request((tokenizer.bos, *tokens.tolist()), stops=tokenizer.ends, **options)


def text_of(tokenizer: Tokenizer, answer: Answer, stops: tuple[str, ...] = ()) -> tuple[str, str | None]:
  """(the text up to the stop string that is complete first, the finish: 'stop' once one is found).

  While more may come, a character that is not whole yet is held back.
  """
  text, end = _up_to_stop(tokenizer, answer, stops)
  return text, answer.finish if end is None else 'stop'


def in_json(tokenizer: Tokenizer, answer: Answer, stops: tuple[str, ...] = ()) -> dict[str, Any]:
  """The text as of `text_of` and the answer up to the token that completes its stop string, as JSON can write it."""
  (text, finish), count = text_of(tokenizer, answer, stops), len(answer.tokens)
  if _up_to_stop(tokenizer, answer, stops)[1] is not None:
    typist = Typist(tokenizer, stops)  # only here: it decodes up to every token
    typist.read(answer)
    count = typist.tokens
  by_token = {name: vars(answer)[name][:count] for name in ('tokens', 'log_probs', 'depths')}
  return finite({'text': text, **dataclasses.asdict(answer), **by_token, 'finish': finish})


def _up_to_stop(tokenizer: Tokenizer, answer: Answer, stops: tuple[str, ...]) -> tuple[str, int | None]:
  """(the text, where its stop string ends)."""
  text = tokenizer.decode(answer.tokens)
  if answer.finish is None:
    text = text.rstrip(_BROKEN)
  found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
  if not found:
    return text, None
  end, at = min(found)  # the one that ends first is that which a stream meets first
  return text[:at], end


class Typist:
  """An answer as it comes, in pieces of text that nothing later can change.

  A character that is not whole yet is held back, and so are letters that may begin a stop string.
  """

  def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()):
    self.finish: str | None = None  # 'stop' also once a stop string is found
    self.tokens = 0  # read so far, none behind a stop string
    self._tokenizer, self._stops = tokenizer, stops
    self._held = max((len(stop) - 1 for stop in stops), default=0)
    self._shown, self._told, self._ends = 0, 0, []

  def read(self, answer: Answer) -> list[tuple[str, int]]:
    """(text, index) of every new token, '' where it only begins a character. answer: all so far."""
    for i in range(len(self._ends), len(answer.tokens)):
      self._ends.append(len(self._tokenizer.decode(answer.tokens[: i + 1]).rstrip(_BROKEN)))
    text, stop_end = _up_to_stop(self._tokenizer, answer, self._stops)
    self.finish, self.tokens = answer.finish, len(answer.tokens)
    if stop_end is not None:
      self.finish = 'stop'
      self.tokens = next((i for i, end in enumerate(self._ends, 1) if end >= stop_end), self.tokens)
    safe = len(text) if self.finish else max(len(text) - self._held, self._shown)
    pieces = []
    while self._told < self.tokens and (self.finish or self._ends[self._told] <= safe):
      last = self.finish and self._told == self.tokens - 1
      end = safe if last else max(min(self._ends[self._told], safe), self._shown)  # what stays broken is the last one's
      pieces.append((text[self._shown : end], self._told))
      self._shown, self._told = end, self._told + 1
    return pieces
