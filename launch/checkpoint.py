"""Looks at the checkpoints of a run: python -m launch.checkpoint list|verify|diff --workdir=runs/tiny_text

diff compares --steps=A --steps=B of one run, or the newest (or --steps=A --steps=B) of --workdir and --other.
"""

import os

from absl import flags

from launch import program

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a training run')
_OTHER = flags.DEFINE_string('other', None, 'diff: the folder of the second run')
_STEPS = flags.DEFINE_multi_integer('steps', None, 'verify: only these; diff: two; repeat for more')


def main(verb: str) -> int:
  os.environ['JAX_PLATFORMS'] = 'cpu'  # leaves the accelerator to the run that may be going on
  from latent_loop.checkpoint import inspect
  from latent_loop.errors import BadInput

  workdir, steps = program.workdir_of(_WORKDIR.value), _STEPS.value or []
  if verb == 'list':
    lines = inspect.table(workdir)
  elif verb == 'verify':
    lines = inspect.verify(workdir, steps)
  else:
    if not (len(steps) == 2 or _OTHER.value and not steps):
      raise BadInput('diff compares two: give --steps=A --steps=B, or --other=DIR for the newest of two runs, or all')
    first, second = steps or (None, None)
    other = program.workdir_of(_OTHER.value, '--other') if _OTHER.value else workdir
    lines = inspect.differences((workdir, first), (other, second))
  for line in lines:
    print(line, flush=True)
  return 0


if __name__ == '__main__':
  program.run(main, verbs=('list', 'verify', 'diff'))
