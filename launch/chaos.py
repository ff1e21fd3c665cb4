"""Tries what a run promises: python -m launch.chaos corrupt --count=200

Ends with one JSON line; exit code 0 only when it says "ok": true.
"""

import json
import tempfile
from pathlib import Path

from absl import flags

from launch import program

_COUNT = flags.DEFINE_integer('count', 200, 'corrupt: how many accidents to checkpoints', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'another seed, other accidents')


def main(verb: str) -> int:
  from latent_loop.chaos import corrupt

  del verb  # there is one so far
  with tempfile.TemporaryDirectory(prefix='chaos') as folder:
    result = corrupt.corrupt(_COUNT.value, _SEED.value, Path(folder), print)
  print(json.dumps(result))
  return 0 if result['ok'] else program.BUG


if __name__ == '__main__':
  program.run(main, verbs=('corrupt',))
