"""A pretrained Llama as the folder of a depth-recurrent run: some layers become prelude, core and coda.

The adapter [s; e] -> x begins as x = e, so that an iteration reads the prelude's output alone: at depth 1, and before
training at any other, the run computes the chosen layers of Llama, each once, under its final norm and tied head. What
the state adds is learned: launch.train --init_from=THIS.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

from latent_loop import storage
from latent_loop.config import Config, DepthConfig
from latent_loop.errors import BadInput
from latent_loop.interop import files, huggingface, llama
from latent_loop.interop.from_hf import around, write_run
from latent_loop.interop.to_hf import check_free

Layers = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # of prelude, core and coda


def retrofit(folder: Path, output: Path, chosen: str) -> Config:
  """Makes `output`, which must not exist; returns its config. Raises BadInput before it writes, or SaveFailed."""
  storage.local_only(output, 'what retrofit makes')
  check_free(output, '--output')
  whole, key_heads, positions = llama.read_config(folder)
  parts = layers_of(chosen, whole.num_core_layers)
  prelude, core, coda = map(len, parts)
  model = dataclasses.replace(whole, num_prelude_layers=prelude, num_core_layers=core, num_coda_layers=coda)
  config = around(model, DepthConfig(kind='fixed', mean=1, backprop_depth=1), folder, output.absolute(), positions)
  where = files.tensor_files(folder)
  llama.check_extras(where, whole, folder)
  ours = huggingface.read_arrays(where, llama.table(model, sum(parts, ()), key_heads), folder)
  zeros, identity = np.zeros((model.width, model.width), np.float32), np.eye(model.width, dtype=np.float32)
  ours['injection/kernel'] = np.concatenate([zeros, identity])  # the state's half comes first
  write_run(folder, output, config, huggingface.assemble(ours, model))
  return config


def layers_of(chosen: str, count: int) -> Layers:
  """'0/1-2/3' as ((0,), (1, 2), (3,)): numbers from 0 of prelude, core and coda; raises BadInput."""
  parts = chosen.split('/')
  if len(parts) != 3 or not re.fullmatch(r'[-,/0-9]*', chosen):
    raise BadInput(f'--layers={chosen}: the rule is prelude/core/coda by numbers from 0, as in 0/1-2/3; write it so')
  prelude, core, coda = (tuple(_numbers(part, chosen)) for part in parts)
  beyond = [number for number in (*prelude, *core, *coda) if number >= count]
  if beyond:
    raise BadInput(f'--layers={chosen}: there is no layer {beyond[0]}; the checkpoint has 0 to {count - 1}')
  if not core:
    raise BadInput(f'--layers={chosen}: the core has no layer; name at least one between the two /')
  return prelude, core, coda


def _numbers(part: str, chosen: str):
  for piece in filter(None, part.split(',')):
    found = re.fullmatch(r'([0-9]{1,4})(?:-([0-9]{1,4}))?', piece)
    if not found or int(found[2] or found[1]) < int(found[1]):
      raise BadInput(f'--layers={chosen}: {piece!r} is no layer and no range of them; write 3 or 1-2')
    yield from range(int(found[1]), int(found[2] or found[1]) + 1)
