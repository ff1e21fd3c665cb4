"""Data: `make_source(cfg) -> Source`, and `Batches`, which turns its rows into batch(step).

A new source is one file with a class and one line in SOURCES.
"""

from collections.abc import Callable
from typing import Protocol

from latent_loop.config import Config, DataConfig
from latent_loop.data import tasks
from latent_loop.data.chat import Chat
from latent_loop.data.embedded_text import EmbeddedText
from latent_loop.data.packing import Row
from latent_loop.data.parquet import Parquet
from latent_loop.data.prepared import Prepared
from latent_loop.errors import BadInput
from latent_loop.tokenizer import Bytes, Tokenizer


class Rows(Protocol):
  """Random access to the rows of a split."""

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Row: ...


class Source(Protocol):
  """vocab_size: the smallest model vocabulary that fits. fingerprint: changes when any row would."""

  vocab_size: int
  chance_accuracy: float | None
  fingerprint: str

  def rows(self, split: str) -> Rows: ...
  def prompts(self) -> list[str]: ...


SOURCES: dict[str, Callable[[Config], Source]] = {
  'embedded_text': lambda config: EmbeddedText(config.data),
  'prepared': lambda config: Prepared(config.data),
  'chat': lambda config: Chat(config.data),
  'parquet': lambda config: Parquet(config.data, config.model.vocab_size),
  **{name: lambda config, name=name: tasks.Task(name, config.data, config.seed) for name in tasks.TASKS},
}
_WITH_TOKENIZER = {'prepared': Prepared, 'parquet': Parquet, 'chat': Chat}


def check_name(cfg: DataConfig) -> None:
  """Raises BadInput unless SOURCES has the name."""
  if cfg.source not in SOURCES:
    raise BadInput(f'config.data.source={cfg.source!r}: not known; choose one of {", ".join(SOURCES)}')


def make_tokenizer(cfg: DataConfig) -> Tokenizer:
  """The tokenizer of a source, without the source's data; raises BadInput."""
  return _WITH_TOKENIZER[cfg.source].read_tokenizer(cfg) if cfg.source in _WITH_TOKENIZER else Bytes()


def make_source(config: Config) -> Source:
  """The source that config.data names; raises BadInput when it is unknown or its tokens do not fit the model."""
  check_name(config.data)
  source = SOURCES[config.data.source](config)
  if config.model.vocab_size < source.vocab_size:
    raise BadInput(
      f'config.model.vocab_size={config.model.vocab_size} is smaller than the {source.vocab_size} token ids of '
      f'{config.data.source}; raise it to at least that'
    )
  return source
