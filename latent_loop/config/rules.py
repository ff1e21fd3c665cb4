"""How the parts of a configuration say what is wrong with a value."""

import re

from latent_loop.errors import BadInput

LARGEST = 2**31 - 1  # what the devices' 32-bit integers hold


def require(condition: bool, sentence: str) -> None:
  if not condition:
    raise BadInput(sentence)


def count_of(text: str) -> int | None:
  """The whole number from 0 that `text` is; None for any other text, and beyond 15 digits, which nobody means."""
  return int(text) if re.fullmatch('[0-9]{1,15}', text) else None


def check_counts(group: str, values: dict, names: tuple[str, ...], low: int) -> None:
  for name in names:
    require(
      low <= values[name] <= LARGEST, f'config.{group}.{name}={values[name]} must lie between {low} and {LARGEST}'
    )
