"""A chat in a terminal: the background of every token shows how long the model thought about it."""

import sys
from collections.abc import Callable

from latent_loop.errors import BadInput
from latent_loop.inference.engine import Engine, Request
from latent_loop.inference.text import Typist
from latent_loop.tokenizer import Tokenizer, messages

_HINT = 'Ctrl-C stops an answer, /new forgets what was said, /quit or Ctrl-D leaves.'
_LIGHTEST, _STEPS = 255, 14  # of the 24 greys among 256 colours, the lighter ones


def chat(
  engine: Engine, tokenizer: Tokenizer, make: Callable[[tuple[int, ...]], Request], stops: tuple[str, ...], shade: bool
) -> None:
  """Reads lines until the end of the input. make: the request for a prompt's tokens."""
  print(_HINT)
  said: list[dict[str, str]] = []
  while True:
    try:
      line = input('> ').strip()
    except KeyboardInterrupt:
      print(f'\n{_HINT}')
      continue
    except EOFError:
      print()
      return
    if line == '/quit':
      return
    if line == '/new':
      said = []
    elif line.startswith('/'):
      print(f'{line.split()[0]}: no command of this chat. {_HINT} Depth and exit are flags of launch.generate.')
    elif line:
      said.append({'role': 'user', 'content': line})
      try:
        request = make(messages.prompt_of(tokenizer, said))
        said.append({'role': 'assistant', 'content': _answer(engine, tokenizer, request, stops, shade)})
      except BadInput as error:
        said.pop()
        print(f'error: {error}; /new forgets what was said', file=sys.stderr)


def _answer(engine: Engine, tokenizer: Tokenizer, request: Request, stops: tuple[str, ...], shade: bool) -> str:
  """What was said, until the end or Ctrl-C."""
  typist, text, depths = Typist(tokenizer, (*stops, *messages.stops_of(tokenizer))), '', []
  try:
    for (answer,) in engine.stream([request]):
      pieces, depths = typist.read(answer), answer.depths[: typist.tokens]
      for piece, i in pieces:
        text += piece
        print(shaded(piece, depths[i], request.depth) if shade else _harmless(piece), end='', flush=True)
      if typist.finish:
        break
  except KeyboardInterrupt:
    pass
  if depths:
    print(f'\n[{len(depths)} tokens, {sum(depths) / len(depths):.1f} of {request.depth} iterations each on average]')
  return text


def shaded(piece: str, depth: int, most: int) -> str:
  """The piece in black on a grey that is the darker, the deeper its token went."""
  grey = _LIGHTEST - round(_STEPS * (depth - 1) / max(most - 1, 1))
  lines = _harmless(piece).split('\n')
  return '\n'.join(f'\033[38;5;16;48;5;{grey}m{line}\033[0m' if line else '' for line in lines)


def _harmless(piece: str) -> str:
  """Nothing that a terminal obeys, but for line breaks and tabs."""
  return ''.join(letter if letter.isprintable() or letter in '\n\t' else repr(letter)[1:-1] for letter in piece)
