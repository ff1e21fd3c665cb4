"""Trains: python -m launch.train --config=experiments/tiny_text.py --workdir=runs/tiny_text"""

from absl import flags

from launch import hosts, program

_CONFIG = program.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run; not empty = continue')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'print what would run, touch no device and no file, stop')
_PROFILE = flags.DEFINE_string('profile_steps', None, 'first:last, steps to trace with jax.profiler')


def main() -> int:
  config = program.sealed(_CONFIG)
  if _DRY_RUN.value:
    from latent_loop import dry_run

    print(dry_run.describe(config))
    return 0
  workdir, profile_steps = program.workdir_of(_WORKDIR.value), program.step_range(_PROFILE.value)
  group = hosts.join(config, workdir)
  from latent_loop import loop  # only now: a wrong flag is refused before JAX starts

  return loop.run(config, workdir, profile_steps, group.agree if group else loop.alone)


if __name__ == '__main__':
  program.run(main)
