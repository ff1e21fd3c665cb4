"""UTF-8 bytes as tokens: no vocabulary to train, nothing to download, every text round-trips."""

import numpy as np

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 264  # 256 bytes and 8 special tokens, of which three are used


def encode(text: str) -> np.ndarray:
  """The bytes of `text`, uint16, without special tokens."""
  return np.frombuffer(text.encode('utf-8'), np.uint8).astype(np.uint16)


def decode(tokens) -> str:
  """The text of `tokens`; special tokens are dropped, broken UTF-8 shows as the replacement character."""
  return bytes(int(t) for t in tokens if t < 256).decode('utf-8', errors='replace')


# What a page writes for a token that would be blank or has no letter: arrows for tab, newline and return, an open box.
_SHOWN = {9: '\u21e5', 10: '\u21b5', 13: '\u240d', 32: '\u2423', BOS: '<bos>', EOS: '<eos>', PAD: '<pad>'}


def label(token: int) -> str:
  """A token as a person reads it, never blank; a byte that is no letter of its own is two hex digits, such as 'c3'."""
  if token in _SHOWN:
    return _SHOWN[token]
  if token >= 256:
    return f'<{token}>'
  return chr(token) if 32 < token < 127 else f'{token:02x}'


def labels_in_text(tokens) -> list[str]:
  """The labels of a text's tokens; the bytes of a longer character X become 'X 1/2' and 'X 2/2'."""
  labels, at = [label(int(token)) for token in tokens], 0
  while at < len(labels):
    size = _bytes_of_character(int(tokens[at]))
    character = decode(tokens[at : at + size])
    whole = size > 1 and len(character) == 1 and character != '\ufffd' and character.isprintable()
    if whole:
      labels[at : at + size] = [f'{character} {i + 1}/{size}' for i in range(size)]
    at += size if whole else 1
  return labels


def _bytes_of_character(first: int) -> int:
  """How many bytes the UTF-8 character takes that begins with the byte `first`."""
  return 2 if 0xC2 <= first < 0xE0 else 3 if 0xE0 <= first < 0xF0 else 4 if 0xF0 <= first < 0xF5 else 1
