"""Kills a run again and again, often inside a save: does it end as a run that nobody touched?

Both are `python -m launch.train` with the same flags, as processes. A kill is SIGKILL to the whole process group.
"""

import collections
import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_loop.chaos import small
from latent_loop.checkpoint import inspect, manifest
from latent_loop.checkpoint.folder import Folder
from latent_loop.config import Config
from latent_loop.errors import BadInput
from latent_loop.exit_codes import DONE
from latent_loop.metrics import read_lines
from latent_loop.sealing import write_experiment

# What a log says about the machine and not about the run.
TIMINGS = {'tokens_per_second', 'data_wait_seconds', 'slow_steps', 'mfu'}
LOGS = ('metrics.jsonl', 'evals.jsonl')
INSIDE_SHARE = 1 / 4  # of the kills, at least, must have left an unfinished save behind
_ROOT = Path(__file__).parents[2]
_LOOK_SECS = 0.001
_LONGEST_DELAY_SECS = 0.2  # from the mark of a save to the kill; halved for every save that was faster


def small_config(kills: int) -> Config:
  """Long enough for `kills` kills, each of which waits for a new checkpoint and a few steps more."""
  return small.small_config(
    **{
      'name': 'chaos_kill',
      'train.num_steps': 20 + 12 * kills,
      'checkpoint.every_steps': 2,
      'checkpoint.keep_last': 2,
      'eval.every_steps': 20,
    }
  )


# --- one start of the command line ------------------------------------------------------------------------


class Start:
  """A process group that trains; leaving the context kills what is left of it."""

  def __init__(self, experiment: Path, workdir: Path, log: Path):
    self.folder, self.workdir, self._log = Folder(workdir), workdir, log
    self.newest_before = newest(self.folder)
    command = [sys.executable, '-m', 'launch.train', f'--config={experiment}', f'--workdir={workdir}']
    with log.open('wb') as file:
      self._process = subprocess.Popen(
        command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
      )

  def __enter__(self) -> 'Start':
    return self

  def __exit__(self, *exception: object) -> None:
    if self.running():
      self.kill()

  def running(self) -> bool:
    return self._process.poll() is None

  def kill(self) -> None:
    os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()

  def stopped_inside(self, save: list[int]) -> bool:
    """Whether it is stopped there; one that is not goes on. While it runs, the save may end behind every look."""
    os.killpg(self._process.pid, signal.SIGSTOP)
    _, status = os.waitpid(self._process.pid, os.WUNTRACED)  # the signal itself does not wait for all threads
    if not os.WIFSTOPPED(status):
      self._process.returncode = os.waitstatus_to_exitcode(status)
    elif self.saving() == save:
      return True
    else:
      os.killpg(self._process.pid, signal.SIGCONT)
    return False

  def end(self) -> int:
    return self._process.wait()

  def said(self) -> str:
    return self._log.read_text(errors='replace')

  def wait_until(self, true: Callable[[], bool], secs: float = math.inf) -> bool:
    """Whether it became true in `secs` while the process ran."""
    deadline = time.monotonic() + secs
    while time.monotonic() < deadline and self.running():
      if true():
        return True
      time.sleep(_LOOK_SECS)
    return False

  def last_step(self) -> int:
    return max((record['step'] for record in read_lines(self.workdir / 'metrics.jsonl')), default=0)

  def saving(self) -> list[int]:
    """Steps newer than all finished ones that a save works on; a deletion leaves a mark as well, of an old step."""
    return [step for step in self.folder.unfinished() if step > newest(self.folder)]


def newest(folder: Folder) -> int:
  """The newest step with a manifest; 0: none."""
  return max((step for step in folder.steps() if (folder / step / manifest.NAME).exists()), default=0)


def restored(said: str) -> int:
  """The step that a start says it continues at; 0: from scratch, or killed before it said so."""
  found = re.search(r'continuing at step (\d+) of', said)
  return int(found.group(1)) if found else 0


