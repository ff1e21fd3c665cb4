"""The form of a chat, for training on one and for asking: the one place that knows it.

Where the tokenizer has tokens for it, the template of arXiv 2502.05171: <|begin_header|>role<|end_header|>, two line
breaks, what was said, <|end_turn|>; the assistant is called Huginn. Elsewhere lines of plain text, `role: words`.
"""

import numpy as np

from latent_loop.errors import BadInput
from latent_loop.tokenizer import Tokenizer

ROLES = ('system', 'user', 'assistant')
# Where a tokenizer has no tokens for a chat, the next speaker's name ends the answer.
STOPS = ('\nuser:', '\nsystem:')
_NAMES = {'assistant': 'Huginn'}  # in the template

Message = dict[str, str]  # 'role', 'content'
Piece = tuple[np.ndarray, bool]  # tokens; whether the assistant says them


def stops_of(tokenizer: Tokenizer) -> tuple[str, ...]:
  """The texts that end an assistant's turn; none where a token of its own does."""
  return STOPS if tokenizer.chat is None else ()


def prompt_of(tokenizer: Tokenizer, messages: list[Message]) -> tuple[int, ...]:
  """The tokens of the messages and the beginning of the assistant's turn; raises BadInput."""
  pieces = [*_begin(tokenizer), *(piece for one in _turns(tokenizer, messages) for piece in one)]
  pieces.append((_head(tokenizer, 'assistant'), False))
  return tuple(np.concatenate([tokens for tokens, _ in pieces]).tolist())


def conversation_of(tokenizer: Tokenizer, messages: list[Message]) -> tuple[np.ndarray, np.ndarray]:
  """(tokens, which of them the assistant says: those a fine-tuned model is to predict), both [T]; raises BadInput.

  What ends an assistant's turn counts as said: <|end_turn|>, or in plain text the name of who speaks next.
  """
  pieces, after_answer = _begin(tokenizer), False
  for message, turn in zip(messages, _turns(tokenizer, messages), strict=True):
    (head, _), *rest = turn
    pieces += [(head, after_answer and tokenizer.chat is None), *rest]
    after_answer = message['role'] == 'assistant'
  pieces.append((np.array([tokenizer.eos]), after_answer and tokenizer.chat is None))
  tokens = np.concatenate([tokens for tokens, _ in pieces]).astype(np.int32)
  return tokens, np.concatenate([np.full(len(tokens), said) for tokens, said in pieces])


def _begin(tokenizer: Tokenizer) -> list[Piece]:
  return [(np.array([tokenizer.bos]), False)]


def _turns(tokenizer: Tokenizer, messages: list[Message]) -> list[list[Piece]]:
  """The head and the body of every message."""
  turns = []
  for message in messages:
    said, role = message['content'].strip(), message['role']
    if tokenizer.chat is None:
      body = _encode(tokenizer, f' {said}\n')
    else:
      body = np.concatenate([_encode(tokenizer, said), [tokenizer.chat.end_turn]])
    turns.append([(_head(tokenizer, role), False), (body, role == 'assistant')])
  return turns


def _head(tokenizer: Tokenizer, role: str) -> np.ndarray:
  if tokenizer.chat is None:
    return _encode(tokenizer, f'{role}:')
  begin, end = tokenizer.chat.begin_header, tokenizer.chat.end_header
  return np.concatenate([[begin], _encode(tokenizer, _NAMES.get(role, role)), [end], _encode(tokenizer, '\n\n')])


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
  try:
    (tokens,) = tokenizer.encode([text])
  except UnicodeEncodeError as error:
    raise BadInput(f'messages: not UTF-8 text ({error}); write them in UTF-8') from error
  return tokens.astype(np.int32)
