"""Trains the variants of a study with several seeds and compares them by depth:

python -m launch.study --study=experiments/studies/recipe.py --workdir=runs/recipe
python -m launch.figure study --run=runs/recipe --output=experiments/results/study_recipe

A study that was cut off, by a signal too, goes on when it is started again. A study file has get_variants(), which
returns {name: config}, and DEPTHS, the test-time depths to evaluate. study.json has the variants and seeds of the last
start.
"""

import runpy

from absl import flags

from launch import program, xla_flags

_STUDY = flags.DEFINE_string('study', None, 'file of the study, such as experiments/studies/recipe.py')
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder for the runs and study.json')
_SEEDS = flags.DEFINE_multi_integer('seed', [0, 1, 2], 'repeat for more', lower_bound=0)
_VARIANTS = flags.DEFINE_multi_string('variant', [], 'only this one; repeat for more; default all')
_PROCESSES = flags.DEFINE_integer('processes', 2, 'trials at once, each on its share of the cores', lower_bound=1)


def main() -> int:
  from latent_loop import study
  from latent_loop.errors import BadInput
  from latent_loop.exit_codes import DONE

  xla_flags.keep_memory()  # for the trials, which inherit it
  name, variants, depths = _read_study()
  workdir = program.path_of('--workdir', _required(_WORKDIR))
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise BadInput(f'--workdir={workdir} cannot be used: {error}; give a folder that can be written') from error
  todo = study.trials(variants, _SEEDS.value, workdir)
  code = study.run(todo, depths, _PROCESSES.value, lambda line: print(line, flush=True))
  if code == DONE:
    rows = study.results(todo)
    path = study.save(workdir, name, rows)
    print('\n'.join(study.table(rows)))
    print(f'wrote {path}')
  return code


def _required(flag) -> str:
  """The value of a flag; raises BadInput where it is not given."""
  from latent_loop.errors import BadInput

  if not flag.value:
    raise BadInput(f'--{flag.name} is missing; see python -m launch.study --help')
  return flag.value


def _read_study():
  """(name, {variant: sealed config}, depths) of --study and --variant; raises BadInput."""
  from latent_loop.errors import BadInput
  from latent_loop.sealing import seal

  path = program.path_of('--study', _required(_STUDY))
  if not path.is_file():
    raise BadInput(f'--study={path}: no such file; give one such as experiments/studies/recipe.py')
  try:
    found = runpy.run_path(str(path))
    variants, depths = {name: seal(config) for name, config in found['get_variants']().items()}, tuple(found['DEPTHS'])
  except BadInput as error:
    raise BadInput(f'--study={path}: {error}') from error
  except Exception as error:  # a study file is a program of the user's, and may raise anything
    raise BadInput(
      f'--study={path}: it does not run ({type(error).__name__}: {error}); give a file such as '
      'experiments/studies/recipe.py, with get_variants() and DEPTHS'
    ) from error
  unknown = sorted(set(_VARIANTS.value) - variants.keys())
  if unknown:
    raise BadInput(f'--variant={unknown[0]}: not in {path}; choose from {", ".join(variants)}')
  chosen = {name: config for name, config in variants.items() if not _VARIANTS.value or name in _VARIANTS.value}
  return path.stem, chosen, depths


if __name__ == '__main__':
  program.run(main)
