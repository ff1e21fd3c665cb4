"""A new run that begins with the parameters of another: step 0, a fresh optimizer, its own data and schedule.

The first state is saved as step 0 before the first step, so whatever happens to the source later, the run goes on as
it began, and to start it again is to resume it.
"""

import dataclasses
import json
from typing import Any

import jax

from latent_loop import loop, storage, trained
from latent_loop.checkpoint import Checkpoints
from latent_loop.checkpoint.folder import Folder
from latent_loop.config import Config, DepthConfig, ModelConfig
from latent_loop.errors import BadInput
from latent_loop.interop import files, huggingface
from latent_loop.model import Params, build
from latent_loop.parallel import mesh as meshes
from latent_loop.parallel.sharding import path_of
from latent_loop.progress import say
from latent_loop.sealing import fingerprint
from latent_loop.storage import Path
from latent_loop.workdir import open_workdir, read_config

RECORD = 'init_from.json'  # in the new workdir: where its parameters come from
_HOW_ONLY = ('init', 'compute_dtype', 'attention', 'remat')  # of ModelConfig: not what the weights mean


def begin(config: Config, workdir: Path, source: Path | None) -> None:
  """Makes `workdir` with step 0 from `source`, a run or a Huginn checkpoint; leaves one with checkpoints as it is.

  source: None where the flag is not given. Raises BadInput, before anything is written, for what does not fit.
  """
  folder = Folder(workdir)
  with folder.fault_in_words():
    begun = folder.steps() or folder.list_set_aside()
  if begun:
    if source is not None:
      say(f'{workdir}: has checkpoints and goes on from them; --init_from={source} is read when a run begins')
    return
  if source is not None:
    _make(config, workdir, source)
  elif (workdir / RECORD).exists():
    raise BadInput(
      f'{workdir / RECORD}: this run was to begin with the parameters of another, and was stopped before its first '
      'save; give the same --init_from again, or another --workdir'
    )


def _make(config: Config, workdir: Path, source: Path) -> None:
  mesh = meshes.make_mesh(config.mesh)
  loop.check_what_is_here(config, mesh)
  _, _, data_fingerprint = loop.open_data(config, mesh, workdir)
  params, origin = _read(config, source, mesh)
  state = trained.first_state(config, params, mesh)
  open_workdir(workdir, config)
  with Checkpoints(workdir, config.checkpoint) as checkpoints:
    if jax.process_index() == 0:
      checkpoints.folder.claim()
      with storage.full_disk_in_words(workdir / RECORD):
        checkpoints.folder.clean_up()  # a step 0 that a kill left without its manifest
        storage.write(workdir / RECORD, json.dumps({'source': str(source), **origin}, indent=2) + '\n')
    checkpoints.save(0, state, {'config': dataclasses.asdict(config), 'data_fingerprint': data_fingerprint})
  say(f'{workdir}: begins with the parameters of {source}, step {origin["step"]}')


def _read(config: Config, source: Path, mesh: Any) -> tuple[Params, dict[str, Any]]:
  """(the parameters, what is recorded of them): of a run those that it is evaluated with."""
  if _is_hf(source):
    model, _ = huggingface.read_config(source)
    _check_same(config.model, model, source)
    return huggingface.read_params(source, model), {'step': 0, 'config_fingerprint': None}
  if not (source / 'config.json').is_file():
    raise BadInput(
      f'--init_from={source}: no config.json there; give the workdir of a training run, or the folder of a Huginn '
      'checkpoint as Hugging Face has it'
    )
  theirs = read_config(source)
  _check_same(config.model, theirs.model, source)
  found = trained.load_on(source, mesh)
  return found.params, {'step': found.step, 'config_fingerprint': fingerprint(theirs)}


def _is_hf(source: Path) -> bool:
  path = source / huggingface.CONFIG
  return storage.is_local(source) and path.is_file() and bool(files.read_json(path).keys() & {*huggingface.NAMES})


def _check_same(ours: ModelConfig, theirs: ModelConfig, source: Path) -> None:
  """Raises BadInput for the first parameter that differs in shape; says what else changes the function."""
  here, there = _shapes(ours), _shapes(theirs)
  changed = [name for name in vars(ours) if name not in _HOW_ONLY and vars(ours)[name] != vars(theirs)[name]]
  for name in sorted(here.keys() | there.keys()):
    if here.get(name) != there.get(name):
      raise BadInput(
        f'--init_from={source}: parameter {name} is {there.get(name, "absent")} there and {here.get(name, "absent")} '
        'in this config; set ' + ', '.join(f'config.model.{key}={vars(theirs)[key]!r}' for key in changed)
      )
  for key in changed:
    was, now = vars(theirs)[key], vars(ours)[key]
    say(f'warning: config.model.{key} is {was!r} in {source} and {now!r} here, where its weights compute another thing')


def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  tree = jax.eval_shape(build(cfg, DepthConfig()).init, jax.random.key(0))
  return {path_of(keypath): leaf.shape for keypath, leaf in jax.tree_util.tree_leaves_with_path(tree)}
