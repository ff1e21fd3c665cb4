"""Training a tokenizer on the files that a preparation would read, and what it is worth on documents it did not see."""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from latent_loop import tokenizer
from latent_loop.errors import BadInput
from latent_loop.prepare import filters, inputs
from latent_loop.prepare.reading import documents
from latent_loop.tokenizer import bpe

_HELD_OUT = 50  # one document of so many is not trained on
_MAX_CHECKED_BYTES = 8 * 2**20


def train(
  patterns: list[str], vocab_size: int, output: Path, text_key: str, sample_bytes: int, say: Callable[[str], None]
) -> None:
  """Writes `output`, says bytes per token and whether texts survive the round trip. Raises BadInput.

  Trains on about `sample_bytes` of the input as it lies on the disk: documents chosen by their digest.
  """
  least = 256 + len(bpe.SPECIAL_TOKENS)
  if vocab_size <= least:
    raise BadInput(f'--vocab_size={vocab_size}: bytes and special tokens alone take {least}; give more')
  files, _ = inputs.find(patterns)
  _check_writable(output)  # now, not after minutes of training
  total = sum(file.num_bytes for file in files)
  share = min(sample_bytes / max(total, 1), 1.0)
  say(f'training {vocab_size} tokens on {share:.0%} of {inputs.size_of(total)} in {len(files):,} files')
  try:
    bpe.train(_texts(files, text_key, share), vocab_size, output)
  except OSError as error:
    raise BadInput(f'--output={output} cannot be written: {error}; give another path') from error
  code, num_bytes, num_tokens, broken = tokenizer.load(str(output)), 0, 0, 0
  for text in _up_to(_texts(files, text_key), _MAX_CHECKED_BYTES):
    (tokens,) = code.encode([text])
    num_bytes, num_tokens = num_bytes + len(text.encode()), num_tokens + len(tokens)
    broken += code.decode(tokens) != text
  if broken:
    raise BadInput(f'{output}: {broken} texts that were held out do not come back from their tokens as they were')
  if num_tokens:
    worth = f'{num_bytes / num_tokens:.3f} bytes per token on {inputs.size_of(num_bytes)} it was not trained on'
    worth += ', each text back as it was'
  else:
    worth = f'its worth not measured, since no text was held out: about one of {_HELD_OUT} would be'
  say(f'{output}: {code.vocab_size} tokens, {worth}; SHA-256 {code.fingerprint}')


def _check_writable(output: Path) -> None:
  try:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=output.parent):
      pass
  except OSError as error:
    raise BadInput(f'--output={output} cannot be written: {error}; give another path') from error
  if output.is_dir():
    raise BadInput(f'--output={output} is a folder; give the path of a file, such as {output / "tokenizer.json"}')


def _texts(files: list[inputs.File], text_key: str, share: float | None = None) -> Iterator[str]:
  """A share of the texts that pass the filters, or (None) those that are held out.

  Texts that are not UTF-8 are passed over; the preparation reports them.
  """
  limits = filters.Limits()
  for part in itertools.chain.from_iterable(inputs.units(files)):
    for _, raw in documents(part, text_key, limits.max_bytes):
      if isinstance(raw, np.ndarray):
        raise BadInput(f'{part.file.path}: column {text_key!r} holds token ids; name one of text with --text_key')
      if raw is None or filters.reason_to_drop(raw, limits) is not None:
        continue
      high, low = filters.digest(raw)
      held_out = high % _HELD_OUT == 0
      if held_out if share is None else not held_out and low < share * 2**64:
        try:
          yield raw.decode('utf-8')
        except UnicodeDecodeError:
          continue


def _up_to(texts: Iterator[str], num_bytes: int) -> Iterator[str]:
  for text in texts:
    if num_bytes <= 0:
      return
    num_bytes -= len(text)
    yield text
