"""A run's newest checkpoint as a folder in the Hugging Face layout, whole or not at all.

The layout is Llama's for a plain decoder (llama.py says which that is), the reference's for all others.
"""

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from latent_loop import storage
from latent_loop.config import Config
from latent_loop.errors import BadInput, SaveFailed
from latent_loop.interop import files, huggingface, llama, tokenizer_files
from latent_loop.model import Params
from latent_loop.trained import load
from latent_loop.workdir import read_config

GENERATION = 'generation_config.json'
SHARD_BYTES = 5 * 10**9  # of one weights file at most, as on the Hub; the host holds one at a time
_UNFINISHED = '.unfinished'
_MODELING = Path(__file__).parent / 'modeling'  # what transformers runs, with trust_remote_code
_AUTO_MAP = {
  'AutoConfig': 'configuration_raven.RavenConfig',
  'AutoModelForCausalLM': 'modeling_raven.RavenForCausalLM',
}


def export(workdir: storage.Path, output: Path, shard_bytes: int = SHARD_BYTES) -> list[str]:
  """Writes `output`, which must not exist; returns its files. The moving average is written where the run keeps one.

  Raises BadInput, before anything is written, for a model or depth law that the layout cannot say, and SaveFailed
  when the disk refuses.
  """
  texts = texts_of(read_config(workdir))
  check_free(output, '--output')
  found = load(workdir)
  return write_folder(output, texts, found.params, found.config, shard_bytes)


def check_free(folder: Path, flag: str) -> None:
  """Raises BadInput when there is something in the place of `folder`."""
  if folder.exists() or folder.is_symlink():
    raise BadInput(f'{flag}={folder}: it is there already, and nothing is overwritten; move it away or give another')


def texts_of(config: Config) -> dict[str, str]:
  """Every file of the export but the weights; raises BadInput."""
  written = tokenizer_files.files_of(config.data)
  generation = tokenizer_files.generation_config(config.data, written)
  if llama.is_plain(config):
    tokens = {key: value for key, value in generation.items() if key.endswith('_token_id')}
    values, code = llama.config_to_hf(config.model, config.data.seq_len) | tokens, {}
  else:
    values = huggingface.config_to_hf(config.model, config.depth, config.data.seq_len) | {'auto_map': _AUTO_MAP}
    code = {path.name: path.read_text(encoding='utf-8') for path in sorted(_MODELING.glob('*.py'))}
  as_text = lambda value: json.dumps(value, indent=2) + '\n'
  return {huggingface.CONFIG: as_text(values), GENERATION: as_text(generation), **written, **code}


def write_folder(output: Path, texts: dict[str, str], params: Params, config: Config, shard_bytes: int) -> list[str]:
  """The folder is made beside its place and renamed last; a process killed meanwhile leaves OUTPUT.unfinished."""
  unfinished = output.with_name(output.name + _UNFINISHED)
  try:
    if unfinished.exists():
      shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    for name, text in texts.items():
      storage.write(unfinished / name, text)
    _write_weights(unfinished, params, config, shard_bytes)
    os.rename(unfinished, output)
  except (OSError, SafetensorError) as error:
    shutil.rmtree(unfinished, ignore_errors=True)
    raise SaveFailed(f'--output={output}: the export could not be written ({error}); make room, start again') from error
  return sorted(path.name for path in output.iterdir())


def _write_weights(folder: Path, params: Params, config: Config, shard_bytes: int) -> None:
  sizes, tensors = _tensors(params, config)
  shards = plan_shards(sizes, shard_bytes)
  names = [f'model-{i:05d}-of-{len(shards):05d}.safetensors' for i in range(1, len(shards) + 1)]
  names = [files.WEIGHTS] if len(shards) == 1 else names
  for name, shard in zip(names, shards, strict=True):
    save_file(dict(next(tensors) for _ in shard), folder / name, metadata={'format': 'pt'})
    (folder / name).chmod(0o644)  # safetensors makes files that only their owner can read
    with open(folder / name, 'rb') as file:
      os.fsync(file.fileno())
  if len(shards) > 1:
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
    storage.write(folder / files.INDEX, json.dumps(index, indent=2) + '\n')


def _tensors(params: Params, config: Config) -> tuple[dict[str, int], Iterator[tuple[str, np.ndarray]]]:
  """(bytes by name, name and array one by one) of what the layout holds."""
  sizes_of = lambda table: {tensor.name: 4 * math.prod(tensor.shape) for tensor in table}
  if llama.is_plain(config):
    table = llama.table(config.model)
    return sizes_of(table), huggingface.stream(params, table)
  rotary = huggingface.rotary_table(config.model, config.data.seq_len)
  sizes = {huggingface.ROTARY: rotary.nbytes} | sizes_of(huggingface.table(config.model))
  first = iter([(huggingface.ROTARY, rotary)])
  return sizes, itertools.chain(first, huggingface.stream_to_hf(params, config.model))


def plan_shards(sizes: dict[str, int], most: int) -> list[list[str]]:
  """Names in order, cut where a file would pass `most` bytes; a tensor above that is a file of its own."""
  shards: list[list[str]] = [[]]
  room = most
  for name, size in sizes.items():
    if size > room and shards[-1]:
      shards.append([])
      room = most
    shards[-1].append(name)
    room -= size
  return shards
