"""Text to token ids and back: `load(name) -> Tokenizer`, by name 'bytes' or from a tokenizer.json."""

from typing import Protocol

import numpy as np

from latent_loop import storage
from latent_loop.tokenizer import bpe, utf8


class Tokenizer(Protocol):
  """vocab_size: one more than the largest id. fingerprint: equal only for equal tokenizers.

  chat: None where a chat is plain text. ends: the ids that end an answer. encode raises UnicodeEncodeError. decode
  takes tokens for the beginning of a text where bos is their first, else for what follows others.
  """

  vocab_size: int
  bos: int
  eos: int
  pad: int
  fingerprint: str
  chat: bpe.ChatTokens | None
  ends: tuple[int, ...]

  def encode(self, texts: list[str]) -> list[np.ndarray]: ...
  def decode(self, tokens) -> str: ...


class Bytes:
  """utf8.py as a Tokenizer."""

  vocab_size, bos, eos, pad = utf8.VOCAB_SIZE, utf8.BOS, utf8.EOS, utf8.PAD
  fingerprint = 'bytes'
  chat, ends = None, (utf8.EOS,)

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    return [utf8.encode(text) for text in texts]

  def decode(self, tokens) -> str:
    return utf8.decode(tokens)


def load(name: str) -> Tokenizer:
  """The tokenizer 'bytes', or that of the tokenizer.json at the path `name`; raises BadInput."""
  return Bytes() if name == 'bytes' else bpe.FromFile(storage.path(name, 'the tokenizer'))
