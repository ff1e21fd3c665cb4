"""Inputs that hypothesis draws: command lines, and what happened to the files that they name.

Where they are right they are cheap: a dry run, a plan that is only counted, a training that stops after a step.
"""

import dataclasses
import itertools
import math
import os
import random
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from latent_loop.chaos import accidents, corrupt
from latent_loop.config import Config
from latent_loop.errors import BadInput

try:
  import hypothesis
  from hypothesis import strategies as st
except ImportError as error:
  raise BadInput(f'hypothesis is not installed ({error}); pip install -r launch/requirements/dev.txt') from error

EXPERIMENT, PROMPTS = 'experiment.py', 'prompts.txt'
RUN, STOPPED, GOLDEN, SHARDED = 'run', 'stopped', 'golden', 'sharded'  # STOPPED has steps to do
NAMES = (EXPERIMENT, PROMPTS, RUN, STOPPED, GOLDEN, SHARDED)
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
  """A command line, run in a folder that holds the files named above, once `edits` happened to them."""

  kind: str
  program: str
  args: tuple[str, ...]
  edits: tuple[Edit, ...] = ()


_CHECKPOINT_ACCIDENTS = tuple(dict.fromkeys(kind.__name__ for kind in corrupt.KINDS))


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
  for _ in range(draw(st.integers(1, 2))):
    key, hint = draw(st.sampled_from(list(keys())))
    args.append(f'--config.{key}={draw(_value(hint))}')
  program, *rest = draw(st.sampled_from(_WITH_CONFIG))
  return Input('override', program, (*rest, *args))


_WITH_CONFIG = (
  *[('train', _CONFIG, '--dry_run')] * 8,
  *[('plan', _CONFIG, '--topology=h100:8', '--json')] * 2,
  ('train', _CONFIG, '--workdir=new', _ONE_STEP),
)


@st.composite
def experiments(draw: Callable) -> Input:
  """Experiment files: programs, which may hold anything, do anything and return anything."""
  lines, key, hint = draw(st.sampled_from(_EXPERIMENTS)), *draw(st.sampled_from(list(keys())))
  text = typing.get_origin(hint) is Literal or hint is str
  value = draw(st.one_of(*[_value(hint).map(repr if text else str)] * 3, st.sampled_from(_PYTHON)))
  program_text = lines.format(key=key, value=value) if '{' in lines else lines
  edits = [Edit(EXPERIMENT, 'overwrite', 0, program_text)]
  if draw(st.integers(0, 9)) == 0:
    edits = [Edit(EXPERIMENT, draw(st.sampled_from([a.__name__ for a in accidents.BYTES])), draw(_SEED), '\x00')]
  program, *rest = draw(st.sampled_from(_WITH_CONFIG[:-1]))
  return Input('experiment', program, tuple(rest), tuple(edits))


_HEAD = 'from latent_loop.config import Config\nfrom latent_loop.sealing import view\n\n\ndef get_config():\n'
_EDITED = f'{_HEAD}  config = view(Config())\n  config.{{key}} = {{value}}\n  return config\n'
_FORCED = (
  f'{_HEAD}  config = view(Config())\n  with config.ignore_type(), config.unlocked():\n    config.{{key}} = {{value}}\n'
  '  return config\n'
)
_EXPERIMENTS = (
  *[_EDITED] * 4,
  *[_FORCED] * 6,
  f'{_HEAD}  config = view(Config())\n  del config.{{key}}\n  return config\n',
  f'{_HEAD}  return {{value}}\n',
  f'{_HEAD}  return Config()\n',
  f'{_HEAD}  return get_config()\n',
  f'{_HEAD}  raise SystemExit({{value}})\n',
  f'{_HEAD}  open({{value}})\n',
  'import nothing_of_this_name\n',
  'config = 1 / 0\n',
  'raise MemoryError\n',
  'def get_config(x):\n  return x\n',
  'get_config = 1\n',
  '',
)
_PYTHON = (
  'None',
  'object()',
  'lambda: 0',
  '10**5000',
  'float("nan")',
  '{}',
  '[[]]',
  'b"x"',
  'Config()',
  'view(Config())',
)


@st.composite
def flags(draw: Callable) -> Input:
  """Every other flag of every program."""
  program = draw(st.sampled_from(sorted(_FLAGS)))
  rest, own = _FLAGS[program]
  verb, args = draw(st.sampled_from(rest)).split(), []
  for _ in range(draw(st.integers(1, 2))):
    name, hint = draw(st.sampled_from(own))
    value = st.one_of(st.sampled_from(NAMES), _text()) if hint is Path else _value(hint)
    args.append(f'--{name}={draw(value)}')
  if draw(st.integers(0, 19)) == 0:
    args = [draw(_text())]
  return Input('flag', program, (*verb, *args))


