"""Plans a run: python -m launch.plan --config=experiments/huginn_3p5b.py --topology=v5p:4x4x4

Compiles the train step for chips that are not here and prints what it would need and take: for TPUs with
launch/requirements/tpu.txt, for NVIDIA's A100, H100 and H200 (h100:64) with launch/requirements/cuda.txt. Where the
compiler is not installed, GPUs are counted without it.
"""

import json
import os
import sys
from pathlib import Path

from absl import flags

from launch import program, xla_flags

_CONFIG = program.define_config()
_TOPOLOGY = flags.DEFINE_string('topology', None, 'chip and shape, such as v5p:4x4x4, v5e:16x16, h200:64, cpu:8')
_SLICES = flags.DEFINE_integer('slices', 1, 'slices of that shape, joined by the data-center network')
_GLOBAL_BATCH = flags.DEFINE_integer('global_batch', None, 'rows per step; default: the config')
_DUMP_HLO = flags.DEFINE_string('dump_hlo', None, 'write the optimized HLO of the step here')
_JSON = flags.DEFINE_bool('json', False, 'print one JSON line instead of the table')

_CPU_DEVICES = 64  # that cpu:N may ask for, where XLA_FLAGS say no other number
# The compiler alone: no device is looked for, here or on the network.
_ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}


def main() -> int:
  os.environ.update(_ENVIRONMENT)
  from latent_loop.errors import BadInput

  config = program.sealed(_CONFIG)
  if not _TOPOLOGY.value:
    raise BadInput('--topology is missing; give a chip and a shape, such as v5p:4x4x4')
  if _GLOBAL_BATCH.value is not None and _GLOBAL_BATCH.value < 1:
    raise BadInput(f'--global_batch={_GLOBAL_BATCH.value} is below 1; give a number of rows')
  if _DUMP_HLO.value is not None and not program.path_of('--dump_hlo', _DUMP_HLO.value).parent.is_dir():
    raise BadInput(f'--dump_hlo={_DUMP_HLO.value}: its folder does not exist; make it, or give another path')
  if _TOPOLOGY.value.startswith('cpu:'):
    xla_flags.use_devices(_CPU_DEVICES)
  from latent_loop import planner

  say = lambda line: print(line, file=sys.stderr, flush=True)
  made = planner.plan(config, _TOPOLOGY.value, _SLICES.value, _GLOBAL_BATCH.value, say)
  if _DUMP_HLO.value and not made.topology.devices:
    raise BadInput(
      f'--dump_hlo={_DUMP_HLO.value}: nothing here compiles for {made.topology.name}; leave the flag out, or, for '
      "NVIDIA's GPUs, pip install -r launch/requirements/cuda.txt"
    )
  numbers = planner.summary(made)
  print(json.dumps(numbers) if _JSON.value else planner.describe(made, numbers), flush=True)
  if _DUMP_HLO.value:
    if made.hlo_text is None:
      raise BadInput(f'--dump_hlo={_DUMP_HLO.value}: no program came out, since it does not fit; see the plan')
    try:
      Path(_DUMP_HLO.value).write_text(made.hlo_text)
    except OSError as error:
      raise BadInput(f'--dump_hlo={_DUMP_HLO.value}: cannot be written ({error}); give another path') from error
  return 0


if __name__ == '__main__':
  program.run(main)
