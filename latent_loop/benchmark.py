"""How fast the step of launch.train and the decoder of launch.generate run here, as dicts for JSON lines.

Seconds are wall time around work that has been waited for. FLOPs are model FLOPs (model/cost.py): what
rematerialization computes again does not count.
"""

import dataclasses
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from latent_loop.batch import Batch
from latent_loop.config import Config
from latent_loop.errors import BadInput
from latent_loop.inference.engine import Engine, Request
from latent_loop.kernels.choice import choose_attention
from latent_loop.model import Params, build, cost
from latent_loop.optim import make_optimizer
from latent_loop.parallel import chips, sharding
from latent_loop.parallel import mesh as meshes
from latent_loop.step import make_sharded_state, make_train_step, rows_of
from latent_loop.twin import Twin

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Effort:
  """Each depth is timed `rounds` times, each time over `repeats` calls; a twin runs ahead of every round of ours."""

  rounds: int
  repeats: int
  twin: Twin | None = None

  def __post_init__(self):
    for name in ('rounds', 'repeats'):
      if vars(self)[name] < 1:
        raise BadInput(f'--{name}={vars(self)[name]} is below 1; give a positive number')


@dataclasses.dataclass(frozen=True)
class Point:
  """One depth of one program: `call` runs it once, yields `tokens` and computes `flops`; `build` is of its making."""

  mode: str
  depth: dict[str, int]
  call: Callable[[], Any]
  tokens: int
  flops: float
  build: Line
  twin_flags: tuple[str, ...]


class Compiles:
  """Counts what XLA compiles while it is entered, and for how long."""

  def __init__(self):
    self.count, self.seconds = 0, 0.0

  def __enter__(self) -> 'Compiles':
    jax.monitoring.register_event_duration_secs_listener(self._hear)
    return self

  def _hear(self, event: str, seconds: float, **_: Any) -> None:
    if event == '/jax/core/compile/backend_compile_duration':
      self.count, self.seconds = self.count + 1, self.seconds + seconds

  def __exit__(self, *exception: object) -> None:
    jax.monitoring.unregister_event_duration_listener(self._hear)


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
  """Seconds of each of `repeats` calls; waits for each."""
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - start)
  return seconds


def machine(config: Config) -> Line:
  """What everything runs on, and the best matrix product that one device reaches in the compute dtype."""
  kind, peak = jax.devices()[0].device_kind, chips.peak_flops(jax.devices())
  return {
    'mode': 'machine',
    'config': config.name,
    'device': kind,
    'devices': jax.device_count(),
    'compute_dtype': config.model.compute_dtype,
    'matmul_flops_per_second': best_matmul(config.model.compute_dtype),
    'nominal_flops_per_second': peak / jax.device_count() if peak else None,
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax')},
  }


def best_matmul(dtype: str) -> float:
  """FLOP/s of the fastest square matrix product on one device, over a few sizes; of random numbers.

  Constant ones draw less power, and a GPU multiplies them faster than any it will meet.
  """
  sizes = (512, 1024, 2048) if jax.default_backend() == 'cpu' else (4096, 8192, 16384)
  speeds = []
  for size in sizes:
    count = max(sizes) // size  # in a row, so that small products are not all dispatch
    product = jax.jit(lambda x, w, count=count: jax.lax.fori_loop(0, count, lambda _, x: x @ w, x))
    x, w = (jax.random.normal(jax.random.key(i), (size, size), dtype) / size**0.5 for i in range(2))
    timed(lambda: product(x, w), 1)  # noqa: B023 (called at once)
    speeds.append(2 * count * size**3 / min(timed(lambda: product(x, w), 5)))  # noqa: B023
  return max(speeds)


def measure(point: Point, effort: Effort, config: Config, speeds: Line) -> Iterator[Line]:
  """The twin's line, where there is one, then ours; both from the same minutes."""
  ours, theirs = [], []
  for _ in range(effort.rounds):
    if effort.twin:
      on_gpu = jax.default_backend() == 'gpu'
      twin_line = effort.twin.measure(config, point.mode, point.depth, on_gpu, point.twin_flags)
      theirs.append(twin_line['tokens_per_second'])
    timed(point.call, 1)  # the caches are the other program's
    ours += timed(point.call, effort.repeats)
  line = _line_of(point, ours, speeds)
  if theirs:
    speed = statistics.median(theirs)
    yield {'twin': 'torch', 'mode': point.mode, **point.depth, 'tokens_per_second': speed,
           'seconds_median': point.tokens / speed, 'rounds': theirs}  # fmt: skip
    line['ratio'] = line['tokens_per_second'] / speed
  yield line


