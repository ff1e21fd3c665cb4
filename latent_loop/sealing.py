"""From configs to what people edit and back.

dataclass --view()--> ConfigDict, edited by experiments/*.py and --config.a.b=value
          <--seal()-- checked: unknown, missing or mistyped values are refused, by path
"""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

from latent_loop.config import Config
from latent_loop.config.rules import require
from latent_loop.errors import BadInput

# --- view: dataclass -> ConfigDict ------------------------------------------------------------------


def view(config: Any) -> ml_collections.ConfigDict:
  """The editable ConfigDict of a (sealed) config: every key exists and keeps its type."""
  hints = typing.get_type_hints(type(config))
  out = ml_collections.ConfigDict()
  for f in dataclasses.fields(config):
    value = vars(config)[f.name]
    if dataclasses.is_dataclass(value):
      out[f.name] = view(value)
    elif type(None) in typing.get_args(hints[f.name]):
      concrete = next(t for t in typing.get_args(hints[f.name]) if t is not type(None))
      out[f.name] = config_dict.placeholder(concrete)  # a plain None would lose the type
      out[f.name] = value
    else:
      out[f.name] = value
  return out


# --- seal: ConfigDict or dict -> dataclass ----------------------------------------------------------


def seal(values: Any, cls: type = Config, path: str = 'config') -> Any:
  """The frozen, validated `cls` that `values` (ConfigDict or plain dict) describes.

  Raises BadInput, naming the path, for unknown keys, missing keys and values of the wrong type.
  """
  hints = typing.get_type_hints(cls)
  given = dict(values.items())
  for name in given:
    _check_known(name, hints, path)
  missing = [name for name in hints if name not in given]
  if missing:
    names = ', '.join(f'{path}.{name}' for name in missing)
    raise BadInput(f'{names}: missing; start from latent_loop.sealing.view(Config()), which has every key')
  return cls(**{name: _seal_value(given[name], hints[name], f'{path}.{name}') for name in hints})


def _check_known(name: str, known: typing.Iterable[str], path: str) -> None:
  if name not in known:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f'the keys here are: {", ".join(known)}'
    raise BadInput(f'{path}.{name}: unknown key; {hint}')


def check_key(dotted: str) -> None:
  """Raises BadInput, with the nearest name, unless 'model.width' and the like is a key of Config."""
  cls, path = Config, 'config'
  for name in dotted.split('.'):
    hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
    _check_known(name, hints, path)
    cls, path = hints[name], f'{path}.{name}'


def _seal_value(value: Any, hint: Any, path: str) -> Any:
  if dataclasses.is_dataclass(hint):
    require(hasattr(value, 'items'), f'{path}={_show(value)}: not a group of keys; edit its fields instead')
    return seal(value, hint, path)
  if typing.get_origin(hint) is Literal:
    choices = typing.get_args(hint)
    known = isinstance(value, str) and value in choices
    require(known, f'{path}={_show(value)}: not known; choose one of {", ".join(choices)}')
    return value
  if typing.get_origin(hint) is types.UnionType:
    if value is None:
      return None
    hint = next(t for t in typing.get_args(hint) if t is not type(None))
  if typing.get_origin(hint) is tuple:
    require(isinstance(value, (tuple, list)), f'{path}={_show(value)}: not a tuple; write it as (a, b)')
    return tuple(_seal_value(v, typing.get_args(hint)[0], f'{path}[{i}]') for i, v in enumerate(value))
  if type(value) is int:
    require(abs(value) < _LARGEST, f'{path}={_show(value)}: it has more than 64 bits; give a smaller number')
    value = float(value) if hint is float else value
  kind = type(value).__name__
  require(type(value) is hint, f'{path}={_show(value)}: a {kind}; the rule is {hint.__name__}, give one')
  require(hint is not float or math.isfinite(value), f'{path}={value!r}: not a finite number; give one')
  require(hint is not str or _is_text(value), f'{path}={_show(value)}: not text that UTF-8 can write; give other text')
  return value


_LARGEST = 2**63


def _is_text(value: str) -> bool:
  return not any('\ud800' <= letter <= '\udfff' for letter in value)


def _show(value: Any) -> str:
  """A value of the user's for a sentence: not too long, and Python writes no number of thousands of digits."""
  if type(value) is int and abs(value) >= _LARGEST:
    return f'{"-" if value < 0 else ""}2**{value.bit_length() - 1}...'
  try:
    text = ' '.join(repr(value).split())  # that of a ConfigDict has lines
  except ValueError:  # such a number is somewhere inside
    return f'a {type(value).__name__}'
  return text if len(text) <= 200 else f'{text[:200]}...'


# --- sealed configs as text --------------------------------------------------------------------------


def to_json(config: Config) -> str:
  return json.dumps(dataclasses.asdict(config), indent=2) + '\n'


def write_experiment(config: Config, path: Path) -> Path:
  """An experiment file of `config`, for the --config of a process of its own."""
  path.write_text(
    'from latent_loop.sealing import from_json, view\n\n\n'
    f'def get_config():\n  return view(from_json({to_json(config)!r}, {str(path)!r}))\n'
  )
  return path


def from_json(text: str, path: str) -> Config:
  """The config in `text`, which was read from `path`; raises BadInput when it is not one."""
  try:
    values = json.loads(text)
    require(isinstance(values, dict), 'not a JSON object')
    return seal(values)
  except (ValueError, RecursionError) as error:  # of json, or BadInput
    raise BadInput(
      f'{path}: not a sealed config ({error}); restore the file, or, where an older version of the code wrote it, add '
      'what is missing with the defaults of latent_loop/config/'
    ) from error


def fingerprint(config: Config) -> str:
  """A short hash that two configs share only when every value is equal."""
  return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
  """Dotted path -> (old, new) for every value that differs."""
  a, b = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(new))
  return {key: (a[key], b[key]) for key in a if a[key] != b[key]}


def flat(values: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Dotted path -> value, of a nested dict."""
  found = {}
  for key, value in values.items():
    found |= flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {f'{prefix}{key}': value}
  return found
