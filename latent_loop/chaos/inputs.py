"""Bad inputs by the hundred, each to a real program: does it end with a sentence, and is every file still there?"""

import collections
import dataclasses
import hashlib
import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_loop.chaos import accidents, small
from latent_loop.chaos.forks import Ended, Programs
from latent_loop.errors import BadInput
from latent_loop.exit_codes import BAD_INPUT, DONE, NON_FINITE, PREEMPTED, SAVE_FAILED

_LIMIT_SECS = 120.0
_TRAINING_MAY_END_WITH = {PREEMPTED, NON_FINITE, SAVE_FAILED}


class Trials:
  """The files that inputs are about, made once; each trial has its own copy of them."""

  def __init__(self, folder: Path, programs: Programs):
    self._programs, self._folder, self.pristine = programs, folder, folder / 'pristine'
    self.pristine.mkdir()
    small.write_experiment(small_config(), self.pristine / 'experiment.py')

  def run(self, one: Any, limit_secs: float = _LIMIT_SECS) -> tuple[list[str], Ended, list[str]]:
    """(what is wrong with how it ended, how it ended, what was done to the files)."""
    trial = self._folder / 'trial'
    shutil.copytree(self.pristine, trial)
    done = [accidents.BY_NAME[e.accident](trial / e.file, random.Random(e.seed), e.raw) for e in one.edits]
    before = _hashes(trial)
    ended = self._programs.run(one.program, one.args, trial, limit_secs)
    lost = before.keys() - _hashes(trial).keys()
    found = faults(one, ended) + [f'lost file: {before[digest]}' for digest in sorted(lost)]
    shutil.rmtree(trial)
    return found, ended, done


def small_config():
  return small.small_config(**{'name': 'chaos_inputs', 'train.num_steps': 4, 'checkpoint.every_steps': 2})


def _hashes(folder: Path) -> dict[str, str]:
  """Hash of its bytes -> name, of every file."""
  files = [path for path in folder.rglob('*') if path.is_file()]
  return {hashlib.sha256(path.read_bytes()).hexdigest(): str(path.relative_to(folder)) for path in files}


def faults(one: Any, ended: Ended) -> list[str]:
  """What a user must not see."""
  if ended.code is None:
    return [f'hang: still running after {ended.secs:.0f} s']
  out = []
  if 'Traceback (most recent call last)' in ended.said + ended.complained:
    out.append('traceback')
  allowed = {DONE, BAD_INPUT} | (_TRAINING_MAY_END_WITH if one.program == 'train' else set())
  if ended.code not in allowed:
    out.append(f'exit code {ended.code}')
  if ended.code == BAD_INPUT:
    sentences = [line for line in ended.complained.splitlines() if line.startswith('error: ')]
    if len(sentences) != 1 or not ended.complained.rstrip().endswith(sentences[0].rstrip()):
      out.append('not one sentence')
  return out


def inputs(count: int, seed: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
  """`count` inputs, counted by kind and exit code; every fault is said, with the input."""
  try:
    from latent_loop.chaos import drawn
  except ImportError as error:
    raise BadInput(f'hypothesis is missing ({error}); pip install -r launch/requirements/dev.txt') from error
  began, codes, found = time.perf_counter(), collections.defaultdict(collections.Counter), collections.Counter()
  with Programs(folder) as programs:
    trials = Trials(folder, programs)
    for number, one in enumerate(drawn.draw(count, seed)):
      wrong, ended, done = trials.run(one)
      codes[one.kind][str(ended.code)] += 1
      if wrong:
        found.update(re.split('[:]', fault)[0] for fault in wrong)
        say(json.dumps({'input': number, 'faults': wrong, **dataclasses.asdict(one), 'done': done,
                        'stderr': ended.complained[-2000:], 'secs': ended.secs}))  # fmt: skip
  return {
    'ok': not found,
    'inputs': sum(sum(counts.values()) for counts in codes.values()),
    'faults': dict(found),
    'exit_codes': {kind: dict(counts) for kind, counts in codes.items()},
    'seed': seed,
    'seconds': round(time.perf_counter() - began, 1),
  }
