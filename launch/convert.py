"""Moves models: python -m launch.convert to_hf --workdir=runs/x --output=DIR or from_hf --hf=DIR --workdir=runs/y

to_hf writes a run's newest checkpoint in the Hugging Face layout of Huginn; from_hf makes a run's folder from one.
"""

import os

from absl import flags

from launch import program

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run: read by to_hf, made by from_hf')
_HF = flags.DEFINE_string('hf', None, 'from_hf: folder with config.json and safetensors')
_OUTPUT = flags.DEFINE_string('output', None, 'to_hf: the folder to make')


def main(verb: str) -> int:
  os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing is computed; leaves the accelerator alone
  from latent_loop.errors import BadInput

  workdir = program.workdir_of(_WORKDIR.value)
  flag, value = ('output', _OUTPUT.value) if verb == 'to_hf' else ('hf', _HF.value)
  if not value:
    raise BadInput(f'--{flag} is missing; {verb} takes --workdir=DIR and --{flag}=DIR')
  folder = program.path_of(flag, value)
  if verb == 'to_hf':
    from latent_loop.interop.to_hf import export

    print(f'{folder}: {", ".join(export(workdir, folder))}')
    return 0
  from latent_loop.interop.from_hf import DATA, take_in

  config = take_in(folder, workdir)
  print(f'{workdir}: step 0 of a run; python -m launch.generate --workdir={workdir} --prompt=TEXT')
  if config.data.source == 'parquet':
    print(f'launch.evaluate reads parquet files of token ids from {workdir / DATA}; put some there')
  return 0


if __name__ == '__main__':
  program.run(main, verbs=('to_hf', 'from_hf'))
