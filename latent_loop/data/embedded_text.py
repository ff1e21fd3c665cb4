"""The text that every machine with Python has: the standard library's sources and help topics.

Read from the running interpreter, so it differs a little between Python versions. No network.
"""

import hashlib
import pydoc_data.topics
import sysconfig
from pathlib import Path

import numpy as np

from latent_loop.config import DataConfig
from latent_loop.data.packing import Row, window_to_row
from latent_loop.errors import BadInput
from latent_loop.tokenizer import utf8

# Third-party packages are not the standard library, and not every system ships the tests.
_SKIPPED = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'pydoc_data', '__pycache__'}


class Windows:
  """Fixed windows of T + 1 tokens over the concatenated documents of one split; random access."""

  def __init__(self, documents: list[str], seq_len: int, split: str):
    pieces = [np.r_[utf8.BOS, utf8.encode(text), utf8.EOS].astype(np.uint16) for text in documents]
    self._tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
    self._seq_len = seq_len
    if len(self) < 1:
      raise BadInput(
        f'config.data.seq_len={seq_len}: the {split} split of embedded_text has {len(self._tokens)} tokens, less '
        'than one row; use a shorter seq_len'
      )

  def __len__(self) -> int:
    return max(len(self._tokens) - 1, 0) // self._seq_len

  def __getitem__(self, index: int) -> Row:
    start = int(index) * self._seq_len
    return window_to_row(self._tokens[start : start + self._seq_len + 1])


class EmbeddedText:
  """Documents split into train and validation by a hash of their name."""

  vocab_size = utf8.VOCAB_SIZE
  chance_accuracy = None

  def __init__(self, cfg: DataConfig):
    documents = read_documents()
    self._cfg = cfg
    self._documents = {'train': [], 'validation': []}
    digest = hashlib.blake2b(f'{[cfg.seq_len, cfg.validation_fraction]}'.encode(), digest_size=16)
    for name, text in documents:
      held_out = _uniform(name) < cfg.validation_fraction
      self._documents['validation' if held_out else 'train'].append(text)
      digest.update(f'{name}\0{text}\0'.encode())
    self.fingerprint = digest.hexdigest()

  def rows(self, split: str) -> Windows:
    return Windows(self._documents[split], self._cfg.seq_len, split)

  def prompts(self) -> list[str]:
    return ['def ', 'import os\n', 'The "for" statement']


def read_documents() -> list[tuple[str, str]]:
  """(name, text) of every library source file and help topic, in an order that does not depend on the disk."""
  root = Path(sysconfig.get_paths()['stdlib'])
  documents = []
  for path in sorted(root.rglob('*.py'), key=lambda p: p.relative_to(root).as_posix()):
    relative = path.relative_to(root)
    if not _SKIPPED.intersection(relative.parts):
      documents.append((relative.as_posix(), path.read_text(encoding='utf-8', errors='replace')))
  if not documents:
    raise BadInput(
      f'{root}: no .py files, so config.data.source=embedded_text has nothing to read; use a Python that '
      'ships its library as files'
    )
  topics = pydoc_data.topics.topics
  return documents + [(f'topic:{name}', topics[name]) for name in sorted(topics)]


def _uniform(name: str) -> float:
  """A fixed number in [0, 1) for each name."""
  return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), 'big') / 2**64
