"""Averages that add up, and the writers of metrics: JSON lines always, others when asked for."""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from latent_loop import storage
from latent_loop.config import LogConfig
from latent_loop.errors import BadInput, StoreFault
from latent_loop.storage import Path


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
  """A weighted mean that can be added to another: over chunks, microbatches, batches, devices."""

  total: jax.Array
  weight: jax.Array

  @classmethod
  def of(cls, values: jax.Array, weights: jax.Array) -> 'Mean':
    return cls(jnp.sum(values * weights), jnp.sum(weights))

  def __add__(self, other: 'Mean') -> 'Mean':
    return Mean(self.total + other.total, self.weight + other.weight)

  def value(self) -> jax.Array:
    return self.total / jnp.maximum(self.weight, 1)


def finite(values: Any) -> Any:
  """`values` with None for every number that JSON cannot write."""
  if isinstance(values, dict):
    return {name: finite(value) for name, value in values.items()}
  if isinstance(values, list):
    return [finite(value) for value in values]
  return None if isinstance(values, float) and not math.isfinite(values) else values


class JsonLines:
  """Appends one JSON object per line; lines past step `keep_through`, which a resume does again, are dropped."""

  def __init__(self, path: Path, keep_through: int):
    self._path = path
    with _unreadable_in_words(path):
      lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
      kept = [line for i, line in enumerate(lines) if _stays(line, keep_through, i == len(lines) - 1)]
      if len(kept) != len(lines):
        storage.write(path, b''.join(kept))
      self._lines = storage.Lines(path)

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Raises SaveFailed, most often of a full disk."""
    with storage.full_disk_in_words(self._path):
      self._lines.add(json.dumps(finite({'step': step, **values})) + '\n')

  def sync(self) -> None:
    """Returns when every line so far is where others read it."""
    with storage.full_disk_in_words(self._path):
      self._lines.sync()

  def close(self) -> None:
    with storage.full_disk_in_words(self._path):
      self._lines.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
  """What JsonLines wrote; a line that is no record, half-written or damaged, is passed over. Raises BadInput."""
  with _unreadable_in_words(path):
    lines = path.read_bytes().splitlines() if path.exists() else []
  return [record for record in map(_record, lines) if record is not None]


def _record(line: bytes) -> dict[str, Any] | None:
  try:
    record = json.loads(line)
    return record if type(record['step']) is int else None
  except (ValueError, RecursionError, TypeError, KeyError):
    return None


def _stays(line: bytes, keep_through: int, last: bool) -> bool:
  """Not a step that is done again, nor what a killed process left half-written; what else is no record stays."""
  record = _record(line)
  return not last if record is None else record['step'] <= keep_through


@contextlib.contextmanager
def _unreadable_in_words(path: Path) -> Iterator[None]:
  try:
    yield
  except StoreFault:
    raise
  except OSError as error:
    raise BadInput(f'{path}: cannot be read or written ({error}); repair it, or move it away') from error


class TensorBoard:
  """Numbers as TensorBoard scalars, through tensorboardX (no TensorFlow)."""

  def __init__(self, workdir: Path, resume_step: int):
    storage.local_only(workdir, 'config.log.tensorboard')
    import tensorboardX  # only when asked for

    folder = str(workdir / 'tensorboard')
    self._writer = tensorboardX.SummaryWriter(folder, purge_step=resume_step + 1)  # later steps are done again

  def write(self, step: int, values: dict[str, Any]) -> None:
    for name, value in values.items():
      if isinstance(value, (int, float)):
        self._writer.add_scalar(name, value, step)

  def sync(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class WeightsAndBiases:
  """The same numbers to a Weights & Biases project; one run per workdir, continued on resume."""

  def __init__(self, workdir: Path, project: str):
    storage.local_only(workdir, f'config.log.wandb_project={project!r}')
    try:
      import wandb
    except ImportError as error:
      raise BadInput(
        f'config.log.wandb_project={project!r}: the package wandb is not installed; '
        'pip install -r launch/requirements/wandb.txt, or leave the project empty'
      ) from error
    name = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
    self._run = wandb.init(project=project, dir=str(workdir), id=name, name=workdir.name, resume='allow')

  def write(self, step: int, values: dict[str, Any]) -> None:
    self._run.log(values, step=step)

  def sync(self) -> None:
    """Its own process sends what there is."""

  def close(self) -> None:
    self._run.finish()


def make_writers(cfg: LogConfig, workdir: Path, resume_step: int) -> list:
  """The writers that `cfg` asks for; each has write(step, values), sync() and close()."""
  writers: list = [JsonLines(workdir / 'metrics.jsonl', resume_step)]
  if cfg.tensorboard:
    writers.append(TensorBoard(workdir, resume_step))
  if cfg.wandb_project:
    writers.append(WeightsAndBiases(workdir, cfg.wandb_project))
  return writers
