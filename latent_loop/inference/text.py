"""Text around the engine: prompts to requests, answers to text, stop strings."""

import codecs
from typing import Any

from latent_loop.data import tokenizer
from latent_loop.errors import BadInput
from latent_loop.inference.engine import Answer, Request


def request_of(prompt: str, **options: Any) -> Request:
  """The request for what follows `prompt`; options as in Request. Raises BadInput."""
  try:
    tokens = tokenizer.encode(prompt).tolist()
  except UnicodeEncodeError as error:
    raise BadInput(f'--prompt: not UTF-8 text ({error}); write it in UTF-8') from error
  return Request((tokenizer.BOS, *tokens), stops=(tokenizer.EOS,), **options)


def text_of(answer: Answer, stops: tuple[str, ...] = ()) -> tuple[str, str | None]:
  """(the text up to the first of the stop strings, the finish: 'stop' once one is found).

  While more may come, bytes of a character that is not whole yet are held back.
  """
  whole = codecs.getincrementaldecoder('utf-8')(errors='replace')
  text = whole.decode(bytes(token for token in answer.tokens if token < 256), final=answer.finish is not None)
  ends = [at for stop in stops if (at := text.find(stop)) >= 0]
  return (text[: min(ends)], 'stop') if ends else (text, answer.finish)
