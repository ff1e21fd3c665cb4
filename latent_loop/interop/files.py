"""JSON and safetensors files that someone else wrote; what is wrong with them is said as BadInput."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from latent_loop.errors import BadInput

_FLOATS = ('F32', 'F16', 'BF16')  # what becomes float32 without loss
_INTEGERS = ('I32', 'I64')


def read_json(path: Path) -> dict[str, Any]:
  try:
    values = json.loads(path.read_bytes(), parse_int=_integer)
  except FileNotFoundError as error:
    raise BadInput(f'{path}: no such file; give a folder that holds {path.name}') from error
  except (OSError, ValueError, RecursionError) as error:
    raise BadInput(f'{path}: not a readable JSON file ({error}); download or write it again') from error
  if not isinstance(values, dict):
    raise BadInput(f'{path}: holds a {type(values).__name__}; the rule is one JSON object, write it again')
  return values


def _integer(digits: str) -> int:
  """Numbers beyond this are nobody's size, and turn into no float."""
  if len(digits) > 18:
    raise ValueError(f'the number {digits[:18]}... is too large')
  return int(digits)


def entry(path: Path, values: dict[str, Any], key: str, kind: type) -> Any:
  """values[key], which was read from `path`; raises BadInput when it is missing or of another type."""
  if key not in values:
    raise BadInput(f'{path}: key {key!r} is missing; add it')
  value = values[key]
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    raise BadInput(f'{path}: {key}={value!r} is a {type(value).__name__}; the rule is {kind.__name__}, give one')
  return value


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
  try:
    with safe_open(path, framework='np') as file:
      yield file
  except FileNotFoundError as error:
    raise BadInput(f'{path}: no such file; download it again') from error
  except (OSError, SafetensorError) as error:
    raise BadInput(f'{path}: not a whole safetensors file ({error}); download or write it again') from error


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
  """Name -> shape of every tensor in a file; reads its header only."""
  with _opened(path) as file:
    return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def read_tensor(path: Path, name: str, integer: bool = False) -> np.ndarray:
  """One tensor as float32, or as int64 where `integer`; raises BadInput when it is missing or of another kind."""
  with _opened(path) as file:
    if name not in file.keys():
      raise BadInput(f'{path}: tensor {name!r} is missing; write the file again with it')
    stored = file.get_slice(name).get_dtype()
    allowed, dtype = (_INTEGERS, np.int64) if integer else (_FLOATS, np.float32)
    if stored not in allowed:
      raise BadInput(
        f'{path}: tensor {name!r} is stored as {stored}; the rule is one of {", ".join(allowed)}, convert it'
      )
    return file.get_tensor(name).astype(dtype)
