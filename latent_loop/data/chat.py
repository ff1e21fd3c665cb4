"""Conversations as a source: .jsonl files whose lines have `messages`, each with a role and content.

Only what the assistant says is a target (tokenizer/messages.py). Tokenized when a run starts and held in memory, 13
bytes for each token: made for instruction data, of which there is little. Packed as prepared data is; rows in which the
assistant says nothing, as inside a long question, teach nothing and are left out, so every batch has a target.
"""

import glob
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latent_loop import tokenizer
from latent_loop.config import DataConfig
from latent_loop.data.layout import LAYOUTS, Spans
from latent_loop.data.mixture import Mixture
from latent_loop.data.packing import Row, pieces_to_row
from latent_loop.errors import BadInput
from latent_loop.tokenizer.messages import ROLES, Message, conversation_of

Conversation = tuple[np.ndarray, np.ndarray]  # tokens, whether each is said by the assistant


class Stream:
  """Conversations one behind the other, as layout.py reads a stream; and how much each token counts."""

  def __init__(self, conversations: list[Conversation]):
    self._tokens, self._said = (np.concatenate(parts) for parts in zip(*conversations, strict=True))
    self._ends = np.cumsum([len(tokens) for tokens, _ in conversations])
    self._said_before = np.concatenate([[0], np.cumsum(self._said)])

  def __len__(self) -> int:
    """Tokens."""
    return len(self._tokens)

  def read(self, start: int, stop: int) -> Conversation:
    return self._tokens[start:stop], self._said[start:stop]

  def num_targets(self, spans: Spans) -> int:
    """How much of `spans` the assistant says; the first token of a span is no target."""
    return sum(int(self._said_before[b] - self._said_before[a + 1]) for a, b in spans)

  def pieces(self, start: int, stop: int) -> Spans:
    """[start, stop) cut where conversations begin."""
    first, last = np.searchsorted(self._ends, start, side='right'), np.searchsorted(self._ends, stop)
    return list(itertools.pairwise([start, *self._ends[first:last].tolist(), stop]))

  def document_ends(self) -> Iterator[np.ndarray]:
    yield self._ends


class ChatRows:
  """The rows of one split of one path that have a target; random access. used: which of the layout's they are."""

  def __init__(self, stream: Stream, cfg: DataConfig, pad: int):
    self.stream, self.seq_len, self._pad = stream, cfg.seq_len, pad
    self.layout = LAYOUTS[cfg.packing](stream, cfg.seq_len)
    self.used = [i for i in range(len(self.layout)) if stream.num_targets(self.layout.spans(i))]

  def __len__(self) -> int:
    return len(self.used)

  def __getitem__(self, index: int) -> Row:
    pieces = [self.stream.read(a, b) for a, b in self.layout.spans(self.used[int(index)])]
    return pieces_to_row([tokens for tokens, _ in pieces], self.seq_len, self._pad, [said for _, said in pieces])


class Chat:
  """Splits by a hash of the conversation. Raises BadInput, by file and line, for what is no conversation."""

  chance_accuracy = None

  def __init__(self, cfg: DataConfig):
    self._cfg, self._tokenizer = cfg, self.read_tokenizer(cfg)
    self.vocab_size = self._tokenizer.vocab_size
    digest = hashlib.blake2b(f'{[cfg.seq_len, cfg.packing, cfg.all_weights]}'.encode(), digest_size=16)
    self._rows: dict[str, list[ChatRows]] = {'train': [], 'validation': []}
    for path in cfg.paths:
      for split, conversations in self._read(path).items():
        for tokens, said in conversations:
          digest.update(tokens.tobytes() + said.tobytes())
        self._rows[split].append(ChatRows(Stream(conversations), cfg, self._tokenizer.pad))
    self.fingerprint = digest.hexdigest()

  @staticmethod
  def read_tokenizer(cfg: DataConfig) -> tokenizer.Tokenizer:
    """That of config.data.tokenizer; bytes where none is given. Raises BadInput."""
    return tokenizer.load(cfg.tokenizer or 'bytes')

  def rows(self, split: str) -> Mixture | ChatRows:
    parts = self._rows[split]
    return Mixture(parts, self._cfg.weights) if len(parts) > 1 else parts[0]

  def prompts(self) -> list[str]:
    """Three validation conversations up to the first answer; none where a chat has tokens that no text can write."""
    if self._tokenizer.chat is not None:
      return []
    stream = self._rows['validation'][0].stream
    ends = next(stream.document_ends())[:3].tolist()
    read = [stream.read(a, b) for a, b in zip([0, *ends], ends, strict=False)]
    return [self._tokenizer.decode(tokens[: said.argmax()]) for tokens, said in read]

  def _read(self, path: str) -> dict[str, list[Conversation]]:
    splits = {'train': [], 'validation': []}
    for file in _find(path):
      for where, messages in _conversations(file):
        tokens, said = conversation_of(self._tokenizer, messages)
        if not said.any():
          raise BadInput(f'{where}: the assistant says nothing, so there is nothing to learn; remove the line')
        draw = int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), 'big') / 2**64
        splits['validation' if draw < self._cfg.validation_fraction else 'train'].append((tokens, said))
    for split, found in splits.items():
      if not found:
        raise BadInput(
          f'{path}: no conversation in its {split} split; give more of them, or another config.data.validation_fraction'
        )
    return splits


def _find(path: str) -> list[str]:
  found = map(str, Path(path).rglob('*.jsonl')) if os.path.isdir(path) else glob.glob(path, recursive=True)
  files = sorted(one for one in found if os.path.isfile(one))
  if not files:
    raise BadInput(f'config.data.paths: {path}: no .jsonl file; give a file, a glob, or a folder with .jsonl files')
  return files


def _conversations(path: str) -> Iterator[tuple[str, list[Message]]]:
  """(file and line, the messages) of every line that is not blank."""
  try:
    with open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          where = f'{path}, line {number}'
          yield where, _messages(line, where)
  except OSError as error:
    raise BadInput(f'{path}: cannot be read to its end ({error}); replace or remove the file') from error


def _messages(line: bytes, where: str) -> list[Message]:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:  # not UTF-8 either
    raise BadInput(f'{where}: not JSON ({error}); correct or remove the line') from error
  messages = record.get('messages') if isinstance(record, dict) else None
  if not isinstance(messages, list) or not messages:
    raise BadInput(f"{where}: no list 'messages', or an empty one; correct or remove the line")
  for i, one in enumerate(messages):
    if not isinstance(one, dict) or one.get('role') not in ROLES or not isinstance(one.get('content'), str):
      raise BadInput(
        f'{where}, message {i}: the rule is an object with a role, one of {", ".join(ROLES)}, and a content that is '
        'text; correct or remove the line'
      )
    if not _is_text(one['content']):
      raise BadInput(f'{where}, message {i}: half a surrogate pair, which is no text; correct or remove the line')
  return messages


def _is_text(text: str) -> bool:
  return not any('\ud800' <= letter <= '\udfff' for letter in text)
