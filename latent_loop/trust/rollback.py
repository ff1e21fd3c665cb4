"""Roll-backs: a run that went wrong returns to a step before that and reads on behind the batches that led there.

Returning alone would change nothing: the same batches lead from the same step to the same fault, bit for bit. So every
batch since the restored step is skipped, not only the last ones. Which batch a step reads is a pure function of the
step and of what rollbacks.json records; that file is written before a run goes on.
"""

import dataclasses
import json
from collections.abc import Sequence

from latent_loop import storage
from latent_loop.errors import BadInput
from latent_loop.storage import Path

NAME = 'rollbacks.json'
_LARGEST = 2**53


@dataclasses.dataclass(frozen=True)
class Trouble:
  """What may end a run: it began in the first of these steps (counted from 1) and was seen after the last."""

  first: int
  last: int
  sentence: str
  advice: str = ''  # when the run ends of it


@dataclasses.dataclass(frozen=True)
class Rollback:
  """After `step` steps, the batches of the stream from `batch` on are read."""

  step: int
  batch: int
  reason: str


def place(step: int, rollbacks: Sequence[Rollback]) -> int:
  """Which batch of the stream `step` reads, both counted from 0: the last roll-back to it or to one before decides."""
  for back in reversed(rollbacks):
    if back.step <= step:
      return back.batch + step - back.step
  return step


def skipped(rollbacks: Sequence[Rollback]) -> list[tuple[Rollback, range]]:
  """Every roll-back that still counts, and the batches of the stream that no step reads because of it."""
  counts = [back for i, back in enumerate(rollbacks) if all(later.step > back.step for later in rollbacks[i + 1 :])]
  return [(back, range(place(back.step, counts[:i]), back.batch)) for i, back in enumerate(counts)]


def read(workdir: Path) -> tuple[Rollback, ...]:
  """Those of a run, oldest first; none without a file. Raises BadInput when they cannot be told."""
  path = workdir / NAME
  try:
    found = tuple(Rollback(**record) for record in json.loads(path.read_bytes())) if path.exists() else ()
    good = all(type(b.step) is type(b.batch) is int and 0 <= b.step < b.batch < _LARGEST for b in found)
  except OSError as error:
    raise BadInput(f'{path}: cannot be read ({error}); repair the disk, its rights or the connection') from error
  except (ValueError, RecursionError, TypeError):
    good = False
  if not good:
    raise BadInput(f'{path}: truncated or altered, and it decides which batches the run reads; restore it from a copy')
  return found


def write(workdir: Path, rollbacks: Sequence[Rollback]) -> None:
  path = workdir / NAME
  with storage.full_disk_in_words(path):
    storage.write(path, json.dumps([dataclasses.asdict(back) for back in rollbacks], indent=2) + '\n')
