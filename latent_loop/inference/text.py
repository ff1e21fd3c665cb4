"""Text around the engine: prompts to requests, answers to text, stop strings."""

from typing import Any

from latent_loop.errors import BadInput
from latent_loop.inference.engine import Answer, Request
from latent_loop.tokenizer import Tokenizer

_BROKEN = '\ufffd'  # what a decoder shows for bytes that are no whole character


def request_of(tokenizer: Tokenizer, prompt: str, **options: Any) -> Request:
  """The request for what follows `prompt`; options as in Request. Raises BadInput."""
  try:
    (tokens,) = tokenizer.encode([prompt])
  except UnicodeEncodeError as error:
    raise BadInput(f'--prompt: not UTF-8 text ({error}); write it in UTF-8') from error
  return Request((tokenizer.bos, *tokens.tolist()), stops=(tokenizer.eos,), **options)


def text_of(tokenizer: Tokenizer, answer: Answer, stops: tuple[str, ...] = ()) -> tuple[str, str | None]:
  """(the text up to the first of the stop strings, the finish: 'stop' once one is found).

  While more may come, a character that is not whole yet is held back.
  """
  text = tokenizer.decode(answer.tokens)
  if answer.finish is None:
    text = text.rstrip(_BROKEN)
  ends = [at for stop in stops if (at := text.find(stop)) >= 0]
  return (text[: min(ends)], 'stop') if ends else (text, answer.finish)