# --- moments to kill at; each returns when the moment is there, or the process ended ------------------------


def inside_a_save(start: Start, dice: random.Random, startup_secs: float) -> None:
  _progress(start)
  delay_secs = dice.uniform(0, _LONGEST_DELAY_SECS)
  while start.wait_until(start.saving):
    step = start.saving()
    start.wait_until(lambda: False, delay_secs)
    if start.running() and step and start.stopped_inside(step):
      return
    delay_secs /= 2


def after_some_steps(start: Start, dice: random.Random, startup_secs: float) -> None:
  _progress(start)
  wanted = start.last_step() + dice.randint(1, 4)
  start.wait_until(lambda: start.last_step() >= wanted)
  start.wait_until(lambda: False, dice.uniform(0, 0.1))


def while_starting(start: Start, dice: random.Random, startup_secs: float) -> None:
  start.wait_until(lambda: False, dice.uniform(0, startup_secs))


def _progress(start: Start) -> None:
  """Killed before a new checkpoint every time, a run would never end."""
  start.wait_until(lambda: newest(start.folder) > start.newest_before)


MOMENTS = (inside_a_save, after_some_steps, inside_a_save, while_starting)


def schedule(kills: int, dice: random.Random) -> list[Callable]:
  moments = [MOMENTS[i % len(MOMENTS)] for i in range(kills)]
  dice.shuffle(moments)
  return moments


# --- the trial --------------------------------------------------------------------------------------------


class Torment:
  """A run that is killed; what was seen on disk after every kill, and what is wrong so far, in words."""

  def __init__(self, experiment: Path, folder: Path):
    self.experiment, self.workdir, self._folder = experiment, folder / 'tormented', folder
    self.starts, self.kills, self.faults = 0, 0, []
    self.left: collections.Counter = collections.Counter()
    self.moments: collections.Counter = collections.Counter()

  def start(self) -> Start:
    self.starts += 1
    return Start(self.experiment, self.workdir, self._folder / f'start_{self.starts}.txt')

  def kill_at(self, moment: Callable, dice: random.Random, startup_secs: float) -> bool:
    """Whether it was killed: a run may have ended first."""
    with self.start() as start:
      moment(start, dice, startup_secs)
      if not start.running():
        self.faults.append(f'start {self.starts} ended with code {start.end()} before its kill: {start.said()[-600:]}')
        return False
      start.kill()
    self.kills += 1
    self.moments[moment.__name__] += 1
    for step in start.saving():
      self.left[what_is_left(start.folder, step)] += 1
    self._check_restored(start, may_be_silent=True)
    return True

  def finish(self) -> None:
    with self.start() as start:
      code = start.end()
    if code != DONE:
      self.faults.append(f'the last start ended with code {code}: {start.said()[-600:]}')
    self._check_restored(start, may_be_silent=False)

  def _check_restored(self, start: Start, may_be_silent: bool) -> None:
    said = start.said()
    step, trained = restored(said), 'first step done' in said
    if step != start.newest_before and (step or trained or not may_be_silent):
      self.faults.append(
        f'start {self.starts} continued at step {step}, and the newest finished checkpoint was {start.newest_before}'
      )


def what_is_left(folder: Folder, step: int) -> str:
  """How far the save of `step` had come."""
  if (folder / step).exists():
    return 'arrays without a manifest'
  return 'a folder of Orbax' if list(folder.path.glob(f'{step}.*orbax*')) else 'the mark alone'