def _line_of(point: Point, seconds: list[float], speeds: Line) -> Line:
  median = statistics.median(seconds)
  per_device, nominal = point.flops / median / speeds['devices'], speeds['nominal_flops_per_second']
  memory = jax.devices()[0].memory_stats() or {}  # of accelerators only
  low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
  return {
    'mode': point.mode,
    **point.depth,
    'tokens_per_second': point.tokens / median,
    'seconds_median': median,
    'spread': (high - low) / median,  # distance of the quartiles
    'calls': len(seconds),
    'flops_per_second': point.flops / median,
    'fraction_of_matmul': per_device / speeds['matmul_flops_per_second'],
    'fraction_of_nominal': per_device / nominal if nominal else None,
    **point.build,
    'device_peak_bytes': memory.get('peak_bytes_in_use'),
  }


def _memory_of(compiled: Any) -> Line:
  stats = compiled.memory_analysis()
  sizes = stats.argument_size_in_bytes, stats.temp_size_in_bytes
  return {'argument_bytes': sizes[0], 'temporary_bytes': sizes[1], 'memory_bytes': sum(sizes)}


# --- training -----------------------------------------------------------------------------------------


def train(config: Config, depths: list[tuple[int, int]], effort: Effort) -> Iterator[Line]:
  """Lines of the training step at each (n, k), then how its time grows with n; raises BadInput."""
  mesh = meshes.make_mesh(config.mesh)
  meshes.check_batch(config.train.batch_size, config.train.num_microbatches, mesh.shape)
  choose_attention(config.model, config.data.seq_len, jax.default_backend())  # or a sentence why not
  yield (speeds := machine(config))
  medians, state = {}, None
  for n, k in depths:
    point, state = train_point(at_depth(config, n, k), mesh, state)
    for line in measure(point, effort, config, speeds):
      yield line
    medians[n, k] = line['seconds_median']
  for k in sorted({k for _, k in medians}):
    by_n = {n: seconds for (n, its_k), seconds in medians.items() if its_k == k}
    if len(by_n) > 1:
      yield fit(k, by_n, core_seconds(config, mesh, state[0].params, effort))


def at_depth(config: Config, n: int, k: int) -> Config:
  """`config` with a law that always draws (n, k)."""
  law = dataclasses.replace(
    config.depth, kind='fixed', mean=n + k, backprop_depth=k, curriculum='none', curriculum_steps=0
  )
  return dataclasses.replace(config, depth=law)


def random_batch(config: Config) -> Batch:
  """Random tokens, every row one document."""
  B, T = config.train.batch_size, config.data.seq_len
  stream = np.random.default_rng(config.seed).integers(0, config.model.vocab_size, (B, T + 1), dtype=np.int32)
  return Batch(
    tokens_BT=stream[:, :-1],
    targets_BT=stream[:, 1:],
    weights_BT=np.ones((B, T), np.float32),
    positions_BT=np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    segment_ids_BT=np.ones((B, T), np.int32),
  )


def train_point(config: Config, mesh: Mesh, state: list | None) -> tuple[Point, list]:
  """The step of launch.train at the fixed depth of `config`. state: [train state], which every call replaces."""
  model, optimizer = build(config.model, config.depth), make_optimizer(config.optim, config.train.num_steps)
  init, specs = make_sharded_state(config, model, optimizer, mesh)
  state = state or [init()]
  batch = jax.device_put(random_batch(config), NamedSharding(mesh, sharding.BATCH))
  step, key = make_train_step(config, model, optimizer, mesh, specs), jax.random.key(config.seed)

  def call():
    state[0], metrics = step(state[0], batch, key)
    return metrics

  with Compiles() as compiles:
    metrics = jax.device_get(call())
  n, k = (int(metrics[name]) for name in 'nk')
  memory = _memory_of(step.lower(state[0], batch, key).compile())  # found in the cache
  tokens = batch.tokens_BT.size
  made = {**memory, 'compile_seconds': compiles.seconds, 'compile_count': compiles.count, 'remat': config.model.remat}
  flops = tokens * cost.count(model, config.data.seq_len).train(n, k)
  twin_flags = ('--batch', str(config.train.batch_size), '--seq', str(config.data.seq_len))
  return Point('train', {'n': n, 'k': k}, call, tokens, flops, made, twin_flags), state


