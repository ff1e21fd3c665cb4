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
  from latent_loop.errors import BadInput
  from latent_loop.interop.files import entry, read_json
  from latent_loop.report import heat_map

  output = program.workdir_of(_OUTPUT.value, '--output')
  if not output.parent.is_dir():
    raise BadInput(f'--output={output}: not a file in a folder that exists; give another path, or make the folder')
  source, picture = output.with_name(f'{output.name}.json'), output.with_name(f'{output.name}.png')
  if _RUNS.value:
    files = [program.workdir_of(run, '--run') / 'difficulties.json' for run in _RUNS.value]
    gathered = {'runs': [read_json(file) for file in files]}
    for run, file in zip(gathered['runs'], files, strict=True):
      heat_map.check(run, file)
    storage.write(source, json.dumps(gathered, indent=1) + '\n')
  runs = entry(source, read_json(source), 'runs', list)
  for run in runs:
    heat_map.check(run, source)
  picture.write_bytes(heat_map.png_of(runs))
  print(f'wrote {picture} from {source}')
  return 0


if __name__ == '__main__':
  program.run(main)