# A depth of a million is no bad input: it takes long.
_DEPTH = Literal['1', '3', '16', '0', '-1', '2147483648', '1e3', '1.5', '9' * 30]
_EXIT = Literal[
  'kl', 'kl:5e-4', 'latent-diff:0.1:2:2', 'kl:', 'kl:x', 'kl:-1', 'kl:nan', 'kl:1:0', 'klx', '', ':::', 'none:1'
]
_CACHE = Literal['ring:1', 'latest', 'first:1', 'ring:0', 'ring:' + '9' * 30, 'ring', 'half', '', 'full:3']
_NEW_TOKENS = Literal['1', '7', '0', '-1', '1000000', '2147483647', '2147483648', '9' * 30]
_FLAGS: dict[str, tuple[tuple[str, ...], list[tuple[str, Any]]]] = {
  'train': (
    (f'{_CONFIG} --dry_run', f'{_CONFIG} --workdir=new {_ONE_STEP}', f'{_CONFIG} --workdir={RUN}'),
    [('config', Path), ('workdir', Path), ('profile_steps', str), ('time_limit', float), ('num_processes', int),
     ('process_id', int), ('coordinator', str), ('cluster', str), ('wait_secs', float), ('dry_run', bool)],
  ),
  'evaluate': ((f'depths {_WORKDIR}', 'depths', _WORKDIR), [('workdir', Path), ('depths', _DEPTH)]),
  'generate': (
    (f'{_WORKDIR} --prompt=1+1= --max_new_tokens=4',) * 4 + (_WORKDIR, f'--prompts={PROMPTS}'),
    [('workdir', Path), ('prompts', Path), ('depth', _DEPTH), ('temperature', float), ('seed', int),
     ('max_new_tokens', _NEW_TOKENS), ('exit', _EXIT), ('cache', _CACHE), ('top_k', int), ('top_p', float),
     ('min_p', float), ('repetition_penalty', float), ('stop', str), ('warm_start', bool)],
  ),
  'verify': (('',), [('golden', Path)]),
  'plan': (
    (_CONFIG, f'{_CONFIG} --topology=h100:8', f'{_CONFIG} --topology=h100:8 --json'),
    [('topology', Literal['h100:0', 'h100:1', 'h100:9999999999', 'v5p:', 'v5p:1x1x0', 'v9:4', 'cpu:9', 'cpu:0',
                          'v5e:7x9', 'h200:8x8', 'v4:2x2x999999']),
     ('slices', int), ('global_batch', int), ('dump_hlo', Path)],
  ),
  'checkpoint': (
    (f'list {_WORKDIR}', f'verify {_WORKDIR}', f'diff {_WORKDIR}', f'diff {_WORKDIR} --steps=2', 'list', _WORKDIR),
    [('workdir', Path), ('other', Path), ('steps', int)],
  ),
  'bench': (
    (f'train {_CONFIG}', f'decode {_CONFIG}', _CONFIG),
    # At least one that is refused: a whole benchmark takes too long.
    [('depths', Literal['0', '0,0', '-1,1', 'a', '1,1,1', ',', '9' * 5000, '\u00b2,1', '']),
     ('threads', Literal['0', 'x']), ('twin_python', Path), ('rounds', Literal['x']), ('config', Path),
     ('repeats', Literal['1.5'])],
  ),
}  # fmt: skip


@st.composite
def workdirs(draw: Callable) -> Input:
  """What a user may have done to the files of a run."""
  workdir = draw(st.sampled_from([RUN, STOPPED, STOPPED]))
  name = draw(
    st.sampled_from(['config.json'] * 4 + ['versions.json', 'metrics.jsonl', 'evals.jsonl'] * 2 + ['depth_report.json'])
  )
  program, *args = draw(st.sampled_from(_ON_A_RUN))
  edit = draw(_edit(f'{RUN if name == "depth_report.json" else workdir}/{name}', accidents.JSON))
  return Input('workdir', program, tuple(arg.replace('WORKDIR', workdir) for arg in args), (edit,))


_ON_A_RUN = (
  *[('train', _CONFIG, '--workdir=WORKDIR', _ONE_STEP)] * 3,
  ('evaluate', 'depths', '--workdir=WORKDIR', '--depths=3'),
  ('generate', '--workdir=WORKDIR', '--prompt=1+1=', '--max_new_tokens=3'),
  ('checkpoint', 'list', '--workdir=WORKDIR'),
  ('checkpoint', 'verify', '--workdir=WORKDIR'),
  ('checkpoint', 'diff', f'--workdir={RUN}', f'--other={STOPPED}'),
)


