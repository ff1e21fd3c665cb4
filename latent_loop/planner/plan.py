"""The train step of launch.train, compiled for hardware that is not here, and what that tells."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from latent_loop.batch import Batch
from latent_loop.config import Config, MeshConfig
from latent_loop.model import build, cost
from latent_loop.model.depth_loop import LOOP_SCOPE
from latent_loop.optim import make_optimizer
from latent_loop.parallel import mesh as meshes
from latent_loop.parallel import sharding
from latent_loop.parallel.sharding import ROW_AXES
from latent_loop.planner import gpus, hlo, topology
from latent_loop.planner.roofline import Roofline
from latent_loop.step import make_sharded_state, make_train_step

_TOKENS = 4096  # tokens per device and microbatch that keep matrix units busy
# The TPU compiler's search for speed off: a quarter of the compile time, the same collectives, memory within 1 %
# (experiments/LOG.md).
_QUICK = {'exec_time_optimization_effort': -1.0}
_OPTIONS = {'tpu': _QUICK, 'gpu': gpus.OPTIONS, 'cpu': None}
_SMALL = 1024  # bytes; below it a collective carries numbers, not weights
# From fewest bytes sent to most, which is nearly always from most memory to least.
MODES = get_args(MeshConfig.__annotations__['weights'])


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per device. `needed` is what the compiler said it wanted when the program did not fit."""

  arguments: int
  temporaries: int
  program: int
  needed: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """A config on a topology. `memory`, `collectives`, `compile_seconds` and `hlo_text` are None without a compiler."""

  config: Config
  topology: topology.Topology
  mesh: dict[str, int]
  cost: cost.Cost
  memory: Memory | None
  collectives: list[hlo.Collective] | None
  compile_seconds: float | None
  hlo_text: str | None

  @property
  def capacity(self) -> int:
    """Bytes of a device that a process may use."""
    its = self.topology
    return int(its.chip.hbm_bytes * its.chips_per_device * its.memory_share)

  @property
  def fits(self) -> bool | None:
    """None: not known. What the compiler refused does not fit, whatever it said that it needs."""
    return None if self.memory is None else self.hlo_text is not None and self.memory.needed <= self.capacity

  def roofline(self) -> Roofline:
    return Roofline(self.config, self.cost, self.topology, self.collectives or [], self.config.train.num_microbatches)

  def weight_collectives(self, in_loops: bool) -> list[hlo.Collective]:
    """Collectives over the axes that split rows; what those carry is weights and their gradients."""
    over_rows = [c for c in self.collectives or [] if set(c.axes) & set(ROW_AXES) and c.size_bytes >= _SMALL]
    return [c for c in over_rows if c.inside(LOOP_SCOPE) == in_loops]

  def activation_collectives(self) -> list[hlo.Collective]:
    """Collectives over the tensor axis inside the loops over depth: they stay, whatever the mode."""
    return [c for c in self.collectives or [] if c.axes == ('tensor',) and c.inside(LOOP_SCOPE)]


def plan(config: Config, name: str, slices: int, global_batch: int | None, say: Callable[[str], None]) -> Plan:
  """The plan of `config` on topology `name`, in the first mode that fits, from config.mesh.weights on; where none does,
  in the one that needs least.

  Raises BadInput for a topology, mesh or batch that cannot be.
  """
  found = topology.find(name, slices)
  config = _fitted(config, found, slices, global_batch)
  too_large = []
  for mode in MODES[MODES.index(config.mesh.weights) :]:
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, weights=mode))
    what = 'compiling the train step' if found.devices else 'counting the train step, which nothing here compiles,'
    say(f'{what} for {found.name}, {mode} ...')
    made = _compile(config, found)
    if made.fits is not False:
      return made
    say(f'{mode} needs {made.memory.needed / 2**30:.1f} GiB of {made.capacity / 2**30:.1f} GiB per device')
    too_large.append(made)
  return min(too_large, key=lambda made: made.memory.needed)


