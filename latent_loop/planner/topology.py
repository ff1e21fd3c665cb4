"""Hardware by name: 'v5p:4x4x4' as devices to compile for, 'h200:64' as numbers, 'cpu:8' as this machine."""

import dataclasses
import importlib.util
import math
import re

import jax
from jax.experimental import topologies

from latent_loop.errors import BadInput
from latent_loop.parallel.chips import CHIPS, Chip, count_chips
from latent_loop.planner import gpus

_LAPTOP = Chip('cpu', ('cpu',), 1e11, 16 * 2**30, 2e10, 1e10)  # orders of magnitude, for tests


@dataclasses.dataclass(frozen=True)
class Topology:
  """devices: to compile for; empty where no compiler for them is here, and only counting is possible.

  memory_share: the part of a device's memory that JAX gives a process.
  """

  name: str
  chip: Chip
  devices: list
  num_devices: int
  num_chips: int
  memory_share: float = 1.0

  @property
  def chips_per_device(self) -> float:
    return self.num_chips / self.num_devices


def find(name: str, slices: int) -> Topology:
  """The topology `name`, `slices` times. Raises BadInput for an unknown one, or where libtpu is absent."""
  known = {chip.name: chip for chip in (*CHIPS, _LAPTOP)}
  kind, _, size = name.partition(':')
  shaped = re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', size)
  if kind not in known or not shaped:
    raise BadInput(
      f'--topology={name}: unknown; write a chip ({", ".join(known)}) and a shape or a number from 1, as v5p:4x4x4'
    )
  if slices < 1:
    raise BadInput(f'--slices={slices}: a plan needs at least one slice; give a number from 1')
  chip, total = known[kind], math.prod(map(int, size.split('x'))) * slices
  if kind == 'cpu':
    if total > len(jax.devices()):
      raise BadInput(
        f'--topology={name}: {total} devices, and this machine shows {len(jax.devices())} CPU device(s); ask for no '
        f'more, or set XLA_FLAGS=--xla_force_host_platform_device_count={total}'
      )
    return Topology(name, chip, jax.devices()[:total], total, total)
  if not chip.kinds[0].startswith('TPU'):
    count = total * chip.devices
    return Topology(name, chip, gpus.devices(chip, count), count, total, gpus.memory_share())
  devices = _tpu_devices(name, slices)
  return Topology(name, chip, devices, len(devices), count_chips(devices))


def _tpu_devices(name: str, slices: int) -> list:
  if importlib.util.find_spec('libtpu') is None:
    raise BadInput(
      f'--topology={name}: the TPU compiler, libtpu, is not installed here; pip install -r launch/requirements/tpu.txt'
    )
  options = {'num_slices': slices} if slices > 1 else {}
  try:
    return list(topologies.get_topology_desc(name, 'tpu', **options).devices)
  except jax.errors.JaxRuntimeError as error:  # how libtpu refuses a shape that no pod has
    text = ' '.join(str(error).split())
    raise BadInput(
      f'--topology={name}: libtpu knows no such topology ({text[:200]}); try v5e:4x4 or v5p:4x4x4'
    ) from error