@st.composite
def checkpoints(draw: Callable) -> Input:
  """The accidents of launch.chaos corrupt, here to be met by every program that reads a checkpoint."""
  accident = draw(st.sampled_from(_CHECKPOINT_ACCIDENTS))
  edits = [Edit(f'{RUN}/checkpoints/4', accident, draw(_SEED), '')]
  if draw(st.booleans()):
    edits.append(Edit(f'{RUN}/checkpoints/2', draw(st.sampled_from(_CHECKPOINT_ACCIDENTS)), draw(_SEED), ''))
  program, *args = draw(st.sampled_from(_ON_A_RUN))
  return Input('checkpoint', program, tuple(arg.replace('WORKDIR', RUN) for arg in args), tuple(edits))


@st.composite
def goldens(draw: Callable) -> Input:
  """Weights and numbers from elsewhere: safetensors files, whose headers may say anything, and JSON beside them."""
  folder, name = draw(st.sampled_from(_GOLDEN_FILES)).split('/')
  kinds = accidents.SAFETENSORS if name.endswith('.safetensors') else accidents.JSON
  return Input('safetensors', 'verify', (f'--golden={folder}',), (draw(_edit(f'{folder}/{name}', kinds)),))


_GOLDEN_FILES = (
  *[f'{GOLDEN}/model.safetensors'] * 4,
  *[f'{GOLDEN}/config.json'] * 3,
  *[f'{GOLDEN}/forward.safetensors'] * 2,
  *[f'{GOLDEN}/optimizer.safetensors'] * 2,
  f'{GOLDEN}/optimizer.json',
  *[f'{SHARDED}/model.safetensors.index.json'] * 2,
  f'{SHARDED}/model-1.safetensors',
)


@st.composite
def prompts(draw: Callable) -> Input:
  """Prompt files and prompts."""
  args = (_WORKDIR, '--max_new_tokens=3')
  if draw(st.booleans()):
    lines = draw(st.lists(st.text(max_size=12), max_size=4))
    raw = draw(st.one_of(st.just('\n'.join(lines)), st.just('\n'.join(lines)), st.sampled_from(_PROMPTS)))
    edits = [Edit(PROMPTS, 'overwrite', 0, raw)]
    if draw(st.booleans()):
      edits.append(draw(_edit(PROMPTS, accidents.BYTES)))
    return Input('prompt', 'generate', (*args, f'--prompts={PROMPTS}'), tuple(edits))
  return Input('prompt', 'generate', (*args, f'--prompt={draw(_text())}'))


_PROMPTS = (
  '',
  '\n',
  '\n' * 40,
  '\0',
  'a\0b',
  '\ufeffx',
  'x' * 5_000_000,
  'a\n' * 2000,
  '\r\n',
  '\x85',
  '\u2028a',
  '\udcff',
)

_SEED = st.integers(0, 2**32)


def _edit(file: str, kinds: tuple) -> st.SearchStrategy[Edit]:
  return st.builds(Edit, st.just(file), st.sampled_from([kind.__name__ for kind in kinds]), _SEED, _raw())


KINDS: dict[str, tuple[Callable[[], st.SearchStrategy[Input]], float]] = {
  'override': (overrides, 0.30),
  'experiment': (experiments, 0.12),
  'flag': (flags, 0.18),
  'workdir': (workdirs, 0.12),
  'checkpoint': (checkpoints, 0.06),
  'safetensors': (goldens, 0.16),
  'prompt': (prompts, 0.06),
}


_FROM_ONE_START = 8


def draw(count: int, seed: int) -> list[Input]:
  """At least `count` inputs, each kind its share, well mixed; the same for the same seed."""
  drawn = []
  for make, share in KINDS.values():
    drawn += _draw(make(), math.ceil(count * share), seed)
  random.Random(seed).shuffle(drawn)
  return drawn


def _draw(strategy: st.SearchStrategy[Input], count: int, seed: int) -> list[Input]:
  """`count` different ones, a few from each start: from many in a row hypothesis makes variants of one."""
  drawn: list[Input] = []

  def take(one: Input) -> None:
    if one not in drawn:
      drawn.append(one)

  settings = hypothesis.settings(
    max_examples=_FROM_ONE_START,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  for start in itertools.count():
    hypothesis.seed(f'{seed} {start}')(settings(hypothesis.given(strategy)(take)))()
    if len(drawn) >= count:
      return drawn[:count]
