"""Trains: python -m launch.train --config=experiments/tiny_text.py --workdir=runs/tiny_text"""

import math
import time

from absl import flags

from launch import hosts, program

_CONFIG = program.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run; not empty = continue')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'print what would run, touch no device and no file, stop')
_PROFILE = flags.DEFINE_string('profile_steps', None, 'first:last, steps to trace with jax.profiler')
_TIME_LIMIT = flags.DEFINE_float(
  'time_limit', None, 'minutes from the start after which it saves and ends with code 10'
)
_INIT_FROM = flags.DEFINE_string(
  'init_from', None, 'folder of a run, or a Huginn checkpoint, whose parameters a new run begins with'
)


def main() -> int:
  deadline = _deadline(time.monotonic())
  config = program.sealed(_CONFIG)
  if _DRY_RUN.value:
    from latent_loop import dry_run

    print(dry_run.describe(config))
    return 0
  workdir, profile_steps = program.workdir_of(_WORKDIR.value), program.step_range(_PROFILE.value)
  group = hosts.join(config, workdir)
  from latent_loop import loop  # only now: a wrong flag is refused before JAX starts

  program.keep_compiled()
  _begin(config, workdir)
  return loop.run(config, workdir, profile_steps, group, deadline)


def _begin(config, workdir) -> None:
  """What --init_from asks for, unless the run has begun already."""
  from latent_loop import start_from

  source = _INIT_FROM.value
  start_from.begin(config, workdir, None if source is None else program.workdir_of(source, '--init_from'))


def _deadline(now: float) -> float:
  """When to save and stop, of time.monotonic(); raises BadInput."""
  from latent_loop.errors import BadInput

  minutes = _TIME_LIMIT.value
  if minutes is not None and not minutes > 0:
    raise BadInput(f'--time_limit={minutes}: not a time; give minutes above 0')
  return math.inf if minutes is None else now + 60 * minutes


if __name__ == '__main__':
  program.run(main)
