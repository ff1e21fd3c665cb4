"""A checkpoint of the reference as a model of ours, in memory, or as a run's folder: its weights as verified step 0."""

import dataclasses
import math
import os
import shutil
from pathlib import Path

import jax

from latent_loop import storage, trained
from latent_loop.checkpoint import Checkpoints
from latent_loop.config import Config, DataConfig, DepthConfig, MeshConfig, ModelConfig, TrainConfig
from latent_loop.data import make_tokenizer
from latent_loop.errors import BadInput, SaveFailed
from latent_loop.interop import files, huggingface, tokenizer_files
from latent_loop.interop.to_hf import check_free
from latent_loop.model import Params, build
from latent_loop.parallel import mesh as meshes
from latent_loop.parallel import sharding
from latent_loop.workdir import open_workdir

DATA = 'data'  # where parquet files for evaluation belong, in the workdir
_UNFINISHED = '.unfinished'


def take_in(folder: Path, workdir: storage.Path) -> Config:
  """Makes `workdir`, which must not exist, from the checkpoint in `folder`; returns its config.

  Raises BadInput for what is not Huginn's or is broken, before anything is written; SaveFailed when the disk refuses.
  """
  storage.local_only(workdir, 'what from_hf makes')
  check_free(workdir, '--workdir')
  config = config_of(folder, workdir.absolute())
  write_run(folder, workdir, config, huggingface.read_params(folder, config.model))
  return config


def load(folder: Path, tensor: int = 1) -> trained.Trained:
  """The checkpoint in `folder` on the devices of this machine, as `trained.load` gives a run; nothing is written.

  Raises BadInput for what is not Huginn's or is broken.
  """
  config = config_of(folder, folder.absolute())
  mesh = meshes.make_mesh(MeshConfig(tensor=tensor))
  params = huggingface.read_params(folder, config.model)
  params = jax.device_put(params, sharding.shardings(params, mesh))
  return trained.Trained(config, build(config.model, config.depth), params, mesh, step=0)


def write_run(folder: Path, workdir: Path, config: Config, params: Params) -> None:
  """A run's folder, `params` as its step 0 and the tokenizer of `folder`, whole or not at all; raises SaveFailed."""
  unfinished = workdir.with_name(workdir.name + _UNFINISHED)
  try:
    if unfinished.exists():
      shutil.rmtree(unfinished)
    open_workdir(unfinished, config)
    _copy_tokenizer(folder, unfinished)
    _save(unfinished, config, params)
    os.rename(unfinished, workdir)
  except OSError as error:
    shutil.rmtree(unfinished, ignore_errors=True)
    raise SaveFailed(f'{workdir}: it could not be written ({error}); make room, start again') from error


def config_of(folder: Path, workdir: Path) -> Config:
  """The config of a run that could have made the checkpoint; raises BadInput."""
  model, depth = huggingface.read_config(folder)
  path = folder / huggingface.CONFIG
  return around(model, depth, folder, workdir, files.entry(path, files.read_json(path), 'block_size', int))


def around(model: ModelConfig, depth: DepthConfig, folder: Path, workdir: Path, seq_len: int) -> Config:
  """All of a config from its model. Without a tokenizer.json, or with that of bytes, text is bytes; else it is read
  with a copy of the file in `workdir`. Raises BadInput."""
  found = folder / tokenizer_files.TOKENIZER
  data = DataConfig(seq_len=seq_len)
  if found.exists() and not tokenizer_files.is_bytes(found):
    there = DataConfig(source='parquet', seq_len=seq_len, paths=(str(workdir / DATA),), tokenizer=str(found))
    ids = make_tokenizer(there).vocab_size
    if ids > model.vocab_size:
      raise BadInput(f'{found}: has {ids} token ids, and the model {model.vocab_size}; they are not of one checkpoint')
    data = dataclasses.replace(there, tokenizer=str(workdir / tokenizer_files.TOKENIZER))
  train = TrainConfig()
  train = dataclasses.replace(train, loss_chunk=math.gcd(train.loss_chunk, seq_len))
  return Config(name=folder.absolute().name, model=model, depth=depth, data=data, train=train)


def next_step(folder: Path, workdir: storage.Path, config: Config) -> str:
  """A line on the run that was made of `folder`: the command that uses it, or what it lacks for that."""
  if trained.tokenizer_of(config) is None:
    missing = f'{folder} has no tokenizer.json; put it there, remove {workdir}, start again'
    return f'{workdir}: step 0 of a run that cannot read text, since {missing}'
  return f'{workdir}: step 0 of a run; python -m launch.generate --workdir={workdir} --prompt=TEXT'


def _copy_tokenizer(folder: Path, workdir: Path) -> None:
  for name in (tokenizer_files.TOKENIZER, tokenizer_files.ABOUT):
    if (folder / name).is_file():
      storage.write(workdir / name, (folder / name).read_bytes())


def _save(workdir: Path, config: Config, params: Params) -> None:
  state = trained.first_state(config, params, meshes.make_mesh(MeshConfig()))
  with Checkpoints(workdir, config.checkpoint) as checkpoints:
    # No data made these weights, so there is no fingerprint to hold later data against.
    checkpoints.save(0, state, {'config': dataclasses.asdict(config), 'data_fingerprint': None})
