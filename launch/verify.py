"""Compares this code with the reference's numbers: python -m launch.verify --golden=tests/golden/huginn_tiny"""

import json

from absl import flags

from launch import program

_GOLDEN = flags.DEFINE_string('golden', None, 'folder of golden numbers: config.json, weights, what they must give')


def main() -> int:
  from latent_loop.errors import BadInput

  if not _GOLDEN.value:
    raise BadInput('--golden is missing; give a folder such as tests/golden/huginn_tiny')
  from latent_loop.interop.verify import verify

  result = verify(program.path_of('--golden', _GOLDEN.value))
  print(json.dumps(result), flush=True)
  return 0 if result['ok'] else 1


if __name__ == '__main__':
  program.run(main)
