"""Moves models: python -m launch.convert to_hf --workdir=runs/x --output=DIR; or from_hf, or retrofit

to_hf writes a run's newest checkpoint in the Hugging Face layout of Huginn, or of Llama if the run is a plain decoder.
from_hf --hf=DIR --workdir=runs/y makes a run's folder from a Huginn checkpoint.
retrofit --hf=DIR --output=runs/z --layers=0/1-2/3 makes one from a Llama: its layer 0 becomes the prelude, 1 and 2 the
core, 3 the coda.
"""

import os
from pathlib import Path

from absl import flags

from launch import program

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run: read by to_hf, made by from_hf')
_HF = flags.DEFINE_string('hf', None, 'from_hf, retrofit: folder with config.json and safetensors')
_OUTPUT = flags.DEFINE_string('output', None, 'to_hf: the folder to make; retrofit: the folder of the run to make')
_LAYERS = flags.DEFINE_string('layers', None, 'retrofit: prelude/core/coda by numbers from 0, as in 0/1-2/3')

_TAKES = {'to_hf': ('workdir', 'output'), 'from_hf': ('hf', 'workdir'), 'retrofit': ('hf', 'output', 'layers')}


def main(verb: str) -> int:
  os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing is computed; leaves the accelerator alone
  from latent_loop.errors import BadInput

  for flag in _TAKES[verb]:
    if not flags.FLAGS[flag].value:
      takes = ' '.join(f'--{name}=' for name in _TAKES[verb])
      raise BadInput(f'--{flag} is missing; {verb} takes {takes}, each with a value')
  if verb == 'to_hf':
    from latent_loop.interop.to_hf import export

    folder = program.path_of('--output', _OUTPUT.value)
    print(f'{folder}: {", ".join(export(program.workdir_of(_WORKDIR.value), folder))}')
    return 0
  return _make(verb, program.path_of('--hf', _HF.value))


def _make(verb: str, folder: Path) -> int:
  """A run's folder from one of theirs."""
  from latent_loop.interop.from_hf import DATA, next_step, take_in
  from latent_loop.interop.retrofit import retrofit

  if verb == 'from_hf':
    workdir = program.workdir_of(_WORKDIR.value)
    config = take_in(folder, workdir)
  else:
    workdir = program.workdir_of(_OUTPUT.value, '--output')
    config = retrofit(folder, workdir, _LAYERS.value)
  print(next_step(folder, workdir, config))
  if config.data.source == 'parquet':
    print(f'launch.evaluate reads parquet files of token ids from {workdir / DATA}; put some there')
  return 0


if __name__ == '__main__':
  program.run(main, verbs=tuple(_TAKES))
