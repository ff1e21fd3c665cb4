"""What a document must be to be kept, and the digest that tells documents apart. All on UTF-8 bytes, for speed."""

import dataclasses
import hashlib

import numpy as np

_WHITE = b'\t\n\r\f\v'
_CONTROLS = bytes(i for i in range(32) if i not in _WHITE) + b'\x7f'
# Letters of all scripts: every byte of a character outside ASCII counts.
_LETTERS = bytes(i for i in range(256) if i >= 128 or chr(i).isalpha())
_MAX_CONTROLS, _MIN_LETTERS = 0.001, 0.2


@dataclasses.dataclass(frozen=True)
class Limits:
  min_bytes: int = 32
  max_bytes: int = 4 * 2**20  # also bounds what a process holds in memory


ID_BYTES = 4  # that a ready token id counts for


def reason_to_drop(text: bytes | np.ndarray, limits: Limits) -> str | None:
  """Why a document is not kept, or None. Of ready token ids only the length is judged."""
  is_ids = isinstance(text, np.ndarray)
  size = ID_BYTES * len(text) if is_ids else len(text)
  if size < limits.min_bytes:
    return 'too short'
  if size > limits.max_bytes:
    return 'too long'
  if is_ids:
    return None
  if _share(text, _CONTROLS) > _MAX_CONTROLS:
    return 'control characters'
  if _share(text, _LETTERS) < _MIN_LETTERS:
    return 'few letters'
  return None


def _share(text: bytes, letters: bytes) -> float:
  return 1 - len(text.translate(None, letters)) / len(text)


def digest(text: bytes | np.ndarray) -> tuple[int, int]:
  """128 bits of BLAKE2b over the words of `text`: documents that differ in white space alone are one; or over ids."""
  content = text.tobytes() if isinstance(text, np.ndarray) else b' '.join(text.split())
  raw = hashlib.blake2b(content, digest_size=16).digest()
  return int.from_bytes(raw[:8], 'big'), int.from_bytes(raw[8:], 'big')