def _fitted(config: Config, found: topology.Topology, slices: int, global_batch: int | None) -> Config:
  """The config with slices, global batch and, where it asks for none, microbatches filled in."""
  mesh = dataclasses.replace(config.mesh, dcn=slices)
  train = config.train if global_batch is None else dataclasses.replace(config.train, batch_size=global_batch)
  sizes = meshes.resolve(mesh, found.num_devices)
  mesh = dataclasses.replace(mesh, data=sizes['data'], fsdp=sizes['fsdp'], tensor=sizes['tensor'])
  if train.num_microbatches == 1:
    rows = max(train.batch_size // math.prod(sizes[axis] for axis in ROW_AXES), 1)
    wanted = max(_TOKENS // config.data.seq_len, 1)
    together = max(size for size in range(1, min(rows, wanted) + 1) if rows % size == 0)
    train = dataclasses.replace(train, num_microbatches=rows // together)
  config = dataclasses.replace(config, mesh=mesh, train=train)
  meshes.check_batch(train.batch_size, train.num_microbatches, sizes)
  return config


def _compile(config: Config, found: topology.Topology) -> Plan:
  model = build(config.model, config.depth)
  counted = cost.count(model, config.data.seq_len)
  sizes = meshes.resolve(config.mesh, found.num_devices)
  if not found.devices:
    return Plan(config, found, sizes, counted, None, None, None, None)
  mesh = meshes.make_mesh(config.mesh, found.devices)
  lowered = _lower(config, model, mesh)
  begin = time.perf_counter()
  try:
    compiled = lowered.compile(compiler_options=_OPTIONS[mesh.devices.flat[0].platform])
  except jax.errors.JaxRuntimeError as error:
    memory = _out_of_memory(error)
    return Plan(config, found, sizes, counted, memory, None, time.perf_counter() - begin, None)
  seconds, text = time.perf_counter() - begin, compiled.as_text()
  stats = compiled.memory_analysis()
  own = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
  code, temporary = stats.generated_code_size_in_bytes, stats.temp_size_in_bytes
  memory = Memory(stats.argument_size_in_bytes, temporary, code, own + temporary + code)
  return Plan(config, found, sizes, counted, memory, hlo.collectives(text, mesh), seconds, text)


def _lower(config: Config, model: Any, mesh: Mesh) -> Any:
  """The very step of launch.train, with shapes in place of arrays."""
  optimizer = make_optimizer(config.optim, config.train.num_steps)
  init, specs = make_sharded_state(config, model, optimizer, mesh)
  placed = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  state = jax.tree.map(placed, jax.eval_shape(init), specs)
  rows = NamedSharding(mesh, sharding.BATCH)
  array = lambda dtype: jax.ShapeDtypeStruct(
    (config.train.batch_size, config.data.seq_len), np.dtype(dtype), sharding=rows
  )
  batch = Batch(
    tokens_BT=array('int32'),
    targets_BT=array('int32'),
    weights_BT=array('float32'),
    positions_BT=array('int32'),
    segment_ids_BT=array('int32'),
  )
  step = make_train_step(config, model, optimizer, mesh, specs)
  return step.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0)))


def _out_of_memory(error: jax.errors.JaxRuntimeError) -> Memory:
  """What the compiler said it needed: the total, or else the first size it names, which for a TPU leaves out what is
  reserved. Any other of its errors is not ours to explain."""
  text = str(error)
  size = r'([\d.]+)([KMGT])'
  said = re.search(f'Total hbm usage >= {size}', text) or re.search(size, text.partition('emory')[2])
  if 'RESOURCE_EXHAUSTED' not in text or not said:
    raise error
  scale = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  return Memory(0, 0, 0, int(float(said[1]) * scale[said[2]]))


def summary(made: Plan) -> dict[str, Any]:
  """The numbers under the names of the outer contract (WORKSPACE.md)."""
  config, memory = made.config, made.memory
  times = made.roofline().over_law()
  seconds = float(np.mean([t.seconds for t in times]))
  tokens = config.train.batch_size * config.data.seq_len
  flops = float(np.mean([t.model_flops_per_device for t in times]))
  mean_n = round(float(np.mean([t.n for t in times])))
  counted = made.collectives is not None
  return {
    'config': config.name,
    'topology': made.topology.name,
    'parameters': made.cost.total_parameters,
    'fits': made.fits,
    'weights': config.mesh.weights,
    'hbm_bytes_per_device': memory and memory.needed,
    'hbm_argument_bytes': memory and memory.arguments,
    'hbm_temporary_bytes': memory and memory.temporaries,
    'hbm_capacity_bytes': made.capacity,
    'devices': made.topology.num_devices,
    'chips': made.topology.num_chips,
    'mesh': made.mesh,
    'global_batch': config.train.batch_size,
    'microbatches': config.train.num_microbatches,
    'weight_collectives_in_depth_loops': len(made.weight_collectives(True)) if counted else None,
    'weight_collectives_elsewhere': len(made.weight_collectives(False)) if counted else None,
    'activation_collectives_in_depth_loops': len(made.activation_collectives()) if counted else None,
    'mean_n': mean_n,
    'collective_bytes_per_step': sum(c.bytes_per_step(mean_n) for c in made.collectives) if counted else None,
    'compile_seconds': made.compile_seconds and round(made.compile_seconds, 1),
    'step_seconds': seconds,
    'mfu_ceiling': flops / seconds / times[0].peak,
    'tokens_per_second': tokens / seconds,
    'tokens': tokens * config.train.num_steps,
    'days': seconds * config.train.num_steps / 86400,
    'chip_hours': seconds * config.train.num_steps / 3600 * made.topology.num_chips,
  }
