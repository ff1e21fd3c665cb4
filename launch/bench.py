"""Times training or decoding: python -m launch.bench train --config=experiments/bench_w256.py --depths=0,4 --depths=8,4

python -m launch.bench decode --config=experiments/bench_w256.py --depths=4 --prompt_tokens=32 --new_tokens=64

python -m launch.bench exits --workdir=runs/tiny_text --exit=latent-diff:0.1 --cache=ring:1 --batch_size=16

python -m launch.bench ahead --workdir=runs/tiny_text --depths=32 --speculate=4:8 --parallel=8 --batch_size=8

python -m launch.bench depth --config=experiments/tiny_text.py --depths=0,1 --depths=8,1 --depths=0,4 --depths=8,4

python -m launch.bench trust --config=experiments/tiny_text.py --depths=4,4

python -m launch.bench data --config=experiments/small_text.py --read_millis=30

python -m launch.bench prepare --megabytes=10 --megabytes=1000 --processes=2

One JSON line per depth; for exits and ahead, one per way to answer the same requests. With --twin and --twin_python,
the PyTorch twin runs ahead of every round, in the same run. One thread for both: --threads=1, or NPROC=1 in the
environment, or `taskset -c 1` ahead of the command, which also keeps both on one core.
XLA_FLAGS=--xla_cpu_multi_thread_eigen=false no longer binds JAX by itself; here it is taken as --threads=1.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

from absl import flags

from launch import program, xla_flags

_CONFIG = program.define_config()
_WORKDIR = flags.DEFINE_string('workdir', None, 'exits, ahead: folder of a training run')
_EXIT = flags.DEFINE_string(
  'exit', 'latent-diff', 'exits: KIND[:THRESHOLD[:MIN_DEPTH[:EVERY]]], as for launch.generate'
)
_CACHE = flags.DEFINE_string('cache', 'ring:1', 'exits: as for launch.generate')
_WINDOW = flags.DEFINE_integer('window', 4, 'exits: rows that start their next token together')
_DEPTHS = flags.DEFINE_multi_string(
  'depths', None, 'train, depth, trust: n,k (without, with gradient); others: depth; repeat'
)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'times that each depth is measured, alternating with the twin')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'timed calls in each round')
_THREADS = flags.DEFINE_integer('threads', None, 'CPU threads of both programs; default: the cores they may use')
_PROMPT_TOKENS = flags.DEFINE_integer('prompt_tokens', 32, 'decode: length of each prompt')
_NEW_TOKENS = flags.DEFINE_integer('new_tokens', 64, 'decode: tokens to add to each row')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 4, 'decode: rows')
_SPECULATE = flags.DEFINE_multi_string('speculate', [], 'ahead: DRAFT:LOOKAHEAD, as for launch.generate; repeat')
_PARALLEL = flags.DEFINE_multi_integer('parallel', [], 'ahead: positions of a front that thinks together; repeat')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, 'ahead: 0 = greedy')
_READ_MILLIS = flags.DEFINE_multi_float(
  'read_millis', [], 'data: also with so many ms for each read, as an object store; repeat'
)
_MEGABYTES = flags.DEFINE_multi_integer('megabytes', [10, 100], 'prepare: amounts of text; repeat', lower_bound=1)
_TOKENIZER = flags.DEFINE_string('tokenizer', 'bytes', 'prepare: bytes, or the path of a tokenizer.json')
_PROCESSES = flags.DEFINE_integer('processes', 1, 'prepare: how many work at once', lower_bound=1)
_TWIN = flags.DEFINE_string('twin', None, 'path of torch_twin.py, to be timed in the same run')
_TWIN_PYTHON = flags.DEFINE_string('twin_python', None, 'the Python, with torch, that runs the twin')

_DEFAULT_DEPTHS = {'train': ('0,4', '8,4', '28,4'), 'decode': ('4', '8', '32')}


def main(verb: str) -> int:
  if verb not in _DEFAULT_DEPTHS:
    return {
      'exits': _exits,
      'ahead': _ahead,
      'depth': _depth,
      'trust': _trust,
      'data': _data,
      'prepare': _prepare,
    }[verb]()
  config = program.sealed(_CONFIG)
  depths = depths_of(verb, _DEPTHS.value or _DEFAULT_DEPTHS[verb])
  threads = xla_flags.use_threads(_THREADS.value)
  xla_flags.keep_memory()
  twin = make_twin(threads)
  from latent_loop import benchmark  # only now: a wrong flag is refused before JAX starts

  effort = benchmark.Effort(_ROUNDS.value, _REPEATS.value, twin)
  if verb == 'train':
    lines = benchmark.train(config, depths, effort)
  else:
    prompts = benchmark.Prompts(_PROMPT_TOKENS.value, _NEW_TOKENS.value, _BATCH_SIZE.value)
    lines = benchmark.decode(config, depths, prompts, effort)
  return _show(lines)


def _exits() -> int:
  from latent_loop.errors import BadInput

  model, depths, prompts, effort = _trained()
  from latent_loop import benchmark_ways
  from latent_loop.inference.engine import ExitRule

  if len(depths) > 1 or _WINDOW.value < 1:
    raise BadInput(f'--depths={depths} --window={_WINDOW.value}: give one depth, and a window from 1')
  rule = ExitRule.parse(_EXIT.value)
  return _show(benchmark_ways.exits(model, rule, depths[0], _CACHE.value, _WINDOW.value, prompts, effort))


def _ahead() -> int:
  model, depths, prompts, effort = _trained()
  from latent_loop import benchmark_ways
  from latent_loop.inference.speculate import Draft
  from latent_loop.inference.wavefront import Wavefront

  drafts = [Draft.parse(text) for text in _SPECULATE.value]
  fronts = [Wavefront(width) for width in _PARALLEL.value]
  for depth in depths:
    _show(benchmark_ways.ahead(model, depth, drafts, fronts, _TEMPERATURE.value, prompts, effort))
  return 0


def _trained():
  """(the model of --workdir, --depths or its mean depth, what is asked of it, how often it is timed)."""
  workdir, depths = program.workdir_of(_WORKDIR.value), depths_of('decode', _DEPTHS.value or [])
  xla_flags.use_threads(_THREADS.value)
  xla_flags.keep_memory()
  from latent_loop import benchmark, trained

  model = trained.load(workdir)
  prompts = benchmark.Prompts(_PROMPT_TOKENS.value, _NEW_TOKENS.value, _BATCH_SIZE.value)
  return model, depths or [model.config.depth.mean], prompts, benchmark.Effort(_ROUNDS.value, _REPEATS.value)


def _depth() -> int:
  config = program.sealed(_CONFIG)
  depths = depths_of('train', _DEPTHS.value or _DEFAULT_DEPTHS['train'])
  xla_flags.use_threads(_THREADS.value)
  xla_flags.use_devices(8)
  xla_flags.keep_memory()
  from latent_loop import benchmark, benchmark_depth

  effort = benchmark.Effort(_ROUNDS.value, _REPEATS.value)
  return _show(benchmark_depth.depth_cost(config, depths, effort))


def _trust() -> int:
  config = program.sealed(_CONFIG)
  k = config.depth.backprop_depth
  depths = depths_of('train', _DEPTHS.value or [f'{config.depth.mean - k},{k}'])
  xla_flags.use_threads(_THREADS.value)
  xla_flags.keep_memory()
  from latent_loop import benchmark, benchmark_trust

  effort = benchmark.Effort(_ROUNDS.value, _REPEATS.value)
  for depth in depths:
    with tempfile.TemporaryDirectory() as folder:
      _show(benchmark_trust.trust(config, depth, Path(folder), effort))
  return 0


def _data() -> int:
  config = program.sealed(_CONFIG)
  xla_flags.use_threads(_THREADS.value)
  xla_flags.keep_memory()
  from latent_loop import benchmark, benchmark_data

  return _show(benchmark_data.batches(config, _READ_MILLIS.value, benchmark.Effort(_ROUNDS.value, _REPEATS.value)))


def _prepare() -> int:
  os.environ['JAX_PLATFORMS'] = 'cpu'
  from latent_loop import benchmark_data

  say = lambda line: print(line, file=sys.stderr, flush=True)
  return _show(benchmark_data.prepare(_MEGABYTES.value, _TOKENIZER.value, _PROCESSES.value, say))


def _show(lines) -> int:
  for line in lines:
    print(json.dumps({name: rounded(value) for name, value in line.items()}), flush=True)
  return 0


def depths_of(verb: str, given: list[str]) -> list:
  """--depths as pairs (n, k) to train and numbers to decode; raises BadInput."""
  from latent_loop.errors import BadInput

  rule = 'n,k such as 8,4, with n from 0 and k from 1' if verb == 'train' else 'a depth from 1, such as 8'
  depths = []
  for text in given:
    numbers = [int(part) if re.fullmatch('[0-9]{1,9}', part) else -1 for part in text.split(',')]
    if len(numbers) != (2 if verb == 'train' else 1) or min(numbers) < 0 or numbers[-1] < 1:
      raise BadInput(f'--depths={text}: not a depth to {verb}; the rule is {rule}')
    depths.append(tuple(numbers) if verb == 'train' else numbers[0])
  return depths


def make_twin(threads: int):
  """The Twin of --twin, None without; raises BadInput."""
  from latent_loop.errors import BadInput
  from latent_loop.twin import Twin

  if _TWIN.value is None:
    if _TWIN_PYTHON.value is not None:
      raise BadInput(f'--twin_python={_TWIN_PYTHON.value} without --twin; give the path of torch_twin.py too')
    return None
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # a GPU's memory is shared with the twin
  python = program.path_of('--twin_python', _TWIN_PYTHON.value or sys.executable)
  return Twin(program.path_of('--twin', _TWIN.value), python, threads, _REPEATS.value)


def rounded(value):
  return float(f'{value:.6g}') if isinstance(value, float) else value


if __name__ == '__main__':
  program.run(main, verbs=('train', 'decode', 'exits', 'ahead', 'depth', 'trust', 'data', 'prepare'))
