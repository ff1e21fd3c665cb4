"""Which tokens of a stream are in which row: decided from where documents end, before any token is read.

A span [start, stop) lies within one document; a row of T + 1 tokens is a list of them. The last token of a span is only
a target, so a document that goes on does so with that token, and every token of it but the first is a target once.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from latent_loop.shards.stream import Stream

Spans = list[tuple[int, int]]
_DOCUMENTS_AT_ONCE = 2**16  # of which best_fit makes rows together: neighbors on the disk stay neighbors


class Layout(Protocol):
  def __len__(self) -> int: ...
  def spans(self, row: int) -> Spans: ...


class Concatenated:
  """Row i is [i T, i T + T + 1) of the stream; the last one may be shorter."""

  def __init__(self, stream: Stream, seq_len: int):
    self._stream, self._seq_len = stream, seq_len

  def __len__(self) -> int:
    return -(-(len(self._stream) - 1) // self._seq_len) if len(self._stream) > 1 else 0

  def spans(self, row: int) -> Spans:
    start = row * self._seq_len
    return self._stream.pieces(start, min(start + self._seq_len + 1, len(self._stream)))


class BestFit:
  """Documents whole where they fit: longer ones are cut into full rows, what remains goes, longest first, where the
  least room is left. Holds 16 bytes of memory for each piece.
  """

  def __init__(self, stream: Stream, seq_len: int):
    spans, rows, first = [], [0], 0
    for starts, ends in _groups(stream):
      for row in _fill(*_cut(starts, ends, seq_len), seq_len + 1):
        spans.append(row)
        first += len(row)
        rows.append(first)
    self._spans = np.concatenate(spans) if spans else np.zeros((0, 2), np.int64)
    self._rows = np.array(rows, np.int64)

  def __len__(self) -> int:
    return len(self._rows) - 1

  def spans(self, row: int) -> Spans:
    return [(a, b) for a, b in self._spans[self._rows[row] : self._rows[row + 1]].tolist()]


LAYOUTS: dict[str, Callable[[Stream, int], Layout]] = {'concat': Concatenated, 'best_fit': BestFit}


def _groups(stream: Stream) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(starts, ends) of documents, some at a time."""
  start = 0
  for ends in stream.document_ends():
    starts = np.concatenate([[start], ends[:-1]])
    start = ends[-1]
    for i in range(0, len(ends), _DOCUMENTS_AT_ONCE):
      yield starts[i : i + _DOCUMENTS_AT_ONCE], ends[i : i + _DOCUMENTS_AT_ONCE]


def _cut(starts: np.ndarray, ends: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
  """Pieces of at most seq_len + 1 tokens, each but the first beginning with the token that the one before ends with."""
  counts = np.maximum(-(-(ends - starts - 1) // seq_len), 1)
  firsts = np.repeat(np.cumsum(counts) - counts, counts)
  begins = np.repeat(starts, counts) + (np.arange(counts.sum()) - firsts) * seq_len
  return begins, np.minimum(begins + seq_len + 1, np.repeat(ends, counts))


def _fill(begins: np.ndarray, ends: np.ndarray, size: int) -> Iterator[np.ndarray]:
  """Rows of pieces, [pieces, 2] each. Best fit, longest first; of equal pieces the first in the stream."""
  rows: list[list[int]] = []
  by_room: list[list[int]] = [[] for _ in range(size + 1)]  # rows by the tokens they still take
  rooms = 0  # bit r is set when by_room[r] is not empty
  lengths = ends - begins
  for i in np.argsort(-lengths, kind='stable').tolist():
    length = int(lengths[i])
    fitting = rooms >> length
    if fitting:
      room = length + (fitting & -fitting).bit_length() - 1
      row = by_room[room].pop()
      if not by_room[room]:
        rooms ^= 1 << room
      rows[row].append(i)
    else:
      room, row = size, len(rows)
      rows.append([i])
    left = room - length
    if left > 1:  # a piece of one token would teach nothing
      by_room[left].append(row)
      rooms |= 1 << left
  for pieces in rows:
    yield np.stack([begins[pieces], ends[pieces]], axis=1)