def core_seconds(config: Config, mesh: Mesh, params: Params, effort: Effort) -> float:
  """Median seconds of one application of the core, forward only, in a program of its own."""
  model = build(config.model, config.depth)
  batch = jax.device_put(random_batch(config), NamedSharding(mesh, sharding.BATCH))
  with jax.set_mesh(mesh):
    params = jax.jit(model.cast)(params)
    rows = jax.jit(lambda batch: rows_of(batch, config.data.one_document).ready(config.model))(batch)
    e_BTD, core = jax.jit(model.embed_input)(params, batch.tokens_BT, rows), jax.jit(model.iterate)
    drive = jax.jit(model.drive)(params, e_BTD)
    seconds = timed(lambda: core(params, e_BTD, drive, rows), effort.rounds * effort.repeats + 1)
  return statistics.median(seconds[1:])


def fit(k: int, seconds_by_n: dict[int, float], core: float) -> Line:
  """seconds = a + b n, and b, what one more iteration without gradient costs, against the core alone."""
  b, a = np.polyfit(list(seconds_by_n), list(seconds_by_n.values()), 1)
  return {'mode': 'fit', 'k': k, 'a_seconds': a, 'b_seconds': b, 'core_seconds': core, 'b_over_core': b / core}


# --- decoding -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompts:
  """What is decoded: rows of random prompts."""

  prompt_tokens: int
  new_tokens: int
  batch_size: int

  def __post_init__(self):
    for name, value in vars(self).items():
      if value < 1:
        raise BadInput(f'--{name}={value} is below 1; give a positive number')


def decode(config: Config, depths: list[int], prompts: Prompts, effort: Effort) -> Iterator[Line]:
  """Lines of the engine of launch.generate at each depth, from fresh parameters; raises BadInput."""
  choose_attention(config.model, config.data.seq_len, jax.default_backend())  # or a sentence why not
  yield (speeds := machine(config))
  model, mesh = build(config.model, config.depth), meshes.make_mesh(config.mesh)
  engine = Engine(model, jax.jit(model.init)(jax.random.key(config.seed)), mesh)
  for depth in depths:
    yield from measure(decode_point(config, engine, depth, prompts, effort), effort, config, speeds)


def decode_point(config: Config, engine: Engine, depth: int, prompts: Prompts, effort: Effort) -> Point:
  """Greedy, no token ends a row; the whole call counts, prefill included."""
  B, P, new = prompts.batch_size, prompts.prompt_tokens, prompts.new_tokens
  tokens_BP = np.random.default_rng(config.seed).integers(0, config.model.vocab_size, (B, P)).tolist()
  requests = [Request(tuple(tokens), depth, max_new_tokens=new) for tokens in tokens_BP]
  first = [dataclasses.replace(request, max_new_tokens=1) for request in requests]
  with Compiles() as compiles:
    engine.answer(requests)
  engine.answer(first)
  counted = cost.count(engine.model, P + new)
  # The last token is chosen but not read; the logits are of one place per token.
  flops = B * ((P + new - 1) * (counted.forward(depth) - counted.head) + new * counted.head)
  made = {'cache': engine.cache, 'cache_bytes': engine.bytes_of(requests),
          'first_token_seconds': statistics.median(timed(lambda: engine.answer(first), effort.repeats)),
          'compile_seconds': compiles.seconds, 'compile_count': compiles.count}  # fmt: skip
  sizes = {'batch': B, 'prompt': P, 'new': new}
  twin_flags = tuple(part for name, size in sizes.items() for part in (f'--{name}', str(size)))
  return Point('decode', {'depth': depth}, lambda: engine.answer(requests), B * new, flops, made, twin_flags)
