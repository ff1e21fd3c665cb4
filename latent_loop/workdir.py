"""A run's folder: the sealed config that owns it, and the versions it was started with."""

import importlib.metadata
import json
import platform
from collections.abc import Sequence

import jax
from jax.experimental import multihost_utils

from latent_loop import storage
from latent_loop.config import Config
from latent_loop.errors import BadInput
from latent_loop.metrics import read_lines
from latent_loop.sealing import differences, fingerprint, from_json, to_json
from latent_loop.storage import Path

# Values that may change between two starts of one run: none of them changes what an example or a
# parameter is. All others decide the run, and a change of them is refused.
# Data on a disk may move: its content is in the fingerprint of the data.
SAFE = (
  'mesh.', 'data.paths', 'data.tokenizer', 'data.read_threads', 'depth.', 'log.', 'eval.', 'checkpoint.', 'guard.',
  'model.remat', 'model.attention', 'train.num_microbatches', 'train.loss_chunk',
)  # fmt: skip

# All that a process killed in its first moments may leave: config.json, which makes a folder that of a run, comes last.
_FIRST_FILES = {'versions.json', f'versions.json{storage.TEMPORARY}', f'config.json{storage.TEMPORARY}'}


def open_workdir(workdir: Path, config: Config) -> None:
  """Makes the folder of `config`, or checks that it is this config's folder and leaves it as it is.

  Of many processes the first one does it; the others look at what it left. Raises BadInput, naming the fields,
  when the folder belongs to a config that differs in more than SAFE values, when it cannot be made or written,
  and when not all processes see it.
  """
  if jax.process_index() == 0:
    _open(workdir, config)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('workdir is open')
    if not (workdir / 'config.json').is_file():
      raise BadInput(
        f'--workdir={workdir}: process {jax.process_index()} does not see what process 0 wrote there; give a folder '
        'that all machines share'
      )


def _open(workdir: Path, config: Config) -> None:
  path = workdir / 'config.json'
  try:
    if path.exists():
      check_owner(workdir, config)
      _check_saves(workdir, config)
      return
    if workdir.is_file() or (workdir.is_dir() and {path.name for path in workdir.iterdir()} - _FIRST_FILES):
      raise BadInput(f'{workdir} exists and is not the folder of a run (no config.json); give another --workdir')
    workdir.mkdir(parents=True, exist_ok=True)
    storage.write(workdir / 'versions.json', json.dumps(versions(config), indent=2) + '\n')
    storage.write(path, to_json(config))
    storage.check_listed(path)
  except OSError as error:
    raise BadInput(f'--workdir={workdir} cannot be used: {error}; give a folder that can be written') from error


def _check_saves(workdir: Path, config: Config) -> None:
  """Raises BadInput where a run has no folder of checkpoints any more: it would start over."""
  folder = workdir / 'checkpoints'
  if not storage.is_local(folder) or folder.exists():
    return
  step = max((record['step'] for record in read_lines(workdir / 'metrics.jsonl')), default=0)
  first = max(cfg.checkpoint.every_steps for cfg in (config, read_config(workdir)))  # the latest of the first save
  if folder.is_symlink() or step > first:
    raise BadInput(
      f'{folder}: not there, where metrics.jsonl has step {step}, and a run is never started over; bring it back (a '
      'link may point to a disk that is not mounted), or give another --workdir'
    )


def check_owner(workdir: Path, config: Config, safe: Sequence[str] = SAFE) -> None:
  """Raises BadInput, naming the fields, when the folder's config differs in more than `safe` values."""
  changed = {k: v for k, v in differences(read_config(workdir), config).items() if not k.startswith(tuple(safe))}
  if changed:
    what = '; '.join(f'{key} was {a!r}, is {b!r}' for key, (a, b) in changed.items())
    raise BadInput(f'{workdir} belongs to another config: {what}; undo the change, or give another --workdir')


def update_config(workdir: Path, config: Config) -> list[str]:
  """Writes the safe changes of a run that goes on; returns them, and changed versions, as lines to show.

  versions.json stays as it was: the versions that the run began with. Raises SaveFailed.
  """
  lines = [f'{key} was {a!r}, is now {b!r}' for key, (a, b) in differences(read_config(workdir), config).items()]
  with storage.full_disk_in_words(workdir / 'config.json'):
    storage.write(workdir / 'config.json', to_json(config))
  then, now = _packages_then(workdir / 'versions.json'), versions(config)['packages']
  return lines + [f'{name} was {v}, is now {now[name]}' for name, v in then.items() if now.setdefault(name, v) != v]


def _packages_then(path: Path) -> dict[str, str]:
  """The packages that a run began with; empty when nobody can tell, since that is no reason to stop it."""
  try:
    packages = json.loads(path.read_bytes())['packages']
    return {name: version for name, version in packages.items() if isinstance(version, str)}
  except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
    return {}


def read_config(workdir: Path) -> Config:
  """The sealed config of a run; raises BadInput when the folder is not one."""
  path = workdir / 'config.json'
  if not path.is_file():
    raise BadInput(f'{workdir}: no config.json, so it is not the folder of a run; give the --workdir of a training run')
  try:
    storage.check_listed(path)
    return from_json(path.read_text(encoding='utf-8'), str(path))
  except (OSError, UnicodeDecodeError) as error:
    raise BadInput(f'{path}: cannot be read ({error}); restore it, or start a new workdir') from error


def versions(config: Config) -> dict[str, object]:
  """Python, machine and every installed package."""
  packages = {d.metadata['Name']: d.version for d in importlib.metadata.distributions()}
  return {
    'config_fingerprint': fingerprint(config),
    'python': platform.python_version(),
    'platform': platform.platform(),
    'packages': dict(sorted(packages.items())),
  }
