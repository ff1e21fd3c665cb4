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
