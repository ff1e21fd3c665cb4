"""JSON and safetensors files that someone else wrote; what is wrong with them is said as BadInput."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from latent_loop.errors import BadInput

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
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


def read_lines(path: Path) -> list[dict[str, Any]]:
  """Of a .jsonl."""
  try:
    return [json.loads(line, parse_int=_integer) for line in path.read_text(encoding='utf-8').splitlines()]
  except (OSError, ValueError, RecursionError) as error:
    raise BadInput(f'{path}: not readable JSON lines ({error}); write them again') from error


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


def tensor_files(folder: Path) -> dict[str, Path]:
  """Tensor name -> the file that holds it: one file, or the shards of an index."""
  if not folder.is_dir():
    raise BadInput(f'{folder}: no such folder; give one that holds config.json and {WEIGHTS}')
  if (folder / WEIGHTS).exists():
    return dict.fromkeys(tensor_shapes(folder / WEIGHTS), folder / WEIGHTS)
  index = folder / INDEX
  if not index.exists():
    raise BadInput(f'{folder}: holds neither {WEIGHTS} nor {INDEX}; download the weights')
  shards = entry(index, read_json(index), 'weight_map', dict)
  for name, shard in shards.items():
    if not isinstance(shard, str) or Path(shard).name != shard:
      raise BadInput(f'{index}: {name} lies in {shard!r}; the rule is a file name in the same folder, correct it')
  return {name: folder / shard for name, shard in shards.items()}


def read_shaped(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
  stored = read_tensor(path, name)
  if stored.shape != shape:
    raise BadInput(f'{path}: {name} has shape {stored.shape}; by its config it must have {shape}, so they do not match')
  return stored


def locate(folder: Path, name: str) -> Path:
  where = tensor_files(folder)
  if name not in where or name not in tensor_shapes(where[name]):
    raise BadInput(f'{folder}: tensor {name!r} is missing from the weights; download them again')
  return where[name]
