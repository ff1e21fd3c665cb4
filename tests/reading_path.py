"""Follows the calls of one training step through the source, for test_house.py.

A call is followed by name: to a function or class of the same module or of an import, or to every method
of that name in the package. A class on the path counts whole, and a module-level table (BLOCKS, LAWS, ...)
leads to all it holds. So the count is an upper bound of what a newcomer reads.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Rooms of the step. Calls that leave them (data, checkpoints, writers, kernels, finding devices) are not part of it.
ROOMS = (
  'latent_loop/step.py',
  'latent_loop/model/',
  'latent_loop/optim/',
  'latent_loop/parallel/sharding.py',
  'latent_loop/parallel/weights.py',
  'latent_loop/trust/guards.py',
  'latent_loop/batch.py',
)
ROOTS = (
  ('latent_loop.step', 'make_sharded_state'),
  ('latent_loop.step', 'make_train_step'),
  ('latent_loop.optim', 'make_optimizer'),
  ('latent_loop.model', 'build'),
  ('latent_loop.metrics', 'Mean'),
  ('latent_loop.loop', 'prepare'),
  ('latent_loop.loop', 'run'),
)


class Module:
  """Top-level definitions of one file, and where its imported names come from."""

  def __init__(self, path: Path):
    self.name = path.relative_to(ROOT).as_posix()
    self.defs: dict[str, ast.AST] = {}
    self.imports: dict[str, str] = {}
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        self.defs[node.name] = node
      elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Dict):
          self.defs[target.id] = node
      elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('latent_loop'):
        for alias in node.names:
          self.imports[alias.asname or alias.name] = f'{node.module}.{alias.name}'


def modules() -> dict[str, Module]:
  """Dotted name -> Module for every file of the package."""
  out = {}
  for path in sorted((ROOT / 'latent_loop').rglob('*.py')):
    dotted = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    out[dotted] = Module(path)
  return out


def _lookup(mods: dict[str, Module], dotted: str) -> tuple[str, str] | None:
  module, _, name = dotted.rpartition('.')
  if module not in mods:
    return None
  if name in mods[module].defs:
    return module, name
  again = mods[module].imports.get(name)
  return _lookup(mods, again) if again and again != dotted else None


def _callees(mods: dict[str, Module], module: str, node: ast.AST) -> set[tuple[str, str]]:
  here, found = mods[module], set()
  for part in ast.walk(node):
    if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
      if part.id in here.defs:
        found.add((module, part.id))
      elif part.id in here.imports:
        found.add(_lookup(mods, here.imports[part.id]))
    elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
      if part.value.id in here.imports:
        found.add(_lookup(mods, f'{here.imports[part.value.id]}.{part.attr}'))
  found.discard(None)
  return {(m, name) for m, name in found if mods[m].name.startswith(ROOMS)}


def step_path() -> dict[str, int]:
  """'file:function' -> lines, from the loop to all that a training step runs."""
  mods = modules()
  todo, seen = list(ROOTS), {'launch/train.py:main': lines_of('launch/train.py', 'main')}
  while todo:
    module, name = todo.pop()
    key = f'{mods[module].name}:{name}'
    if key not in seen:
      node = mods[module].defs[name]
      first = min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', []))])
      seen[key] = node.end_lineno - first + 1
      todo += sorted(_callees(mods, module, node))
  return seen


def lines_of(path: str, function: str) -> int:
  node = _function(path, function)
  return node.end_lineno - node.lineno + 1


def calls_in(path: str, function: str) -> set[str]:
  """Text of every called expression inside a function: {'loop.run', 'this.train_step', ...}."""
  return {ast.unparse(part.func) for part in ast.walk(_function(path, function)) if isinstance(part, ast.Call)}


def _function(path: str, function: str) -> ast.FunctionDef:
  tree = ast.parse((ROOT / path).read_text())
  return next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