def differences(reference: Path, tormented: Path) -> list[str]:
  """In what two workdirs of one config differ that must be alike: a sentence for each."""
  out = []
  for name in LOGS:
    out += _log_differences(name, reference / name, tormented / name)
  for workdir in (reference, tormented):
    try:
      collections.deque(inspect.verify(workdir, []), maxlen=0)
    except BadInput as error:
      out.append(str(error))
  out += [f'{path}: set aside' for path in Folder(tormented).list_set_aside()]
  out += [f'step {step} of {tormented} is unfinished' for step in Folder(tormented).unfinished()]
  a, b = Folder(reference), Folder(tormented)
  if a.steps() != b.steps():
    return [*out, f'the checkpoints are those of steps {b.steps()}, not {a.steps()}']
  for step in a.steps():
    with contextlib.suppress(manifest.Damaged):  # it is named above
      wanted, got = (manifest.read(one / step, step).arrays for one in (a, b))
      names = sorted(wanted.keys() | got.keys())
      out += [f'step {step}: array {name} differs' for name in names if wanted.get(name) != got.get(name)]
  return out


def _log_differences(name: str, reference: Path, tormented: Path) -> list[str]:
  wanted, got = _records(reference), _records(tormented)
  steps = collections.Counter(step for step, _ in got)
  out = [f'{name}: step {step} stands there {count} times' for step, count in steps.items() if count > 1]
  if [step for step, _ in wanted] != [step for step, _ in got]:
    missing = sorted({step for step, _ in wanted} - steps.keys())
    return [*out, f'{name}: not the steps of the reference in their order; missing: {missing[:9]}']
  for (step, a), (_, b) in zip(wanted, got, strict=True):
    out += [f'{name}: step {step}: {key} is {b.get(key)}, not {a.get(key)}'
            for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]  # fmt: skip
  return out


def _records(path: Path) -> list[tuple[Any, dict[str, str]]]:
  """(step, value by key, as text) of every line; a line that is no JSON counts as a step of its own."""
  out = []
  for number, line in enumerate(path.read_text().splitlines(), 1) if path.exists() else ():
    try:
      record = json.loads(line)
      out.append((record['step'], {key: json.dumps(v) for key, v in record.items() if key not in TIMINGS}))
    except (json.JSONDecodeError, KeyError):
      out.append((math.inf, {'no record': f'line {number}'}))
  return out


def kill(kills: int, seed: int, folder: Path, say: Callable[[str], None], config: Config | None) -> dict[str, Any]:
  """`kills` kills of a run of `config` (None: a small one), counted; every fault is said."""
  began, dice = time.perf_counter(), random.Random(seed)
  experiment = write_experiment(config or small_config(kills), folder / 'experiment.py')
  with Start(experiment, folder / 'reference', folder / 'reference.txt') as start:
    start.wait_until(lambda: start.last_step() > 0)
    startup_secs = time.perf_counter() - began
    if (code := start.end()) != DONE:
      raise BadInput(f'the run that nobody killed ended with code {code}; correct --config: {start.said()[-600:]}')
  torment = Torment(experiment, folder)
  for moment in schedule(kills, dice):
    if not torment.kill_at(moment, dice, startup_secs):
      break
  torment.finish()
  different = differences(folder / 'reference', torment.workdir)
  faults, inside = torment.faults + different, sum(torment.left.values())
  if inside < INSIDE_SHARE * kills:
    faults.append(f'{inside} of {kills} kills fell inside a save; that is too few to tell')
  for fault in faults[:20]:
    say(fault)
  return {
    'ok': not faults and torment.kills == kills,
    'kills': torment.kills,
    'kills_inside_a_save': inside,
    'left_by_those': dict(torment.left),
    'moments': dict(torment.moments),
    'starts': torment.starts,
    'faults': len(faults),
    'differences': len(different),
    'steps_compared': {name: len(_records(torment.workdir / name)) for name in LOGS},
    'arrays_compared': _num_arrays(Folder(torment.workdir)),
    'seed': seed,
    'seconds': round(time.perf_counter() - began, 1),
  }


def _num_arrays(folder: Folder) -> int:
  """Arrays of the newest checkpoint."""
  step = newest(folder)
  return len(manifest.read(folder / step, step).arrays) if step else 0
