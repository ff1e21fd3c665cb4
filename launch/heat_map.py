"""Draws exact match by difficulty and depth:

python -m launch.heat_map --output=experiments/results/think_longer [--run=runs/think_longer/automaton_0 ...]

With --run it first gathers the runs' difficulties.json into OUTPUT.json; OUTPUT.png is drawn from OUTPUT.json.
"""

import json

from absl import flags

from launch import program

_RUNS = flags.DEFINE_multi_string('run', [], 'folder of a run that launch.evaluate difficulties has been through')
_OUTPUT = flags.DEFINE_string('output', None, 'where .json and .png go, without the ending')


def main() -> int:
  from latent_loop import storage
  from latent_loop.interop.files import read_json
  from latent_loop.report import heat_map

  output = program.workdir_of(_OUTPUT.value, '--output')
  source, picture = output.with_name(f'{output.name}.json'), output.with_name(f'{output.name}.png')
  if _RUNS.value:
    runs = [read_json(program.workdir_of(run, '--run') / 'difficulties.json') for run in _RUNS.value]
    storage.write(source, json.dumps({'runs': runs}, indent=1) + '\n')
  picture.write_bytes(heat_map.png_of(read_json(source)['runs']))
  print(f'wrote {picture} from {source}')
  return 0


if __name__ == '__main__':
  program.run(main)
