"""Documents to rows: segment ids, positions that restart (or not: `joined`), weights that stop at document borders."""

import numpy as np

from latent_loop.batch import Batch
from latent_loop.tokenizer.utf8 import BOS, PAD

Row = dict[str, np.ndarray]  # the fields of Batch, each [T]


def window_to_row(window: np.ndarray, weights: np.ndarray | None = None, bos: int = BOS, pad: int = PAD) -> Row:
  """T + 1 consecutive tokens of concatenated documents (each begins with `bos`) as one training row.

  The row may begin inside a document. `weights` (T + 1) says how much predicting each token counts,
  default 1. A `bos` is never a target: what comes before it belongs to another document.
  """
  return _to_row(window, window == bos, window == pad, weights)


def pieces_to_row(pieces: list[np.ndarray], seq_len: int, pad: int, weights: list[np.ndarray] | None = None) -> Row:
  """Pieces of documents as one row: up to seq_len + 1 tokens, then padding.

  The first token of a piece is never a target: what comes before it is of another document, or was a target elsewhere.
  weights: how much predicting each token of each piece counts, default 1.
  """
  window, starts, used = np.full(seq_len + 1, pad, np.int32), np.zeros(seq_len + 1, bool), 0
  for piece in pieces:
    starts[used] = True
    window[used : used + len(piece)] = piece
    used += len(piece)
  if weights is not None:
    weights = np.pad(np.concatenate(weights).astype(np.float32), (0, seq_len + 1 - used))
  return _to_row(window, starts, np.arange(seq_len + 1) >= used, weights)


def _to_row(window: np.ndarray, starts: np.ndarray, padding: np.ndarray, weights: np.ndarray | None) -> Row:
  segment_ids = np.cumsum(starts) + (0 if starts[0] else 1)
  index = np.arange(len(window))
  begin = np.maximum.accumulate(np.where(starts, index, 0))
  counts = ~starts & ~padding
  weights = counts.astype(np.float32) if weights is None else weights * counts
  return {
    'tokens_BT': window[:-1].astype(np.int32),
    'targets_BT': window[1:].astype(np.int32),
    'weights_BT': weights[1:].astype(np.float32),
    'positions_BT': (index - begin)[:-1].astype(np.int32),
    'segment_ids_BT': np.where(padding, 0, segment_ids)[:-1].astype(np.int32),
  }


def joined(row: Row) -> Row:
  """The documents of a row as one; what is predicted stays as it was."""
  return {
    **row,
    'positions_BT': np.arange(len(row['positions_BT']), dtype=np.int32),
    'segment_ids_BT': (row['segment_ids_BT'] > 0).astype(np.int32),
  }


def stack(rows: list[Row]) -> Batch:
  return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})
