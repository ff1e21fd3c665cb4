"""batch(step) as a pure function of (rows, seed, roll-backs, step): there is no iterator state to lose.

Every process sees the same global order and builds only its own rows of each batch, so the stream does not
depend on the number of hosts.
"""

import concurrent.futures
import hashlib
from collections.abc import Sequence

import grain
import numpy as np

from latent_loop.batch import Batch
from latent_loop.data import Rows
from latent_loop.data.mixture import Mixture, Woven
from latent_loop.data.packing import joined, stack
from latent_loop.data.parquet import ParquetRows
from latent_loop.data.windows import Windows
from latent_loop.trust import rollback
from latent_loop.trust.rollback import Rollback

Changes = Sequence[tuple[int, Sequence[float]]]  # (from when on, weights of the sources)


def make_order(rows: Rows, seed: int, changes: Changes = ()) -> Sequence[int]:
  """Place in the endless stream -> row. Every source is reshuffled each epoch; sources are woven by their weights.

  changes: the places from which a mixture has other weights.
  """
  if isinstance(rows, Mixture):
    parts = enumerate(zip(rows.sources, rows.parts, strict=True))
    return Woven([_shuffled(source, part, seed + i) for i, (source, part) in parts], rows.weights, changes)
  return _shuffled(rows, range(len(rows)), seed)


def _shuffled(source: Rows, ids: range, seed: int) -> Sequence[int]:
  if isinstance(source, ParquetRows):
    return Windows([ids[block.start : block.stop] for block in source.blocks], seed % 2**32)
  return grain.MapDataset.source(ids).seed(seed % 2**32).shuffle().repeat()


class Batches:
  """Random access to the batches of one split, reshuffled each epoch.

  rollbacks: what a run that returned to an earlier step skips of the stream.
  """

  def __init__(
    self,
    rows: Rows,
    seed: int,
    batch_size: int,
    mine: Sequence[int] | None = None,
    threads: int = 1,
    changes: Changes = (),
    together: bool = False,
  ):
    """mine: which rows of each global batch to build; None = all. threads: how many of them are read at once.

    changes: the steps from which a mixture has other weights. together: config.data.documents says so.
    """
    self._rows = rows
    self._order = make_order(rows, seed, [(step * batch_size, weights) for step, weights in changes])
    self.rollbacks: tuple[Rollback, ...] = ()
    self._global, self._mine = batch_size, range(batch_size) if mine is None else mine
    self._map = concurrent.futures.ThreadPoolExecutor(threads).map if threads > 1 else map
    self._row = (lambda i: joined(rows[i])) if together else rows.__getitem__

  def row_ids(self, step: int) -> list[int]:
    """Which rows this process builds at `step`."""
    first = self._first(step)
    return [self._order[first + i] for i in self._mine]

  def batch(self, step: int) -> Batch:
    """This process's rows of the global batch at `step`."""
    return stack(list(self._map(self._row, self.row_ids(step))))

  def hash(self, step: int) -> str:
    """Which examples the global batch at `step` holds, in order; each process finds it by itself."""
    first = self._first(step)
    ids = [self._order[first + i] for i in range(self._global)]
    return hashlib.blake2b(np.array(ids, np.int64).tobytes(), digest_size=8).hexdigest()

  def _first(self, step: int) -> int:
    """The place in the stream of the first row of the global batch at `step`."""
    return rollback.place(step, self.rollbacks) * self._global

  def order_hash(self) -> str:
    """Changes when another library version would shuffle differently; equal on every process."""
    return stack([self._rows[self._order[i]] for i in range(8)]).hash()
