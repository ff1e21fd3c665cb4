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
  least room is left. Holds 16 bytes of memory for each piece and 8 for each row, and twice that while it is made.
  """

  def __init__(self, stream: Stream, seq_len: int):
    spans, counts = [np.zeros((0, 2), np.int64)], [np.zeros(1, np.int64)]
    for starts, ends in _groups(stream):
      pieces = np.stack(_cut(starts, ends, seq_len), axis=1)
      order, per_row = _fill(pieces[:, 1] - pieces[:, 0], seq_len + 1)
      spans.append(pieces[order])
      counts.append(per_row)
    self._spans = np.concatenate(spans)
    self._rows = np.cumsum(np.concatenate(counts))

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


def _fill(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """(the pieces of the first row, then those of the next ..., how many each row has). Best fit, longest first; of equal
  pieces the first in the stream.
  """
  order = np.argsort(-lengths, kind='stable')
  count = int((lengths == size).sum())  # rows so far: of a long document nearly all pieces are full, and come first
  row_of: list[int] = []  # of the other pieces, in that order
  by_room: list[list[int]] = [[] for _ in range(size + 1)]  # rows by the tokens they still take
  rooms = 0  # bit r is set when by_room[r] is not empty
  full, rest = np.arange(count), order[count:]
  for length in lengths[rest].tolist():
    fitting = rooms >> length
    if fitting:
      room = length + (fitting & -fitting).bit_length() - 1
      row = by_room[room].pop()
      if not by_room[room]:
        rooms ^= 1 << room
    else:
      room, row = size, count
      count += 1
    row_of.append(row)
    left = room - length
    if left > 1:  # a piece of one token would teach nothing
      by_room[left].append(row)
      rooms |= 1 << left
  rows = np.concatenate([full, np.array(row_of, np.int64)])
  return order[np.argsort(rows, kind='stable')], np.bincount(rows)
