"""Trains a grid of runs under a budget of FLOPs and fits how the loss falls:

python -m launch.sweep --config=experiments/tiny_text.py --workdir=runs/sweep --width=64 --width=128 --mean_depth=2
--mean_depth=8 --tokens=100000 --tokens=200000 --max_flops=1e14. Started again, it goes on where it was cut off.
One process, on the devices that it finds.
"""

from absl import flags

from launch import program

_CONFIG = program.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the sweep; each run is a folder in it')
_WIDTH = flags.DEFINE_multi_integer('width', [], 'model width; repeat for more; default what the config says')
_MEAN_DEPTH = flags.DEFINE_multi_integer('mean_depth', [], 'mean depth of training; repeat for more')
_TOKENS = flags.DEFINE_multi_integer('tokens', [], 'tokens to train on, rounded to whole steps; repeat for more')
_MAX_FLOPS = flags.DEFINE_float('max_flops', None, 'budget of all runs together; the dearest are left out', 0)
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'print what each run would cost, train nothing')


def main() -> int:
  config = program.sealed(_CONFIG)
  workdir = None if _DRY_RUN.value else program.workdir_of(_WORKDIR.value)
  from latent_loop import sweep  # only now: a wrong flag is refused before JAX starts
  from latent_loop.exit_codes import DONE

  program.keep_compiled()
  cells = sweep.grid(config, _WIDTH.value, _MEAN_DEPTH.value, _TOKENS.value)
  budget = float('inf') if _MAX_FLOPS.value is None else _MAX_FLOPS.value
  cells, left_out = sweep.within(cells, budget)
  for cell in cells:
    print(f'{sweep.name_of(cell)}: {cell.parameters:,} parameters, {cell.tokens:,} tokens, {cell.flops:.4g} FLOPs')
  for cell in left_out:
    print(f'{sweep.name_of(cell)}: left out, {cell.flops:.4g} FLOPs would pass --max_flops={budget:.4g}')
  if _DRY_RUN.value:
    return DONE
  results = []
  for cell, code, result in sweep.run(cells, workdir):
    if code != DONE:
      return code
    results.append(result)
    print(f'{sweep.name_of(cell)}: done, {len(results)} of {len(cells)}', flush=True)
  law = sweep.fit(results)
  path = sweep.save(workdir, results, law)
  print('\n'.join(sweep.table(results, law)))
  print(f'wrote {path}')
  return DONE


if __name__ == '__main__':
  program.run(main)
