"""Gathers what runs measured in one JSON file and draws it:

python -m launch.figure difficulties --output=experiments/results/think_longer --run=runs/think_longer/automaton_0

With --run (repeat for more) it first gathers the file that a program left in each folder: difficulties.json and
exits.json of launch.evaluate, study.json and sweep.json of the programs of that name, in OUTPUT.json. For depth_cost
OUTPUT.jsonl is what launch.bench depth printed. OUTPUT.png is drawn from that file alone.
"""

import json

from absl import flags

from launch import program

VERBS = ('difficulties', 'exits', 'study', 'sweep', 'depth_cost')
_RUNS = flags.DEFINE_multi_string('run', [], 'folder to gather from; repeat for more; none: draw OUTPUT.json as it is')
_OUTPUT = flags.DEFINE_string('output', None, 'where .json and .png go, without the ending')


def main(verb: str) -> int:
  from latent_loop import storage
  from latent_loop.errors import BadInput
  from latent_loop.interop.files import entry, read_json
  from latent_loop.report import depth_cost, exits, heat_map, study, sweep

  output = program.workdir_of(_OUTPUT.value, '--output')
  if not output.parent.is_dir():
    raise BadInput(f'--output={output}: not a file in a folder that exists; give another path, or make the folder')
  lines = verb == 'depth_cost'
  if lines and _RUNS.value:
    raise BadInput(
      f'--run={_RUNS.value[0]}: depth_cost gathers nothing; write what launch.bench depth prints to .jsonl'
    )
  source = output.with_name(f'{output.name}.json{"l" if lines else ""}')
  picture = output.with_name(f'{output.name}.png')
  draw = {
    'difficulties': heat_map.png_of,
    'exits': exits.png_of,
    'study': study.png_of,
    'sweep': sweep.png_of,
    'depth_cost': depth_cost.png_of,
  }[verb]
  where = source
  try:
    if _RUNS.value:
      gathered = []
      for run in _RUNS.value:
        where = program.workdir_of(run, '--run') / f'{verb}.json'
        found = read_json(where)
        draw([found])  # or a fault is of all of them
        gathered.append(exits.short(found) if verb == 'exits' else found)
      storage.write(source, json.dumps({'runs': gathered}, indent=1) + '\n')
      where = source
    png = draw(_read_lines(source) if lines else entry(source, read_json(source), 'runs', list))
  except (LookupError, TypeError, ValueError, AttributeError) as error:
    raise BadInput(f'{where}: not numbers of {verb} that can be drawn ({error!r}); write it again') from error
  picture.write_bytes(png)
  print(f'wrote {picture} from {source}')
  return 0


def _read_lines(source) -> list:
  from latent_loop.errors import BadInput

  try:
    return [json.loads(line) for line in source.read_text().splitlines()]
  except OSError as error:
    raise BadInput(f'{source}: cannot be read ({error}); write there what launch.bench depth prints') from error


if __name__ == '__main__':
  program.run(main, verbs=VERBS)
