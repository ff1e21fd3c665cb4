"""What happens to one file: (file, dice, raw text of a JSON value) -> what was done to it, in words."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_HOLE = '@the hole@'
_LENGTH = 8  # bytes at the start of a safetensors file, which say how long its header is


def flip(file: Path, dice: random.Random, raw: str = '') -> str:
  """One bit; nothing where there is none."""
  data = bytearray(file.read_bytes())
  if not data:
    return 'nothing, it is empty'
  place, bit = dice.randrange(len(data)), dice.randrange(8)
  data[place] ^= 1 << bit
  file.write_bytes(data)
  return f'bit {bit} of byte {place} flipped'


def truncate(file: Path, dice: random.Random, raw: str = '') -> str:
  size = dice.randrange(file.stat().st_size or 1)
  file.write_bytes(file.read_bytes()[:size])
  return f'truncated to {size} bytes'


def append(file: Path, dice: random.Random, raw: str = '') -> str:
  file.write_bytes(file.read_bytes() + (_bytes(raw) or b'\0'))
  return 'appended'


def delete(file: Path, dice: random.Random, raw: str = '') -> str:
  file.unlink()
  return 'deleted'


def become_a_folder(file: Path, dice: random.Random, raw: str = '') -> str:
  file.rename(file.with_name(f'{file.name}.was_here'))
  file.mkdir()
  return 'a folder stands there instead'


def overwrite(file: Path, dice: random.Random, raw: str = '') -> str:
  file.write_bytes(_bytes(raw))
  return 'holds something else'


def _bytes(raw: str) -> bytes:
  return raw.encode(errors='surrogatepass')


# --- JSON ---------------------------------------------------------------------------------------------------


def set_a_value(file: Path, dice: random.Random, raw: str) -> str:
  """One value anywhere in a JSON file, or in one line of a JSON lines file, becomes `raw`."""

  def change(values: Any) -> str:
    holder, key, name = dice.choice(list(_places(values)))
    holder[key] = _HOLE
    return f'{name} = {raw[:40]}'

  return _edit(file, dice, raw, change)


def remove_a_value(file: Path, dice: random.Random, raw: str) -> str:
  def change(values: Any) -> str:
    holder, key, name = dice.choice(list(_places(values)))
    del holder[key]
    return f'{name} removed'

  return _edit(file, dice, raw, change)


def add_a_key(file: Path, dice: random.Random, raw: str) -> str:
  def change(values: Any) -> str:
    values['unheard_of'] = _HOLE
    return f'unheard_of = {raw[:40]}'

  return _edit(file, dice, raw, change)


def _edit(file: Path, dice: random.Random, raw: str, change: Callable[[Any], str]) -> str:
  lines = file.read_text().splitlines() if file.suffix == '.jsonl' else [file.read_text()]
  which = dice.randrange(len(lines))
  values = json.loads(lines[which])
  said = change(values)
  lines[which] = json.dumps(values).replace(json.dumps(_HOLE), raw)
  file.write_text('\n'.join(lines) + '\n')
  return said if len(lines) == 1 else f'line {which + 1}: {said}'


def _places(values: Any, prefix: str = '') -> Iterator[tuple[Any, Any, str]]:
  """(holder, key, name) of everything inside `values`."""
  items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
  for key, value in items:
    yield values, key, f'{prefix}{key}'
    yield from _places(value, f'{prefix}{key}.')


# --- safetensors --------------------------------------------------------------------------------------------


def lie_about_the_length(file: Path, dice: random.Random, raw: str) -> str:
  """The length of the header that a safetensors file states."""
  data = file.read_bytes()
  true = int.from_bytes(data[:_LENGTH], 'little')
  said = dice.choice([0, 1, true - 1, true + 1, len(data), 10**8, 2**31, 2**40, 2**63, 2**64 - 1])
  file.write_bytes(said.to_bytes(_LENGTH, 'little') + data[_LENGTH:])
  return f'header of {said} bytes announced, it has {true}'


def replace_the_header(file: Path, dice: random.Random, raw: str) -> str:
  return _with_header(file, lambda header: raw, f'header = {raw[:40]}')


def edit_the_header(file: Path, dice: random.Random, raw: str) -> str:
  """One tensor's dtype, shape, offsets or name."""
  said = []

  def change(text: str) -> str:
    header = json.loads(text)
    name = dice.choice(sorted(header.keys() - {'__metadata__'}))
    tensor, part = header[name], dice.choice(['dtype', 'shape', 'shape', 'data_offsets', 'name', 'key'])
    if part == 'name':
      header['unheard.of'] = header.pop(name)
    elif part == 'key':
      del tensor[dice.choice(sorted(tensor))]
    else:
      tensor[part] = dice.choice([_HOLE, *_OTHER[part](tensor[part])])
    said.append(f'{name}: {part} = {tensor.get(part)}'.replace(_HOLE, raw[:40]))
    return json.dumps(header).replace(json.dumps(_HOLE), raw)

  return _with_header(file, change, '') + said[0]


_OTHER: dict[str, Callable[[Any], list]] = {
  'dtype': lambda was: ['F64', 'I8', 'BOOL', 'F8_E4M3', 'BF16', 'X9'],
  'shape': lambda was: [[2**40, 2**40], [2**62], [0], [*was, 1], was[:-1], was[::-1], [-1], [1] * 70, [2**20] * 3],
  'data_offsets': lambda was: [was[::-1], [0, 2**62], [was[0], was[1] + 4], [was[0] + 4, was[1]], [0, 0], [-8, 0]],
}


def _with_header(file: Path, change: Callable[[str], str], said: str) -> str:
  data = file.read_bytes()
  end = _LENGTH + int.from_bytes(data[:_LENGTH], 'little')
  header = change(data[_LENGTH:end].decode()).encode()
  file.write_bytes(len(header).to_bytes(_LENGTH, 'little') + header + data[end:])
  return said


BYTES = (flip, truncate, append, delete, become_a_folder, overwrite)
JSON = (set_a_value, set_a_value, set_a_value, remove_a_value, add_a_key, *BYTES)
SAFETENSORS = (*[edit_the_header] * 4, *[lie_about_the_length] * 2, replace_the_header, *BYTES)
BY_NAME = {accident.__name__: accident for accident in {*JSON, *SAFETENSORS}}
