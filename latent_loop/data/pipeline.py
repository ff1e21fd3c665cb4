"""batch(step) as a pure function of (rows, seed, step): there is no iterator state to lose.

Every process sees the same global order and builds only its own contiguous slice of each batch, so the
stream does not depend on the number of hosts.
"""

import grain

from latent_loop.batch import Batch
from latent_loop.data import Rows
from latent_loop.data.packing import stack
from latent_loop.errors import BadInput


class Batches:
  """Random access to the batches of one split, reshuffled each epoch."""

  def __init__(self, rows: Rows, seed: int, batch_size: int, process: int = 0, num_processes: int = 1):
    if batch_size % num_processes:
      raise BadInput(
        f'config.train.batch_size={batch_size} does not divide over {num_processes} processes; use a multiple'
      )
    self._rows = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    self._global, self._local = batch_size, batch_size // num_processes
    self._offset = process * self._local

  def batch(self, step: int) -> Batch:
    """This process's rows of the global batch at `step`."""
    first = step * self._global + self._offset
    return stack([self._rows[first + i] for i in range(self._local)])

  def order_hash(self) -> str:
    """Changes when another library version would shuffle differently; equal on every process."""
    return stack([self._rows[i] for i in range(8)]).hash()
