"""The house keeps its own rules: floors, map, sizes, forbidden words, a short path to the step."""

import ast
import dataclasses
import functools
import re
import subprocess

import pytest

from latent_loop.config import Config
from tests import reading_path
from tests.reading_path import ROOT

PACKAGE = sorted((ROOT / 'latent_loop').rglob('*.py'))
CODE = PACKAGE + sorted((ROOT / 'launch').glob('*.py')) + sorted((ROOT / 'experiments').rglob('*.py'))
WORKSPACE = (ROOT / 'WORKSPACE.md').read_text()


def relative(path) -> str:
  return path.relative_to(ROOT).as_posix()


def section(title: str) -> str:
  return WORKSPACE.split(f'## {title}\n')[1].split('\n## ')[0]


def floors() -> dict[str, int]:
  """Room ('latent_loop/step.py' or 'latent_loop/model/') -> floor, from the table in WORKSPACE.md."""
  out = {}
  for line in section('Floors').splitlines():
    cells = [cell.strip() for cell in line.split('|')]
    if len(cells) > 3 and cells[1].isdigit():
      for room in re.findall(r'`([^`]+)`', cells[2]):
        out[f'latent_loop/{room}' + ('' if room.endswith('/') else '.py')] = int(cells[1])
  return out


def room_of(path: str, rooms) -> str:
  hits = [room for room in rooms if path == room or (room.endswith('/') and path.startswith(room))]
  assert len(hits) == 1, f'{path}: {len(hits)} rooms in the floors table of WORKSPACE.md, want 1'
  return hits[0]


def imports_of(path):
  """Dotted names of this package that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('latent_loop'):
      for alias in node.names:
        yield f'{node.module}.{alias.name}'


def file_of(dotted: str) -> str:
  """The file that a dotted import reads: a module, a package, or the module of a name."""
  for candidate in (dotted, dotted.rpartition('.')[0]):
    base = ROOT / candidate.replace('.', '/')
    if base.with_suffix('.py').exists():
      return relative(base.with_suffix('.py'))
    if (base / '__init__.py').exists():
      return relative(base / '__init__.py')
  raise AssertionError(f'{dotted}: no such module')


@pytest.mark.parametrize('path', PACKAGE, ids=relative)
def test_imports_go_down(path):
  table = floors()
  here = room_of(relative(path), table)
  for dotted in imports_of(path):
    there = room_of(file_of(dotted), table)
    assert there == here or table[there] < table[here], (
      f'{relative(path)} (floor {table[here]}) imports {dotted} (floor {table[there]}); imports go down'
    )


def test_libraries_stay_in_their_rooms():
  rules = {
    'flax': 'latent_loop/model/',
    'orbax': 'latent_loop/checkpoint/',
    'grain': 'latent_loop/data/',
    'absl': 'launch/',
    'matplotlib': 'latent_loop/report/',
    'safetensors': 'latent_loop/interop/',
    'tensorstore': 'latent_loop/storage/',
    'fsspec': 'latent_loop/storage/',
    'starlette': 'latent_loop/serving/',
    'uvicorn': 'latent_loop/serving/',
  }
  for path in CODE:
    for node in ast.walk(ast.parse(path.read_text())):
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
      names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
      for name in names:
        room = rules.get(name.split('.')[0])
        assert room is None or relative(path).startswith(room), (
          f'{relative(path)} imports {name}, allowed in {room} only'
        )


def test_the_map_lists_every_file_once():
  command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard']
  tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
  files = {f for f in tracked if (ROOT / f).exists() and not f.startswith('tests/golden/')}
  if not files:
    pytest.fail('git lists no files; run the tests in a git checkout')
  listed = re.findall(r'^\| `([^`]+)` \|', section('Map'), flags=re.MULTILINE)
  assert len(listed) == len(set(listed)), 'a file stands twice in the map'
  assert set(listed) == files, f'not in the map: {sorted(files - set(listed))}; gone: {sorted(set(listed) - files)}'


def test_files_and_functions_stay_small():
  for path in CODE:
    text = path.read_text()
    assert len(text.splitlines()) <= 400, f'{relative(path)}: over 400 lines; move the walls'
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef):
        lines = node.end_lineno - node.lineno + 1
        assert lines <= 60, f'{relative(path)}:{node.name} has {lines} lines, over 60'
        arguments = [a for a in node.args.args if a.arg != 'self']
        assert len(arguments) <= 8, f'{relative(path)}:{node.name} takes {len(arguments)} arguments'


@pytest.mark.parametrize(
  'pattern',
  [r'os\.environ', r'except Exception', r'except:', r'nnx\.jit', r'nnx\.scan', r'nnx\.Optimizer', r'TODO', r'XXX',
   r'config\.get\(', r'cfg\.get\(', r'getattr\((config|cfg)', r'import tensorflow'],
)  # fmt: skip
def test_forbidden_words(pattern):
  for path in PACKAGE:
    hit = re.search(pattern, path.read_text())
    assert hit is None, f'{relative(path)} contains {hit.group()!r}'


def test_the_loop_over_depth_is_written_once():
  for path in PACKAGE:
    if relative(path) != 'latent_loop/model/depth_loop.py':
      tree = ast.parse(path.read_text())
      loops = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Call) and 'fori_loop' in ast.unparse(n.func)]
      assert not any('apply_core' in loop for loop in loops), f'{relative(path)} loops over the core by itself'


def config_fields():
  for section_field in dataclasses.fields(Config):
    value = vars(Config())[section_field.name]
    if dataclasses.is_dataclass(value):
      yield from ((section_field.name, f.name) for f in dataclasses.fields(value))
    else:
      yield ('', section_field.name)


@functools.cache
def attributes_read() -> set[str]:
  """Names of attributes that the package reads, outside the validation of configs."""
  trees = [ast.parse(path.read_text()) for path in PACKAGE]
  checks = {
    id(part)
    for tree in trees
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef) and node.name == '__post_init__'
    for part in ast.walk(node)
  }
  nodes = [node for tree in trees for node in ast.walk(tree) if id(node) not in checks]
  return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize('group,name', list(config_fields()))
def test_every_config_field_is_read(group, name):
  assert name in attributes_read(), f'config.{group}.{name} is read nowhere but in its own validation'


def test_a_step_is_read_in_under_900_lines_and_two_hops():
  path = reading_path.step_path()
  assert 'loop.run' in reading_path.calls_in('launch/train.py', 'main'), 'first hop: launch/train.py:main to loop.run'
  assert 'this.train_step' in reading_path.calls_in('latent_loop/loop.py', 'run'), 'second hop: loop.run to the step'
  assert sum(path.values()) <= 900, f'{sum(path.values())} lines to read'
  listed = set(re.findall(r'`([\w/.]+\.py:\w+)`', section('One training step')))
  assert listed == set(path), f'not listed: {sorted(set(path) - listed)}; not on the path: {sorted(listed - set(path))}'


def test_no_machine_path_in_tracked_files():
  for path in [*CODE, *sorted(ROOT.glob('*.md')), ROOT / 'requirements.txt', *sorted((ROOT / 'launch').glob('*.sh'))]:
    assert not re.search(r'/(root|home|work|Users)/\w', path.read_text()), (
      f'{relative(path)} names a path of one machine'
    )
