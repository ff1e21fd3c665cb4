"""Tries what a run promises: python -m launch.chaos corrupt --count=200, inputs --count=500, kill --kills=20,
or serve --minutes=5

Ends with one JSON line; exit code 0 only when it says "ok": true.
"""

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from launch import program

_COUNT = flags.DEFINE_integer(
  'count', 200, 'corrupt: accidents to checkpoints; inputs: how many, and at least one of each kind', lower_bound=1
)
_KILLS = flags.DEFINE_integer('kills', 20, 'kill: how often the run is killed', lower_bound=1)
_CONFIG = program.define_config()  # kill: another run than the small one
_ONLY = flags.DEFINE_integer('only', None, 'inputs: of the same --count and --seed, only this one, and what it prints')
_MINUTES = flags.DEFINE_float('minutes', 5.0, 'serve: how long clients trouble the server', 0.1)
_SEED = flags.DEFINE_integer('seed', 0, 'another seed, other accidents')


def main(verb: str) -> int:
  with tempfile.TemporaryDirectory(prefix='chaos') as folder:
    result = _VERBS[verb](Path(folder))
  print(json.dumps(result))
  return 0 if result['ok'] else program.BUG


def _corrupt(folder: Path) -> dict[str, Any]:
  from latent_loop.chaos import corrupt

  return corrupt.corrupt(_COUNT.value, _SEED.value, folder, print)


def _kill(folder: Path) -> dict[str, Any]:
  from latent_loop.chaos import kill

  config = program.sealed(_CONFIG) if _CONFIG.value is not None else None
  return kill.kill(_KILLS.value, _SEED.value, folder, print, config)


_QUICK_COMPILES = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'


def _inputs(folder: Path) -> dict[str, Any]:
  os.environ.update(
    {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {_QUICK_COMPILES}'.strip(),
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'programs'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'GLIBC_TUNABLES': 'glibc.malloc.trim_threshold=131072',  # the default; launch.bench does not start itself anew
    }
  )
  from latent_loop.chaos import inputs

  return inputs.inputs(_COUNT.value, _SEED.value, folder, functools.partial(print, flush=True), _ONLY.value)


def _serve(folder: Path) -> dict[str, Any]:
  os.environ['JAX_PLATFORMS'] = 'cpu'  # an accelerator would not serve this process and the server's
  from latent_loop import optional

  for package in ('starlette', 'uvicorn'):
    optional.load(package, 'server', 'launch.chaos serve')
  from latent_loop.chaos import serve

  return serve.serve(_MINUTES.value, _SEED.value, folder, functools.partial(print, flush=True))


_VERBS = {'corrupt': _corrupt, 'inputs': _inputs, 'kill': _kill, 'serve': _serve}


if __name__ == '__main__':
  program.run(main, verbs=tuple(_VERBS))
