"""The PyTorch twin of the model: a program of its own, started anew for each measurement, with its own Python."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

from latent_loop.config import Config
from latent_loop.errors import BadInput

# What the twin computes, beside the sizes that it is told; anything else would not be the same work.
_COMPUTES = {
  'block': 'sandwich',
  'mlp': 'gated_silu',
  'injection': 'linear',
  'core_exit': 'final_norm',
  'qk_bias': True,
  'qk_norm': False,
  'prelude_norm': False,
}


@dataclasses.dataclass(frozen=True)
class Twin:
  """How to start it. threads: of its CPU work; repeats: timed calls each time."""

  path: Path
  python: Path
  threads: int
  repeats: int

  def __post_init__(self):
    for flag, path in (('twin', self.path), ('twin_python', self.python)):
      if not path.is_file():
        raise BadInput(f'--{flag}={path}: no such file; give the path of {_WHAT[flag]}')

  def measure(self, config: Config, mode: str, depth: dict[str, int], on_gpu: bool, extra: tuple) -> dict[str, Any]:
    """The line that the twin prints for one depth; raises BadInput when it cannot run. extra: flags of the mode."""
    model = config.model
    for name, only in _COMPUTES.items():
      if vars(model)[name] != only:
        raise BadInput(f'config.model.{name}={vars(model)[name]!r}: the twin has {only!r} only; leave out --twin')
    sizes = {
      'width': model.width, 'heads': model.num_heads, 'mlp': model.mlp_dim, 'vocab': model.vocab_size,
      'threads': self.threads, 'repeats': self.repeats,
      'dtype': 'bf16' if model.compute_dtype == 'bfloat16' else 'f32', 'device': 'cuda' if on_gpu else 'cpu',
    }  # fmt: skip
    layers = (model.num_prelude_layers, model.num_core_layers, model.num_coda_layers)
    command = [str(self.python), str(self.path), mode, '--depths', ','.join(map(str, depth.values()))]
    command += ['--layers', *map(str, layers)]
    command += [part for name, value in sizes.items() for part in (f'--{name}', str(value))]
    command += [*extra, *(['--compile'] if on_gpu else [])]
    return _line_of(command)


_WHAT = {'twin': 'torch_twin.py', 'twin_python': 'a Python that has torch'}


def _line_of(command: list[str]) -> dict[str, Any]:
  """The JSON line that `command` prints; raises BadInput when it prints none."""
  done = subprocess.run(command, capture_output=True, text=True)
  try:
    if done.returncode == 0:
      return json.loads(done.stdout.splitlines()[-1])
    why = (done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]
  except (ValueError, IndexError):
    why = f'it printed {done.stdout[-80:]!r}, no JSON line'
  raise BadInput(f'--twin={command[1]} does not run with --twin_python={command[0]} ({why}); correct one of them')
