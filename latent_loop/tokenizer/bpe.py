"""Tokenizers in a tokenizer.json of the `tokenizers` library: reading one, training one.

The preset is that of arXiv 2502.05171: byte-level BPE, digits and punctuation isolated, no token above 32 bytes, 36
special tokens at the top of the vocabulary.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latent_loop import optional, storage
from latent_loop.errors import BadInput

BOS, EOS, PAD = '<|begin_text|>', '<|end_text|>', '<|pad|>'
CHAT = ('<|begin_header|>', '<|end_header|>', '<|end_turn|>')
# The reference has ten operator tokens more, whose names it does not publish; their places are reserved here.
SPECIAL_TOKENS = (
  BOS, EOS, *CHAT, PAD,
  '<|fim_prefix|>', '<|fim_middle|>', '<|fim_suffix|>', '<|fim_pad|>', '<|...|>', '<|del|>',
  *(f'<|c_{i}|>' for i in range(10)), *(f'<|reserved_{i}|>' for i in range(10)),
  '<|tool_out|>', '<|end_tool|>', '<|tool_in|>', '<|end_tool_in|>',
)  # fmt: skip
CHAT_TEMPLATE = (
  "{{ bos_token }}{% for message in messages %}"
  "{% set role = 'Huginn' if message['role'] == 'assistant' else message['role'] %}"
  "{{ '<|begin_header|>' + role + '<|end_header|>\\n\\n' }}"
  "{% if message['role'] == 'assistant' %}"
  "{% generation %}{{ message['content'] | trim }}<|end_turn|>{% endgeneration %}"
  "{% else %}{{ message['content'] | trim }}<|end_turn|>{% endif %}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|begin_header|>Huginn<|end_header|>\\n\\n' }}{% else %}{{ eos_token }}{% endif %}"
)  # fmt: skip
_MAX_TOKEN_BYTES = 32
# What others call the same, in the order of preference. A tokenizer without a begin uses its end, as GPT-2 does.
_NAMES = {
  'bos': (BOS, '<|begin_of_text|>', '<s>', '<bos>', '[CLS]', '<|endoftext|>'),
  'eos': (EOS, '<|end_of_text|>', '</s>', '<eos>', '[SEP]', '<|endoftext|>'),
  'pad': (PAD, '<pad>', '<|padding|>', '[PAD]'),
}

_NOT_ONE, _ANOTHER = 'not a tokenizer.json of the tokenizers library', 'give bytes or a tokenizer.json'


class ChatTokens(NamedTuple):
  """The ids that give a chat its form."""

  begin_header: int
  end_header: int
  end_turn: int


class FromFile:
  """A tokenizer.json as a Tokenizer; special tokens written out in a text are ordinary text to it."""

  def __init__(self, path: Path):
    tokenizers = optional.load('tokenizers', 'data', f'tokenizer {path}')
    content = _read(path)
    try:
      self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
      self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
      if not self.vocab_size:
        raise ValueError('it has no tokens')
    except ValueError as error:
      raise BadInput(f'--tokenizer={path}: {_NOT_ONE} ({error}); {_ANOTHER}') from error
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.fingerprint = hashlib.sha256(content).hexdigest()
    self.eos = self._special('eos', path)
    self.bos = self._special('bos', path, self.eos)
    self.pad = self._special('pad', path, self.eos)
    chat = [self._tokenizer.token_to_id(name) for name in CHAT]
    self.chat = None if None in chat else ChatTokens(*chat)
    self.ends = (self.eos,) if self.chat is None else (self.eos, self.chat.end_turn)
    letter = self._tokenizer.token_to_id('a')
    self._before = [] if letter is None else [letter]
    self._text_before = self._plain(self._before)
    self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32

  def _special(self, role: str, path: Path, default: int | None = None) -> int:
    found = [i for i in map(self._tokenizer.token_to_id, _NAMES[role]) if i is not None]
    if not found and default is None:
      raise BadInput(f'--tokenizer={path}: none of its tokens ends a text; it needs one of {", ".join(_NAMES[role])}')
    return found[0] if found else default

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    for text in texts:
      text.encode()  # the library's error for half a surrogate pair says nothing; this one is a UnicodeEncodeError
    encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(one.ids, self._dtype) for one in encoded]

  def decode(self, tokens) -> str:
    """Some decoders drop the space that a text begins with, so what continues a text is read behind a letter."""
    ids = [int(t) for t in tokens]
    if ids[:1] == [self.bos]:
      return self._plain(ids[1:])
    return self._plain(self._before + ids).removeprefix(self._text_before)

  def _plain(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=True)


def _read(path: Path) -> bytes:
  try:
    content = path.read_bytes()
    if not {'model', 'added_tokens', 'pre_tokenizer'} <= json.loads(content).keys():
      raise ValueError('it lacks model, added_tokens or pre_tokenizer')
    return content
  except OSError as error:
    raise BadInput(f'--tokenizer={path}: cannot be read ({error.strerror}); {_ANOTHER}') from error
  except (ValueError, AttributeError, RecursionError) as error:
    raise BadInput(f'--tokenizer={path}: {_NOT_ONE} ({error}); {_ANOTHER}') from error


def train(texts: Iterator[str], vocab_size: int, path: Path) -> None:
  """Trains the preset on `texts` and writes `path`, and tokenizer_config.json beside it (roles, chat template).

  vocab_size counts the 256 bytes and the special tokens. Raises BadInput when the text does not fill it.
  """
  optional.load('tokenizers', 'data', 'training a tokenizer')
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

  least = 256 + len(SPECIAL_TOKENS)
  if vocab_size <= least:
    raise BadInput(f'--vocab_size={vocab_size}: bytes and special tokens alone take {least}; give more')
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.Punctuation('isolated'),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
  ])  # fmt: skip
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size - len(SPECIAL_TOKENS),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    max_token_length=_MAX_TOKEN_BYTES,
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
  # Other programs put the begin of a text there by this; ours put it there themselves.
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f'{BOS} $A', pair=f'{BOS} $A $B:1', special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
  )
  size = tokenizer.get_vocab_size()
  if size != vocab_size:
    raise BadInput(f'--vocab_size={vocab_size}: the text has pairs for {size} only; ask for {size}, or give more text')
  storage.write(path, tokenizer.to_str(pretty=True))
  about = {'bos_token': BOS, 'eos_token': EOS, 'pad_token': PAD, 'chat_template': CHAT_TEMPLATE,
           'tokenizer_class': 'PreTrainedTokenizerFast'}  # fmt: skip
  storage.write(path.with_name('tokenizer_config.json'), json.dumps(about, indent=2) + '\n')
