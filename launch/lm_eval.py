"""lm-eval-harness on a run: python -m launch.lm_eval --model latent_loop --model_args workdir=runs/x,depth=8 --tasks T

depths=1:4:8 in the place of depth=8 gives a line of the table for each, and scores texts at all of them in one pass.
The arguments are those of the harness; tasks of your own: --include_path FOLDER. HF_HUB_OFFLINE=1 keeps it offline.
"""

import sys

from latent_loop import optional
from latent_loop.errors import BadInput, StoreFault
from latent_loop.exit_codes import BAD_INPUT
from launch import program, xla_flags


def main() -> None:
  xla_flags.forget_absent_tpus()
  program.watch_stores()
  try:
    lm_eval = optional.load('lm_eval', 'interop', 'launch.lm_eval')
    from lm_eval.__main__ import cli_evaluate

    from latent_loop.interop import harness  # which registers the model

    lm_eval.simple_evaluate = harness.by_depth(lm_eval.simple_evaluate)
    try:
      cli_evaluate()
    except ValueError as error:
      if 'Tasks not found' not in str(error):
        raise
      advice = '`lm-eval ls tasks` lists what it knows, and --include_path FOLDER adds your own'
      raise BadInput(f'--tasks: {str(error).splitlines()[0]}; {advice}') from error
  except (BadInput, StoreFault) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(BAD_INPUT)


if __name__ == '__main__':
  main()
