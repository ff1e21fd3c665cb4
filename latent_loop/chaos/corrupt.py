"""Damages the checkpoints of a small run, each time on a fresh copy, and starts it: is the newest good one used?"""

import collections
import contextlib
import hashlib
import io
import itertools
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latent_loop import loop
from latent_loop.chaos import accidents, small
from latent_loop.checkpoint import Checkpoints, manifest
from latent_loop.checkpoint.content import named
from latent_loop.config import Config
from latent_loop.errors import BadInput
from latent_loop.model import build
from latent_loop.optim import make_optimizer
from latent_loop.parallel import mesh as meshes
from latent_loop.step import make_sharded_state

STEPS = (2, 4, 6)
_ALL_DAMAGED, _TWO_DAMAGED = 0.1, 0.3  # shares of the trials; in the others the newest step alone is


def small_config() -> Config:
  return small.small_config(
    **{
      'name': 'chaos_corrupt',
      'train.num_steps': STEPS[-1],
      'checkpoint.every_steps': STEPS[0],
      'checkpoint.keep_last': len(STEPS),
    }
  )


# --- accidents: (a step's folder, `checkpoints` of an undamaged copy, dice) -> which file; the step is bad then ------


def _some_file(bad: Path, dice: random.Random, at_least: int = 0) -> Path:
  files = [path for path in bad.rglob('*') if path.is_file()]
  return dice.choice(sorted(path for path in files if path.stat().st_size >= at_least))


def _kind_of(file: Path) -> str:
  """The name of a file, without the part that Orbax draws by chance."""
  return 'array data in ' + file.parent.parent.name if file.parent.name == 'd' else file.name


def _another(good: Path, bad: Path, dice: random.Random) -> Path:
  return dice.choice(sorted(path for path in good.iterdir() if path.name != bad.name))


def flip_a_bit(bad: Path, good: Path, dice: random.Random) -> str:
  file = _some_file(bad, dice, at_least=1)
  accidents.flip(file, dice)
  return _kind_of(file)


def truncate_a_file(bad: Path, good: Path, dice: random.Random) -> str:
  file = _some_file(bad, dice, at_least=1)
  accidents.truncate(file, dice)
  return _kind_of(file)


def append_to_a_file(bad: Path, good: Path, dice: random.Random) -> str:
  file = _some_file(bad, dice)
  accidents.append(file, dice)
  return _kind_of(file)


def delete_a_file(bad: Path, good: Path, dice: random.Random) -> str:
  file = _some_file(bad, dice)
  accidents.delete(file, dice)
  return _kind_of(file)


def delete_a_folder(bad: Path, good: Path, dice: random.Random) -> str:
  folder = dice.choice(sorted(path for path in bad.rglob('*') if path.is_dir()))
  shutil.rmtree(folder)
  return folder.name


def leave_an_empty_folder(bad: Path, good: Path, dice: random.Random) -> str:
  shutil.rmtree(bad)
  bad.mkdir()
  return 'everything'


def take_the_manifest_of_another_step(bad: Path, good: Path, dice: random.Random) -> str:
  shutil.copy(_another(good, bad, dice) / manifest.NAME, bad)
  return manifest.NAME


def take_the_state_of_another_step(bad: Path, good: Path, dice: random.Random) -> str:
  shutil.rmtree(bad / 'state')
  shutil.copytree(_another(good, bad, dice) / 'state', bad / 'state')
  return 'state'


def take_all_but_the_checksums_of_another_step(bad: Path, good: Path, dice: random.Random) -> str:
  """All files whole and named by a manifest with a right hash: only the arrays hold something else."""
  other, step = _another(good, bad, dice), int(bad.name)
  body = {**_body(other), 'step': step, 'arrays': _body(bad)['arrays']}
  shutil.rmtree(bad)
  shutil.copytree(other, bad)
  (bad / manifest.NAME).write_bytes(manifest.encode(body))
  return 'state'


def exchange_two_arrays(bad: Path, good: Path, dice: random.Random) -> str:
  """Under a right hash as well: the manifest says of two arrays of one kind that each is the other."""
  body, kinds = _body(bad), collections.defaultdict(list)
  for name, array in body['arrays'].items():
    kinds[array['kind']].append(name)
  pairs = [(a, b) for names in kinds.values() for a in names for b in names]
  checksum = lambda name: body['arrays'][name]['checksum']
  a, b = dice.choice([(a, b) for a, b in pairs if checksum(a) != checksum(b)])
  body['arrays'][a], body['arrays'][b] = body['arrays'][b], body['arrays'][a]
  (bad / manifest.NAME).write_bytes(manifest.encode(body))
  return 'arrays'


def flip_a_bit_under_a_right_hash(bad: Path, good: Path, dice: random.Random) -> str:
  """A bit of an array on disk, its file's hash made right again: of this Orbax often reads wrong values in silence."""
  body = _body(bad)
  file = max((bad / name for name in body['files']), key=lambda path: path.stat().st_size)
  accidents.flip(file, dice)
  data = file.read_bytes()
  body['files'][file.relative_to(bad).as_posix()] = [len(data), hashlib.sha256(data).hexdigest()]
  (bad / manifest.NAME).write_bytes(manifest.encode(body))
  return _kind_of(file)


