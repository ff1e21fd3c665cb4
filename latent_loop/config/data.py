"""Where rows of tokens come from: the part config.data of a configuration."""

import itertools
from dataclasses import dataclass
from typing import Literal

from latent_loop.config.rules import check_counts, require

_ON_DISK = ('prepared', 'parquet', 'chat')  # the sources that read config.data.paths


@dataclass(frozen=True)
class DataConfig:
  """Where rows of tokens come from. Synthetic tasks read difficulty; prepared data reads paths, weights
  (and their changes), packing; parquet paths, weights, column, bos, tokenizer; chat paths, weights, packing, tokenizer;
  all but tasks documents.
  """

  source: str = 'embedded_text'
  seq_len: int = 256
  paths: tuple[str, ...] = ()  # folders that launch.prepare_data wrote; parquet or .jsonl files, globs, folders
  weights: tuple[float, ...] = ()  # the share of rows that each of them gives; () = as many as it has
  weight_changes: tuple[tuple[float, ...], ...] = ()  # each: share of the steps from which it holds, then new weights;
  # training alone: validation keeps the first ones, so that its losses can be compared
  packing: Literal['concat', 'best_fit'] = 'concat'  # rows cut from one stream, or filled with whole documents
  documents: Literal['apart', 'together'] = 'apart'  # together: a token sees all earlier ones of its row and counts its
  # place from the row's begin, whatever documents they are of, as the references train
  read_threads: int = 1  # rows of a batch that are read at once; more for a slow or distant disk
  column: str = 'input_ids'  # of a parquet file: seq_len + 1 ids in each row
  bos: int | None = None  # the id that begins a document in those; None = a row is one document, as the paper trains
  tokenizer: str = ''  # path of a tokenizer.json; '' = bytes for chat, no samples for parquet
  min_difficulty: int = 1
  max_difficulty: int = 8
  validation_fraction: float = 0.05

  def __post_init__(self):
    require(self.seq_len >= 2, f'config.data.seq_len={self.seq_len} is below 2; no next token to predict')
    check_counts('data', vars(self), ('seq_len',), 2)
    require(
      1 <= self.min_difficulty <= self.max_difficulty,
      f'config.data.min_difficulty={self.min_difficulty} and max_difficulty={self.max_difficulty} '
      'must satisfy 1 <= min <= max',
    )
    require(1 <= self.read_threads <= 256, f'config.data.read_threads={self.read_threads} must lie between 1 and 256')
    most = self.max_difficulty
    require(most <= 1000, f'config.data.max_difficulty={most} is above 1000; no task is that hard, lower it')
    require(
      0 < self.validation_fraction < 1,
      f'config.data.validation_fraction={self.validation_fraction} must lie between 0 and 1',
    )
    require(
      self.documents == 'apart' or self.source in (*_ON_DISK, 'embedded_text'),
      f"config.data.documents={self.documents!r}: instances of {self.source} are problems of their own; use 'apart'",
    )
    require(
      bool(self.paths) == (self.source in _ON_DISK),
      f'config.data.paths={self.paths} does not fit source={self.source!r}; give paths with the sources '
      f'{", ".join(_ON_DISK)} only',
    )
    self._check_weights()

  def _check_weights(self) -> None:
    weights, changes, count = self.weights, self.weight_changes, len(self.paths)
    require(
      not weights or (len(weights) == count and min(weights) >= 0 and sum(weights) > 0),
      f'config.data.weights={weights}: not a number, 0 or more and not all 0, for each of the {count} paths',
    )
    require(
      not changes or count > 1,
      f'config.data.weight_changes={changes}: the number of config.data.paths is {count}, and weights are of several',
    )
    for one in changes:
      require(
        len(one) == 1 + count and min(one[1:]) >= 0 and sum(one[1:]) > 0,
        f'config.data.weight_changes: {one} is not the share of the steps from which it holds, then a weight for each '
        f'of the {count} paths, 0 or more and not all 0',
      )
    begins = [0.0, *(one[0] for one in changes), 1.0]
    require(
      all(a < b for a, b in itertools.pairwise(begins)),
      f'config.data.weight_changes begin at {begins[1:-1]} of the steps; give increasing shares between 0 and 1',
    )
    never = [
      path for i, path in enumerate(self.paths) if weights and not any((weights[i], *(c[1 + i] for c in changes)))
    ]
    require(
      not never,
      f'config.data.weights={weights}: {", ".join(never)} would never be read; give it a positive number, there or in '
      'config.data.weight_changes, or leave out the path',
    )

  @property
  def one_document(self) -> bool:
    """Whether a row counts as one document, padded at its end if at all: causal attention needs no other mask then."""
    return self.documents == 'together' or (self.source == 'parquet' and self.bos is None)

  @property
  def all_weights(self) -> tuple:
    """weights and their changes: what the fingerprint of a source knows of them."""
    return (*self.weights, *self.weight_changes)

  def changes_of(self, num_steps: int) -> list[tuple[int, tuple[float, ...]]]:
    """(the step from which they hold, the weights) of every change, in a run of num_steps."""
    return [(round(share * num_steps), tuple(weights)) for share, *weights in self.weight_changes]
