"""What one training step reads."""

import dataclasses
import hashlib

import jax
import numpy as np

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of tokens; leading axis = sequences.

  targets_BT: the token to predict at each place. weights_BT: how much that prediction counts (0 for
  padding and for the first token of a document). positions_BT: place in the document, from 0.
  segment_ids_BT: which document of its row a token belongs to, from 1 (1 where they are together); 0 marks padding.
  """

  tokens_BT: Array
  targets_BT: Array
  weights_BT: Array
  positions_BT: Array
  segment_ids_BT: Array

  def hash(self) -> str:
    """Short content hash of a host batch: equal batches, equal hash, on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ('tokens_BT', 'targets_BT', 'weights_BT', 'segment_ids_BT'):
      digest.update(np.ascontiguousarray(vars(self)[name]).tobytes())
    return digest.hexdigest()
