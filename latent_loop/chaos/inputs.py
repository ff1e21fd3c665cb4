"""Bad inputs by the hundred, each to a real program: does it end with a sentence, and is every file still there?"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import queue
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from latent_loop.chaos import accidents, corrupt, drawn, small
from latent_loop.chaos.drawn import Edit, Input
from latent_loop.chaos.forks import Ended, Programs
from latent_loop.config import Config
from latent_loop.errors import BadInput
from latent_loop.exit_codes import BAD_INPUT, BUG, DONE, NON_FINITE, PREEMPTED, SAVE_FAILED
from latent_loop.interop.files import tensor_shapes
from latent_loop.sealing import write_experiment

CHECKPOINT_ACCIDENTS = {kind.__name__: kind for kind in corrupt.KINDS}

_LIMIT_SECS = 300.0  # long, since the machine may have other work
_AT_ONCE = 2
# `verify` ends with 1 where numbers differ; it says so in its JSON line.
_MAY_END_WITH = {'train': {PREEMPTED, NON_FINITE, SAVE_FAILED}, 'verify': {BUG}}
_WRITTEN_ANEW = {
  'config.json',
  'metrics.jsonl',
  'evals.jsonl',
  'samples.txt',
  *(f'depth_report.{e}' for e in ('json', 'html', 'png')),
}
_GOLDEN = Path(__file__).parents[2] / 'tests/golden/huginn_tiny'


@dataclasses.dataclass(frozen=True)
class Outcome:
  """done: what happened to the files. faults: what is wrong with how the program ended."""

  ended: Ended
  done: list[str]
  faults: list[str]


class Trials:
  """Trials of inputs; each has its own copy of the files that it names, which lie in `pristine`."""

  def __init__(self, pristine: Path, limit_secs: float = _LIMIT_SECS):
    self._pristine, self._limit_secs = pristine, limit_secs

  def run(self, one: Input, programs: Programs) -> Outcome:
    trial = programs.folder / 'trial'
    trial.mkdir()
    for path in self._pristine.iterdir():
      if path.name in names_used([one]):
        shutil.copytree(path, trial / path.name) if path.is_dir() else shutil.copy(path, trial)
    done = [self._happen(edit, trial) for edit in one.edits]
    before = _hashes(trial)
    ended = programs.run(one.program, one.args, trial, self._limit_secs)
    found = faults(one, ended) + lost_files(ended, before, trial)
    shutil.rmtree(trial)
    return Outcome(ended, done, found)

  def _happen(self, edit: Edit, trial: Path) -> str:
    dice, file = random.Random(edit.seed), trial / edit.file
    if edit.accident in CHECKPOINT_ACCIDENTS:
      return CHECKPOINT_ACCIDENTS[edit.accident](file, self._pristine / drawn.RUN / 'checkpoints', dice)
    return accidents.BY_NAME[edit.accident](file, dice, edit.raw)


def names_used(inputs: list[Input]) -> set[str]:
  """Which of the files and folders that inputs are about these name."""
  texts = [text for one in inputs for text in (*one.args, *(edit.file for edit in one.edits))]
  word = {name: re.compile(rf'\b{re.escape(name)}\b') for name in drawn.NAMES}  # `run` is not in --dry_run
  return {name for name in drawn.NAMES if any(word[name].search(text) for text in texts)}


def make_pristine(here: Path, programs: Programs, names: set[str]) -> None:
  """The files and folders of these names, unharmed, in `here`."""
  here.mkdir()
  write_experiment(small_config(), here / drawn.EXPERIMENT)
  (here / drawn.PROMPTS).write_text('1+1=\n2+3=\n')
  if names & {drawn.RUN, drawn.STOPPED}:
    ended = programs.run('train', (f'--config={drawn.EXPERIMENT}', f'--workdir={drawn.RUN}'), here, _LIMIT_SECS)
    if ended.code != DONE:
      raise BadInput(f'the run that nobody harmed ended with code {ended.code}: {ended.complained[-600:]}')
    shutil.copytree(here / drawn.RUN, here / drawn.STOPPED, ignore=shutil.ignore_patterns('4', 'depth_report.*'))
  if names & {drawn.GOLDEN, drawn.SHARDED}:
    if not _GOLDEN.is_dir():
      raise BadInput(f'{_GOLDEN}: no such folder; run this in a checkout of the repository')
    shutil.copytree(_GOLDEN, here / drawn.GOLDEN, ignore=shutil.ignore_patterns('grads.*'))  # they take long
    shutil.copytree(here / drawn.GOLDEN, here / drawn.SHARDED, ignore=shutil.ignore_patterns('optimizer.*'))
    shard = here / drawn.SHARDED / 'model-1.safetensors'
    (here / drawn.SHARDED / 'model.safetensors').rename(shard)
    index = {'weight_map': dict.fromkeys(tensor_shapes(shard), shard.name)}
    (here / drawn.SHARDED / 'model.safetensors.index.json').write_text(json.dumps(index))


def small_config() -> Config:
  return small.small_config(**{'name': 'chaos_inputs', 'train.num_steps': 4, 'checkpoint.every_steps': 2,
                               'eval.every_steps': 2})  # fmt: skip


def _hashes(folder: Path) -> dict[str, str]:
  """Name -> hash of its bytes, of every file."""
  files = [path for path in folder.rglob('*') if path.is_file()]
  return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lost_files(ended: Ended, before: dict[str, str], trial: Path) -> list[str]:
  """Files whose bytes are nowhere any more, but those that a program that did its work writes anew."""
  there = set(_hashes(trial).values())
  lost = [name for name, digest in before.items() if digest not in there]
  if ended.code in (DONE, PREEMPTED):
    lost = [name for name in lost if Path(name).name not in _WRITTEN_ANEW or not (trial / name).exists()]
  return [f'lost file: {name}' for name in lost]


def faults(one: Input, ended: Ended) -> list[str]:
  """What a user must not see."""
  if ended.code is None:
    return [f'hang: still running after {ended.secs:.0f} s']
  out = []
  if 'Traceback (most recent call last)' in ended.said + ended.complained:
    out.append('traceback')
  if ended.code not in _MAY_END_WITH.get(one.program, set()) | {DONE, BAD_INPUT}:
    out.append(f'exit code: {ended.code}')
  if ended.code == BUG and '"ok": false' not in ended.said:
    out.append('no result')
  if ended.code == BAD_INPUT:
    *before, last = ended.complained.rstrip('\n').split('\n')
    if not last.startswith('error: ') or any(line.startswith('error: ') for line in before):
      out.append('no sentence')
    elif not any(name in last for name in _names(one)):
      out.append('unclear sentence: it does not say what is wrong')
  return out


_MISSING = ('--workdir', '--prompt', '--config', '--topology', 'verb', 'belongs to no flag')  # what may be wrong beside


def _names(one: Input) -> list[str]:
  """What was drawn, by the names that a sentence about it may use."""
  flags = [re.split('[=.]', arg.lstrip('-'))[-1 if arg.startswith('--config.') else 0] for arg in one.args]
  flags += [folder for arg in one.args if len(folder := arg.partition('=')[2]) > 3]  # the path, say, that a flag gives
  keys = [arg.partition('=')[0].removeprefix('--config.').split('.')[0] for arg in one.args if '--config.' in arg]
  files = [part for edit in one.edits for part in Path(edit.file).parts[one.kind != 'safetensors' :]]
  files += ['config'] if one.kind == 'experiment' else []  # a key of it
  return files or [*flags, *keys, *_MISSING]


def run_all(todo: list[tuple[int, Input]], folder: Path) -> Iterator[tuple[int, Input, Outcome]]:
  """(number, input, outcome) of each, two at a time."""
  with contextlib.ExitStack() as stack:
    free: queue.SimpleQueue[Programs] = queue.SimpleQueue()
    for i in range(_AT_ONCE):
      (folder / f'{i}').mkdir()
      free.put(stack.enter_context(Programs(folder / f'{i}')))
    programs = free.get()
    make_pristine(folder / 'pristine', programs, names_used([one for _, one in todo]))
    free.put(programs)
    trials = Trials(folder / 'pristine')

    def run(numbered: tuple[int, Input]) -> tuple[int, Input, Outcome]:
      programs = free.get()
      try:
        return *numbered, trials.run(numbered[1], programs)
      finally:
        free.put(programs)

    yield from stack.enter_context(concurrent.futures.ThreadPoolExecutor(_AT_ONCE)).map(run, todo)


def inputs(count: int, seed: int, folder: Path, say: Callable[[str], None], only: int | None = None) -> dict[str, Any]:
  """`count` inputs (or that of number `only`), counted by kind and exit code; every fault is said, with the input."""
  todo = [(number, one) for number, one in enumerate(drawn.draw(count, seed)) if only in (None, number)]
  began, codes = time.perf_counter(), collections.defaultdict(collections.Counter)
  found, secs = collections.Counter(), collections.Counter()
  for number, one, outcome in run_all(todo, folder):
    codes[one.kind][str(outcome.ended.code)] += 1
    secs[one.kind] += outcome.ended.secs
    if only is not None:
      say(f'{outcome.ended.said}{outcome.ended.complained}{outcome.done}')
    if outcome.faults:
      found.update(fault.partition(':')[0] for fault in outcome.faults)
      say(_report(number, one, outcome))
  return {
    'ok': not found,
    'inputs': sum(sum(counts.values()) for counts in codes.values()),
    'faults': dict(found),
    'exit_codes': {kind: dict(counts) for kind, counts in codes.items()},
    'seconds_by_kind': {kind: round(spent) for kind, spent in secs.items()},
    'seed': seed,
    'seconds': round(time.perf_counter() - began, 1),
  }


def _report(number: int, one: Input, outcome: Outcome) -> str:
  """What reproduces a fault: the arguments, and what happened to which file."""
  ended = {'code': outcome.ended.code, 'secs': round(outcome.ended.secs, 1), 'stderr': outcome.ended.complained[-3000:]}
  return json.dumps(
    {'input': number, 'faults': outcome.faults, **dataclasses.asdict(one), 'done': outcome.done, **ended}
  )