def _body(folder: Path) -> dict[str, Any]:
  return json.loads((folder / manifest.NAME).read_bytes().split(b'\n')[1])


KINDS: tuple[Callable[[Path, Path, random.Random], str], ...] = (
  flip_a_bit,
  truncate_a_file,
  flip_a_bit,  # four times, since it is what disks and memory do
  delete_a_file,
  flip_a_bit,
  append_to_a_file,
  flip_a_bit,
  delete_a_folder,
  leave_an_empty_folder,
  take_the_manifest_of_another_step,
  take_the_state_of_another_step,
  take_all_but_the_checksums_of_another_step,
  exchange_two_arrays,
  flip_a_bit_under_a_right_hash,
)


# --- the trial --------------------------------------------------------------------------------------------


class Run:
  """The small run, trained once in `workdir`; `start` restores a copy of it as loop.prepare does."""

  def __init__(self, workdir: Path):
    self.config, self.workdir = small_config(), workdir
    loop.run(self.config, workdir)
    model = build(self.config.model, self.config.depth)
    optimizer = make_optimizer(self.config.optim, self.config.train.num_steps)
    init, self._specs = make_sharded_state(self.config, model, optimizer, meshes.make_mesh(self.config.mesh))
    self._shapes = jax.eval_shape(init)
    with self._open(workdir) as checkpoints:
      self._states = {s: self._bytes(checkpoints.restore(s, self._shapes, self._specs, None)) for s in STEPS}

  def _open(self, workdir: Path) -> Checkpoints:
    return Checkpoints(workdir, self.config.checkpoint)

  def _bytes(self, state: Any) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in named(state).items()}

  def start(self, workdir: Path) -> tuple[str, str]:
    """(the step restored, 'refused', 'from scratch' or 'wrong content'; what was said)."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), self._open(workdir) as checkpoints:
      try:
        found = checkpoints.restore_newest(self._shapes, self._specs, None)
      except BadInput as error:
        return 'refused', f'{said.getvalue()}{error}'
    if found is None:
      return 'from scratch', said.getvalue()
    step, state = found
    return str(step) if self._bytes(state) == self._states[step] else 'wrong content', said.getvalue()


def trial(run: Run, copy: Path, kinds: Iterator[Callable], dice: random.Random) -> dict[str, Any]:
  """An accident to the newest step, often to the ones before it too, and two starts after it."""
  shutil.copytree(run.workdir, copy)
  share, steps = dice.random(), copy / 'checkpoints'
  bad = STEPS if share < _ALL_DAMAGED else STEPS[-2:] if share < _TWO_DAMAGED else STEPS[-1:]
  done = {}
  for step in reversed(bad):
    kind = next(kinds)
    done[step] = kind.__name__, kind(steps / str(step), run.workdir / 'checkpoints', dice)
  if not dice.randrange(8):
    (steps / str(STEPS[-1] + 2)).mkdir()
    done[STEPS[-1] + 2] = 'an_empty_newer_folder', 'everything'
  want = 'refused' if bad == STEPS else str(max(set(STEPS) - set(bad)))
  first, said = run.start(copy)
  harmless = [step for step in done if str(step) == first and done[step][0] == flip_a_bit_under_a_right_hash.__name__]
  for step in harmless:  # a byte that nothing reads: what was restored is the state of that step, to the byte
    done = {later: what for later, what in done.items() if later > step}
    want = first
  named = sum(f'checkpoints/{step}: damaged: ' in said for step in done)
  kept = len(list(steps.glob('set_aside/*')))
  again, _ = run.start(copy)
  shutil.rmtree(copy)
  ok = first == again == want and named == kept == len(done)
  counts = {'harmless': len(harmless), 'named': named, 'kept': kept}
  return {'ok': ok, 'want': want, 'got': first, 'again': again, **counts, 'done': done, 'said': said}


def corrupt(count: int, seed: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
  """At least `count` accidents, counted; every trial that fails is said."""
  began, dice, run = time.perf_counter(), random.Random(seed), Run(folder / 'run')
  kinds, results = itertools.cycle(KINDS), []
  while sum(len(result['done']) for result in results) < count:
    results.append(trial(run, folder / 'copy', kinds, dice))
    if not results[-1]['ok']:
      say(json.dumps(results[-1]))
  accidents = [accident for result in results for accident in result['done'].values()]
  got = collections.Counter(result['got'] for result in results)
  return {
    'ok': all(result['ok'] for result in results),
    'corruptions': len(accidents),
    'harmless': sum(result['harmless'] for result in results),
    'detected': sum(result['named'] for result in results),
    'starts': 2 * len(results),
    'newest_good_used': sum(result['ok'] and result['want'] != 'refused' for result in results),
    'refused_since_none_was_good': sum(result['ok'] and result['want'] == 'refused' for result in results),
    'wrong_content': got['wrong content'],
    'from_scratch': got['from scratch'],
    'kinds': dict(collections.Counter(kind for kind, _ in accidents)),
    'files': dict(collections.Counter(what for _, what in accidents)),
    'seed': seed,
    'seconds': round(time.perf_counter() - began, 1),
  }
