"""Messages of a chat to the tokens that a model continues: the one place that knows a chat's form."""

from latent_loop.errors import BadInput
from latent_loop.tokenizer import Tokenizer

ROLES = ('system', 'user', 'assistant')
# Where a tokenizer has no tokens for a chat, the next speaker's name ends the answer.
STOPS = ('\nuser:', '\nsystem:')


def prompt_of(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> tuple[int, ...]:
  """The tokens of the messages, {'role', 'content'} each, and the beginning of the assistant's turn; BadInput."""
  text = ''.join(f'{message["role"]}: {message["content"].strip()}\n' for message in messages) + 'assistant:'
  try:
    (tokens,) = tokenizer.encode([text])
  except UnicodeEncodeError as error:
    raise BadInput(f'messages: not UTF-8 text ({error}); write them in UTF-8') from error
  return (tokenizer.bos, *tokens.tolist())
