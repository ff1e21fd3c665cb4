"""What depth costs here, in seconds, memory and bytes between devices, beside what the planner's counting predicts."""

import ctypes
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from latent_loop.benchmark import Effort, Line, at_depth, machine, measure, timed, train_point
from latent_loop.config import Config, DepthConfig
from latent_loop.errors import BadInput
from latent_loop.model import build, cost
from latent_loop.parallel import mesh as meshes
from latent_loop.parallel.chips import Chip
from latent_loop.planner import hlo, plan
from latent_loop.planner.roofline import Roofline
from latent_loop.planner.topology import Topology

_MODES = ('gather_once', 'gather_per_iteration')
_STREAM = 2**26  # float32 numbers, far more than any cache holds


def depth_cost(config: Config, depths: list[tuple[int, int]], effort: Effort) -> Iterator[Line]:
  """Lines of the training step on one device at each (n, k); raises BadInput.

  predicted_seconds: the planner's roofline, with the best matrix product and the memory bandwidth measured in this
  call as the peaks. measured_temporary_bytes: by how much a step raises the memory of this process (Linux), beside
  temporary_bytes, which the compiler reserves. sent_bytes: by mode of config.mesh.weights, what each of all devices
  here sends per step when they share the weights (fsdp), read from the program that the planner compiles for them, with
  the microbatches that it chooses; none with one device.
  """
  devices = jax.devices()
  if config.train.batch_size % len(devices):
    raise BadInput(
      f'config.train.batch_size={config.train.batch_size}: not a multiple of the {len(devices)} devices that share '
      'its rows; change it, or show N devices with XLA_FLAGS=--xla_force_host_platform_device_count=N'
    )
  mesh = meshes.make_mesh(config.mesh, devices[:1])
  speeds = {**machine(config), 'devices': 1, 'stream_bytes_per_second': stream_bytes_per_second()}
  yield speeds
  chip = Chip('here', (), speeds['matmul_flops_per_second'], 0, speeds['stream_bytes_per_second'], 1.0)
  state, sent = None, {}
  for n, k in depths:
    its = at_depth(config, n, k)
    point, state = train_point(its, mesh, state)
    raised = raised_bytes(point.call) if devices[0].platform == 'cpu' else None
    if k not in sent:
      sent[k] = {mode: _collectives(its, k, mode, len(devices)) for mode in _MODES} if len(devices) > 1 else {}
    counted = cost.count(build(its.model, its.depth), its.data.seq_len)
    roofline = Roofline(its, counted, Topology('here', chip, [], 1, 1), [], its.train.num_microbatches)
    for line in measure(point, effort, its, speeds):
      predicted = roofline.at(n, k).seconds
      yield {
        **line,
        'mode': 'depth',
        'predicted_seconds': predicted,
        'seconds_over_predicted': line['seconds_median'] / predicted,
        'measured_temporary_bytes': raised,
        'sent_devices': len(devices),
        'sent_bytes': {mode: sum(c.bytes_per_step(n) for c in found) for mode, found in sent[k].items()},
      }


def _collectives(config: Config, k: int, mode: str, devices: int) -> list[hlo.Collective]:
  """Of the program for every n: a depth that is drawn, so that no compiler can count the iterations beforehand."""
  mesh = dataclasses.replace(config.mesh, data=1, fsdp=devices, weights=mode)
  drawn = DepthConfig(mean=2 * k, backprop_depth=k)
  made = plan(dataclasses.replace(config, mesh=mesh, depth=drawn), f'cpu:{devices}', 1, None, lambda line: None)
  if made.collectives is None or made.config.mesh.weights != mode:
    raise BadInput(f'config.mesh.weights={mode} does not fit the memory of {devices} devices; give a smaller config')
  return made.collectives


def stream_bytes_per_second() -> float:
  """Bytes read and written by the fastest pass over a long array."""
  add, x = jax.jit(lambda x: x + 1), jnp.zeros(_STREAM, jnp.float32)
  timed(lambda: add(x), 1)
  return 2 * x.nbytes / min(timed(lambda: add(x), 5))


def raised_bytes(call: Callable[[], object]) -> int | None:
  """By how much `call` raises the resident memory of this process while it runs; None where the system does not say."""
  jax.block_until_ready(call())
  try:
    time.sleep(0.5)  # XLA frees the temporaries of a call on another thread, somewhat later
    ctypes.CDLL(None).malloc_trim(0)  # what was freed but kept would hide what is allocated again
    Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
  except (OSError, AttributeError):  # another C library, or a kernel that does not tell
    return None
  before = _status('VmRSS')
  jax.block_until_ready(call())
  return max(_status('VmHWM') - before, 0)


def _status(name: str) -> int:
  """Bytes, of /proc/self/status."""
  lines = Path('/proc/self/status').read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(f'{name}:')) * 1024
