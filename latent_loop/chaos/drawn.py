"""Inputs that hypothesis draws: command lines, and what happened to the files that they name.

Where they are right they are cheap: a dry run, a plan that is only counted, a training that stops after a step.
"""

import dataclasses
import math
import os
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

import hypothesis
from hypothesis import strategies as st

from latent_loop.chaos import accidents
from latent_loop.config import Config

EXPERIMENT, RUN, PROMPTS, GOLDEN = 'experiment.py', 'run', 'prompts.txt', 'golden'
_CONFIG, _WORKDIR = f'--config={EXPERIMENT}', f'--workdir={RUN}'
_ONE_STEP = '--time_limit=0.0001'  # minutes: it saves and stops at the first chance


@dataclasses.dataclass(frozen=True)
class Edit:
  """Something that happens to a file: the name of an accident, a seed for its dice, and a JSON value as text."""

  file: str
  accident: str
  seed: int
  raw: str


@dataclasses.dataclass(frozen=True)
class Input:
  """A command line, run in a folder that holds EXPERIMENT, RUN, PROMPTS and GOLDEN, once `edits` happened to them."""

  kind: str
  program: str
  args: tuple[str, ...]
  edits: tuple[Edit, ...] = ()


# --- values -------------------------------------------------------------------------------------------------

_INTEGERS = (0, 1, -1, 2, 3, 4, 5, 8, 7, 16, 48, 64, 1000, 10**6, 2**31 - 1, 2**31, 2**32, 2**63, 10**30, -(2**63))
_FLOATS = (0.0, 1.0, 0.5, 0.1, 1e-8, -1.0, 1e30, 1e308, 5e-324, math.nan, math.inf, -math.inf)
_TEXTS = (
  '', 'None', 'True', '[]', '()', '{}', '(1,)', '1e400', '0x10', '1_0', ' 1', '1 ', 'nan', '-', '=', '9' * 5000,
  '[' * 3000, 'x' * 300, 'x/' * 3000, '../..', '/', '/dev/null', '/dev/null/x', '.', '~', 'http://x', 'file:///x',
  '%s%n', '$(true)', '\n', '\t', '\x1b[0m', '\u202e', os.fsdecode(b'\xff\xfe'), '(?', '*', '__class__', 'nope.py',
)  # fmt: skip
_RAW = (
  'null', 'true', '[]', '{}', '""', '-1', '0', '1', '2', '0.5', '1e400', 'NaN', '-Infinity', '9' * 5000, '1' + '0' * 30,
  '[' * 100_000, '{"a":' * 5000, '"\\ud800"', '"x"', '[1, 2', "'x'", '[[]]', '{"a": 1, "a": 2}', '"../../x"', '"/x"',
  '1' + '0' * 12, '-' + '1' * 19, '\x00', '"' + 'x' * 10_000 + '"', '',
)  # fmt: skip


def _text() -> st.SearchStrategy[str]:
  """What may stand on a command line: anything without NUL; no path that leads out but those listed."""
  drawn = st.text(st.characters(exclude_characters='\x00/', exclude_categories=['Cs']), max_size=20)
  return st.one_of(st.sampled_from(_TEXTS), drawn.filter(lambda text: '..' not in text))


def _raw() -> st.SearchStrategy[str]:
  number = st.one_of(st.integers().map(str), st.floats().map(repr))
  return st.one_of(st.sampled_from(_RAW), number)


def _value(hint: Any) -> st.SearchStrategy[str]:
  """Text for a config key or flag of this type, mostly of that type."""
  if typing.get_origin(hint) is Literal:
    right = st.sampled_from(typing.get_args(hint))
  elif hint is int or int in typing.get_args(hint):
    right = st.one_of(st.sampled_from(_INTEGERS), st.integers(), st.integers(1, 64)).map(str)
  elif hint is float or float in typing.get_args(hint):
    right = st.one_of(st.sampled_from(_FLOATS), st.floats(), st.floats(0, 1)).map(repr)
  elif hint is bool:
    right = st.sampled_from(['True', 'False', 'true', '0'])
  elif typing.get_origin(hint) is tuple:
    right = st.lists(_text(), max_size=3).map(lambda texts: repr(tuple(texts)))
  else:
    right = _text()
  return st.one_of(right, right, _text())


def keys(cls: type = Config, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """(dotted path, type) of every key of a config; of its groups too."""
  for name, hint in typing.get_type_hints(cls).items():
    yield prefix + name, hint
    if dataclasses.is_dataclass(hint):
      yield from keys(hint, f'{prefix}{name}.')


# --- inputs -------------------------------------------------------------------------------------------------


@st.composite
def overrides(draw: Callable) -> Input:
  """--config.a.b=value for every key there is."""
  args = []
  for _ in range(draw(st.integers(1, 3))):
    key, hint = draw(st.sampled_from(list(keys())))
    args.append(f'--config.{key}={draw(_value(hint))}')
  return Input('override', 'train', (_CONFIG, '--dry_run', *args))


KINDS: dict[str, tuple[Callable[[], st.SearchStrategy[Input]], float]] = {'override': (overrides, 0.3)}


def draw(count: int, seed: int) -> list[Input]:
  """`count` inputs, each kind its share; the same for the same seed."""
  total, drawn = sum(share for _, share in KINDS.values()), []
  for make, share in KINDS.values():
    drawn += _draw(make(), math.ceil(count * share / total), seed)
  return drawn


def _draw(strategy: st.SearchStrategy[Input], count: int, seed: int) -> list[Input]:
  drawn: list[Input] = []

  @hypothesis.seed(seed)
  @hypothesis.settings(
    max_examples=2 * count,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(strategy)
  def take(one: Input) -> None:
    drawn.append(one)

  take()
  return drawn[:count]
