"""Parquet files whose rows are ready token ids, as in the public huginn-dataset: a source without preparation.

A path is a file, a glob, or a folder. What is under its train/ and val/ (or validation/) is of that split; without
such folders, the last rows of a path are held out (config.data.validation_fraction). Every host reads every row group,
so a large cluster is better served by prepared data.
"""

import glob
import hashlib
import os
from pathlib import Path

import numpy as np

from latent_loop import tokenizer
from latent_loop.config import DataConfig
from latent_loop.data.mixture import Mixture
from latent_loop.data.packing import Row, window_to_row
from latent_loop.data.row_groups import RowGroups
from latent_loop.errors import BadInput

_FOLDERS = {'train': ('train',), 'validation': ('val', 'validation')}
_NO_TOKEN, _PROMPT_TOKENS = -1, 12


class ParquetRows:
  """Rows [mine.start, mine.stop) of `groups`; random access. blocks: which of them are read together."""

  def __init__(self, groups: RowGroups, mine: range, cfg: DataConfig):
    self._groups, self._mine = groups, mine
    self._bos = _NO_TOKEN if cfg.bos is None else cfg.bos
    begins = np.clip(groups.begins, mine.start, mine.stop) - mine.start
    self.blocks = [range(int(a), int(b)) for a, b in zip(begins, begins[1:], strict=False) if a < b]

  def __len__(self) -> int:
    return len(self._mine)

  def __getitem__(self, index: int) -> Row:
    return window_to_row(self._groups[self._mine[int(index)]], bos=self._bos, pad=_NO_TOKEN)


class Parquet:
  """Raises BadInput for a path without rows, and as RowGroups does. vocab_size: that of the model, which ids obey."""

  chance_accuracy = None

  def __init__(self, cfg: DataConfig, vocab_size: int):
    self._cfg, self.vocab_size = cfg, vocab_size
    self._tokenizer = self.read_tokenizer(cfg) if cfg.tokenizer else None
    self._rows = {'train': [], 'validation': []}
    facts = [cfg.seq_len, cfg.all_weights, cfg.bos, cfg.validation_fraction]
    for path in cfg.paths:
      files = _find(path)
      groups = {s: RowGroups(found, cfg.column, cfg.seq_len + 1, vocab_size) for s, found in files.items()}
      facts += [(split, one.fingerprint) for split, one in groups.items()]
      if 'validation' in groups:
        mine = {split: range(len(one)) for split, one in groups.items()}
      else:
        count = len(groups['train'])
        held_out = min(max(round(count * cfg.validation_fraction), 1), count)
        mine = {'train': range(count - held_out), 'validation': range(count - held_out, count)}
      for split, rows in mine.items():
        if not rows:
          raise BadInput(f'{path}: no row for its {split} split; give files with more rows')
        self._rows[split].append(ParquetRows(groups.get(split, groups['train']), rows, cfg))
    self.fingerprint = hashlib.blake2b(f'{facts}'.encode(), digest_size=16).hexdigest()

  @staticmethod
  def read_tokenizer(cfg: DataConfig) -> tokenizer.Tokenizer:
    """The tokenizer of config.data.tokenizer; raises BadInput when none is given: token ids alone are no text."""
    if not cfg.tokenizer:
      raise BadInput(
        "config.data.tokenizer='': parquet files hold token ids only, so text can be neither read nor written; give "
        'the path of their tokenizer.json'
      )
    return tokenizer.load(cfg.tokenizer)

  def rows(self, split: str) -> Mixture | ParquetRows:
    parts = self._rows[split]
    return Mixture(parts, self._cfg.weights) if len(parts) > 1 else parts[0]

  def prompts(self) -> list[str]:
    """The first words of three validation rows; none without a tokenizer."""
    if self._tokenizer is None:
      return []
    rows = self._rows['validation'][0]
    heads = [rows[i]['tokens_BT'][:_PROMPT_TOKENS] for i in range(min(3, len(rows)))]
    return [self._tokenizer.decode(head) for head in heads]


def _find(path: str) -> dict[str, list[str]]:
  """The files of each split of a path, in a fixed order; only 'train' where nothing tells the splits apart."""
  if not os.path.isdir(path):
    found = {'train': sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))}
  else:
    under = lambda folder: sorted(map(str, Path(folder).rglob('*.parquet')))
    found = {split: [f for name in names for f in under(Path(path, name))] for split, names in _FOLDERS.items()}
    if not found['train']:
      held_out = {*found['validation']}
      found['train'] = [file for file in under(path) if file not in held_out]
    if not found['validation']:  # what else lies beside train/, such as test/, is not to be trained on
      found = {'train': found['train']}
  if not found['train']:
    raise BadInput(f'config.data.paths: {path}: no parquet file; give a file, a glob, or a folder with .parquet files')
  return found
