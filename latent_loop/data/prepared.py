"""Folders that launch.prepare_data wrote, as a data source; with shards of zarr3 also as copied to an object store."""

import hashlib

from latent_loop import storage, tokenizer
from latent_loop.config import DataConfig
from latent_loop.data.layout import LAYOUTS
from latent_loop.data.mixture import Mixture
from latent_loop.data.packing import Row, pieces_to_row
from latent_loop.errors import BadInput
from latent_loop.shards import manifest
from latent_loop.shards.stream import Stream

_PROMPT_TOKENS = 12


def _place(path: str) -> storage.Path:
  return storage.path(path, 'config.data.paths')


class PreparedRows:
  """The rows of one split of one folder; random access."""

  def __init__(self, stream: Stream, cfg: DataConfig, pad: int):
    self.stream, self.seq_len, self._pad = stream, cfg.seq_len, pad
    self.layout = LAYOUTS[cfg.packing](stream, cfg.seq_len)

  def __len__(self) -> int:
    return len(self.layout)

  def __getitem__(self, index: int) -> Row:
    spans = self.layout.spans(int(index))
    return pieces_to_row([self.stream.read(a, b) for a, b in spans], self.seq_len, self._pad)


class Prepared:
  """Raises BadInput for a folder that is not prepared, not whole, or of another tokenizer than the first."""

  chance_accuracy = None

  def __init__(self, cfg: DataConfig):
    self._cfg, self._folders = cfg, [_place(path) for path in cfg.paths]
    self._manifests = [manifest.read(folder) for folder in self._folders]
    for folder, one in zip(self._folders, self._manifests, strict=True):
      manifest.check_sizes(folder, one)
      if one.tokenizer != self._manifests[0].tokenizer:
        raise BadInput(
          f'config.data.paths: {folder} was prepared with another tokenizer than {self._folders[0]} '
          f'({one.tokenizer[:12]}, {self._manifests[0].tokenizer[:12]}); prepare both with one'
        )
    self._tokenizer = self.read_tokenizer(cfg)
    self.vocab_size = self._manifests[0].vocab_size
    facts = [cfg.seq_len, cfg.packing, cfg.all_weights, *(one.seal for one in self._manifests)]
    self.fingerprint = hashlib.blake2b(f'{facts}'.encode(), digest_size=16).hexdigest()

  @staticmethod
  def read_tokenizer(cfg: DataConfig) -> tokenizer.Tokenizer:
    """The tokenizer of the first folder; raises BadInput when it is not the one of its manifest."""
    folder = _place(cfg.paths[0])
    wanted = manifest.read(folder).tokenizer
    if wanted == 'bytes':
      return tokenizer.Bytes()
    found = tokenizer.load(str(folder / manifest.TOKENIZER))
    if found.fingerprint != wanted:
      raise BadInput(
        f'{folder / manifest.TOKENIZER}: not the tokenizer of the manifest (SHA-256 {found.fingerprint[:12]}, the '
        f'manifest {wanted[:12]}); restore the file'
      )
    return found

  def rows(self, split: str) -> Mixture | PreparedRows:
    parts = []
    for folder, one in zip(self._folders, self._manifests, strict=True):
      parts.append(PreparedRows(Stream(folder, one, split), self._cfg, self._tokenizer.pad))
      if not len(parts[-1]):
        raise BadInput(
          f'{folder}: no document in its {split} split; prepare more text, or with another --validation_fraction'
        )
    return Mixture(parts, self._cfg.weights) if len(parts) > 1 else parts[0]

  def prompts(self) -> list[str]:
    """The first words of three validation documents."""
    stream = Stream(self._folders[0], self._manifests[0], 'validation')
    ends = next(stream.document_ends())[:3]
    starts = [0, *(int(end) for end in ends[:-1])]
    heads = [stream.read(a, min(a + 1 + _PROMPT_TOKENS, int(b) - 1)) for a, b in zip(starts, ends, strict=True)]
    return [self._tokenizer.decode(head) for head in heads]
