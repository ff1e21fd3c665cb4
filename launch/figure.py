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
  from latent_loop.interop.files import entry, read_json, read_lines
  from latent_loop.report import depth_cost, exits, heat_map, study, sweep

  draw = {
    'difficulties': heat_map.png_of,
    'exits': exits.png_of,
    'study': study.png_of,
    'sweep': sweep.png_of,
    'depth_cost': depth_cost.png_of,
  }[verb]
  output = program.workdir_of(_OUTPUT.value, '--output')
  if not output.name or not output.parent.is_dir():
    raise BadInput(f'--output={output}: not a file in a folder that exists; give another path, or make the folder')
  lines = verb == 'depth_cost'
  if lines and _RUNS.value:
    raise BadInput(
      f'--run={_RUNS.value[0]}: depth_cost gathers nothing; put what launch.bench depth prints in {output}.jsonl'
    )
  source = output.with_name(f'{output.name}.json{"l" if lines else ""}')
  if not _RUNS.value and not source.is_file():
    remedy = 'put there what launch.bench depth prints' if lines else 'give --run=DIR to gather it from that folder'
    raise BadInput(f'--output={output}: {source} does not exist; {remedy}, or an --output whose {source.suffix} exists')
  gathered = []
  for run in _RUNS.value:
    file = program.workdir_of(run, '--run') / f'{verb}.json'
    found = read_json(file)
    _drawn(draw, [found], file)
    gathered.append(exits.short(found) if verb == 'exits' else found)
  if gathered:
    png = _drawn(draw, gathered, ', '.join(_RUNS.value))  # together; only then is anything replaced
  else:
    png = _drawn(draw, read_lines(source) if lines else entry(source, read_json(source), 'runs', list), source)
  picture = output.with_name(f'{output.name}.png')
  try:
    if gathered:
      storage.write(source, json.dumps({'runs': gathered}, indent=1) + '\n')
    picture.write_bytes(png)
  except OSError as error:
    raise BadInput(f'--output={output}: cannot be written ({error.strerror}); give another path') from error
  print(f'wrote {picture} from {source}')
  return 0


def _drawn(draw, runs: list, where) -> bytes:
  """The picture; raises BadInput where `runs`, read from `where`, are not what can be drawn."""
  from latent_loop.errors import BadInput

  try:
    return draw(runs)
  except BadInput as error:
    raise BadInput(f'{where}: {error}') from error
  except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
    raise BadInput(f'{where}: not numbers that can be drawn together ({error!r}); measure them again') from error


if __name__ == '__main__':
  program.run(main, verbs=VERBS)
