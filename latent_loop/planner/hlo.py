"""Collectives of a compiled program, read from its optimized HLO text, with the loops around each.

XLA's own cost analysis counts the body of a loop once, whatever its trip count; here every collective knows the
loops it stands in, so that bytes per step follow from the realized depth.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

_KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', 'collective-broadcast')
_BYTES = {'pred': 1, 'bf16': 2, 'f16': 2, 'f32': 4, 'f64': 8}
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_CALLS = re.compile(r'(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')
_LIMIT = re.compile(r's32\[\]\S* constant\((\d+)\)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_SHAPE = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
_GROUPS_LISTED = re.compile(r'replica_groups=\{\{([\d,]+)\}')
_GROUPS_IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_PAIRS = re.compile(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}')
_TRIPS = re.compile(r'known_trip_count\\?"?:\s*\{\s*\\?"n\\?"\s*:\s*\\?"(\d+)')


@dataclasses.dataclass(frozen=True)
class Loop:
  """trips: None where the program learns them when it runs."""

  scope: str  # the JAX name stack of the loop
  trips: int | None


@dataclasses.dataclass(frozen=True)
class Collective:
  """size_bytes: of the whole array that is gathered or reduced, on one device.

  sent_bytes: what one device sends, with a ring; all that it holds in a permute. axes: the mesh axes it runs over.
  loops: outermost first.
  """

  kind: str
  size_bytes: int
  sent_bytes: int
  axes: tuple[str, ...]
  loops: tuple[Loop, ...]
  scope: str

  def inside(self, scope: str) -> bool:
    """Whether it stands in a loop of that scope."""
    return any(scope in loop.scope for loop in self.loops)

  def bytes_per_step(self, n: int) -> int:
    """Bytes sent per run of the program, where loops of unknown length run n times."""
    return self.sent_bytes * math.prod(n if loop.trips is None else loop.trips for loop in self.loops)


def collectives(hlo_text: str, mesh: Mesh) -> list[Collective]:
  """Every collective of the program between at least two devices, in the order of the text."""
  computations, entry = _computations(hlo_text)
  return [c for c in _walk(computations, entry, (), mesh) if c.sent_bytes]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Name -> right-hand sides of its instructions; the entry's name."""
  found: dict[str, list[str]] = {}
  entry, lines = '', []
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      lines = found.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif instruction := _INSTRUCTION.match(line):
      lines.append(instruction[2])
  return found, entry


def _walk(computations: dict, name: str, loops: tuple[Loop, ...], mesh: Mesh) -> Iterator[Collective]:
  for line in computations.get(name, ()):
    op = _op(line)
    base = op.removesuffix('-start')
    if base in _KINDS:
      # The TPU compiler's reduce-scatter is an all-reduce in a fusion that keeps one part.
      kind = 'reduce-scatter' if name.startswith('all-reduce-scatter') else base
      yield _collective(line, base, kind, loops, mesh)
    elif not op.endswith(('-done', '-update')):
      called = _CALLS.findall(line)
      for branches in _BRANCHES.findall(line):
        called += [branch.strip().lstrip('%') for branch in branches.split(',')]
      inner = (*loops, Loop(_scope(line), _trips(line, computations))) if op == 'while' else loops
      for target in called:
        yield from _walk(computations, target, inner, mesh)


def _op(line: str) -> str:
  """The opcode: the first word before a parenthesis that follows the type, which may itself hold parentheses."""
  depth = 0
  for i, char in enumerate(line):
    depth += (char in '([{') - (char in ')]}')
    if char == ' ' and depth == 0:
      return line[i + 1 :].partition('(')[0]
  return ''


def _scope(line: str) -> str:
  found = re.search(r'op_name="([^"]*)"', line)
  return found[1] if found else ''


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
  """What the compiler noted, or else the one constant that the loop's condition compares its counter with."""
  if found := _TRIPS.search(line):
    return int(found[1])
  condition = computations[_CONDITION.search(line)[1]]
  limits = {int(m[1]) for part in condition if (m := _LIMIT.match(part))}
  return limits.pop() if len(limits) == 1 else None


def _collective(line: str, op: str, kind: str, loops: tuple[Loop, ...], mesh: Mesh) -> Collective:
  groups = _groups(line, mesh)
  axes, ways = _axes(groups, mesh), groups.shape[1]
  start = f'{op}-start(' in line
  shapes = _SHAPE.findall(line[: line.index(f' {op}')])
  sizes = [math.prod(map(int, filter(None, dims.split(',')))) * _item_bytes(dtype) for dtype, dims in shapes]
  if start and kind == 'all-gather':
    sizes = sizes[len(sizes) // 2 :]  # operands stand before results
  elif start and kind == 'collective-permute':
    sizes = [max(sizes)]
  size = sum(sizes) * (ways if op == 'reduce-scatter' else 1)
  passes = 2 if kind == 'all-reduce' else 1
  sent = size * bool(axes) if kind == 'collective-permute' else passes * size * (ways - 1) // ways
  return Collective(kind, size, sent, axes, loops, _scope(line))


def _item_bytes(dtype: str) -> int:
  return _BYTES.get(dtype) or max(int(re.sub(r'\D', '', dtype.partition('e')[0]) or 8) // 8, 1)


def _groups(line: str, mesh: Mesh) -> np.ndarray:
  """Of a permute all pairs, one a row; of another collective one group, which is as all of them are."""
  if listed := _GROUPS_LISTED.search(line):
    return np.array([[int(i) for i in listed[1].split(',')]])
  if iota := _GROUPS_IOTA.search(line):
    ints = lambda text: [int(i) for i in text.split(',')]
    ids = np.arange(math.prod(ints(iota[2]))).reshape(ints(iota[2]))
    ids = ids.transpose(ints(iota[3])) if iota[3] else ids
    return ids.reshape(ints(iota[1]))[:1]
  if pairs := _PAIRS.search(line):
    return np.array(re.findall(r'\d+', pairs[1]), int).reshape(-1, 2)
  return np.arange(mesh.size)[None]


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
  """The axes that vary within a group."""
  places = np.stack(np.unravel_index(groups, mesh.devices.shape))
  varying = (places != places[..., :1]).any(axis=(1, 2))
  return tuple(name for name, varies in zip(mesh.axis_names, varying, strict=True) if varies)
