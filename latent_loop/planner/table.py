"""A plan as text for people."""

import dataclasses
from typing import Any

import numpy as np

from latent_loop.config import Config
from latent_loop.planner import gpus
from latent_loop.planner.plan import MODES, Plan

GiB = 2**30
_ENOUGH = 0.92  # of a GPU's memory; the rest is the driver's and the communication library's


def describe(made: Plan, numbers: dict[str, Any]) -> str:
  """The table that launch.plan prints."""
  config = made.config
  mesh = ' x '.join(f'{name} {size}' for name, size in made.mesh.items())
  rows = [
    ('parameters', f'{numbers["parameters"]:,}'),
    ('hardware', f'{made.topology.name}: {numbers["chips"]} chips, {numbers["devices"]} devices'),
    ('mesh', mesh),
    ('global batch', f'{numbers["global_batch"]} rows of {config.data.seq_len} tokens'),
    ('microbatches', f'{numbers["microbatches"]} per step, one after the other on each device'),
    ('weights', config.mesh.weights),
    *_memory(made),
    *_collectives(made, numbers),
    (
      'per step',
      f'{numbers["step_seconds"]:.3f} s, {numbers["mfu_ceiling"]:.1%} MFU at most, averaged over the depth law',
    ),
    ('tokens/s', f'{numbers["tokens_per_second"]:,.0f}'),
    (
      'whole run',
      f'{numbers["tokens"]:.3g} tokens: {numbers["days"]:.1f} days, {numbers["chip_hours"]:,.0f} chip-hours',
    ),
  ]
  lines = [f'{name:<14}{value}' for name, value in rows]
  return '\n'.join([*lines, '', *_by_depth(made), '', *_advice(made, numbers['mean_n'])])


def _memory(made: Plan) -> list[tuple[str, str]]:
  if made.memory is None:
    return [('memory', f'not known, nor whether it fits: there is no compiler for {made.topology.chip.name} here')]
  used, capacity = made.memory.needed, made.capacity
  verdict = 'fits' if made.fits else f'does NOT fit, {max(used - capacity, 0) / GiB:.2f} GiB too much'
  parts = made.memory
  detail = (
    f' (arguments {parts.arguments / GiB:.2f}, temporaries {parts.temporaries / GiB:.2f}, program '
    f'{parts.program / GiB:.2f})'
    if parts.arguments
    else ''
  )
  return [('memory', f'{used / GiB:.2f} of {capacity / GiB:.2f} GiB per device{detail}: {verdict}{_of_memory(made)}')]


def _of_memory(made: Plan) -> str:
  share = made.topology.memory_share
  if share == 1:
    return ''
  more = f'; {gpus.MEMORY_VARIABLE}={_ENOUGH} in the environment makes it more' if share < _ENOUGH else ''
  return f' (JAX gives a process {share:.0%} of the device{more})'


def _collectives(made: Plan, numbers: dict[str, Any]) -> list[tuple[str, str]]:
  if made.collectives is None:
    return [('collectives', 'not counted: there is no compiled program; the times below leave them out')]
  sent = lambda found: sum(c.bytes_per_step(numbers['mean_n']) for c in found) / 1e9
  kinds = (
    ('weights, in the depth loops', made.weight_collectives(True)),
    ('weights, elsewhere', made.weight_collectives(False)),
    ('activations, in the depth loops', made.activation_collectives()),
  )
  return [
    ('collectives', f'{name}: {len(found)}, {sent(found):.2f} GB sent per device and step') for name, found in kinds
  ]


def _by_depth(made: Plan) -> list[str]:
  """Rows at quantiles of the depth law."""
  roofline = made.roofline()
  depths = np.array([t.n + t.k for t in roofline.over_law()])
  k = made.config.depth.backprop_depth
  lines = ['  depth     n   k   step s   matmul   memory   between chips   MFU <=']
  for share in (0.05, 0.5, 0.95, 0.999):
    r = int(np.quantile(depths, share))
    t = roofline.at(max(r - k, 0), min(r, k))
    lines.append(
      f'{share:>6.1%} {r:>4} {t.n:>4} {t.k:>3} {t.seconds:>8.3f} {t.matmul:>8.3f} {t.memory:>8.3f} '
      f'{t.communication:>15.3f} {t.mfu:>8.1%}'
    )
  return lines


def _advice(made: Plan, mean_n: float) -> list[str]:
  config, mesh = made.config, made.config.mesh
  if made.fits is False:
    return [f'No mode fits ({", ".join(MODES)} tried). What helps: {"; ".join(_remedies(made.config))}.']
  flags = {'train.batch_size': config.train.batch_size, 'train.num_microbatches': config.train.num_microbatches}
  flags |= {f'mesh.{axis}': getattr(mesh, axis) for axis in ('weights', 'dcn', 'data', 'fsdp', 'tensor')}
  return ['to run it: ' + ' '.join(f'--config.{key}={value}' for key, value in flags.items()), *_faster(made, mean_n)]


def _faster(made: Plan, mean_n: float) -> list[str]:
  config, k = made.config, made.config.depth.backprop_depth
  if config.model.remat == 'none' or config.mesh.weights == 'gather_per_iteration':  # which computes iterations again
    return []
  computed = lambda remat: dataclasses.replace(made.cost, remat=remat).computed(mean_n, k, config.loss_chunks)
  saved = 1 - computed('none') / computed(config.model.remat)
  return [f'faster, where it fits too: --config.model.remat=none, {saved:.0%} fewer FLOPs per step']


def _remedies(config: Config) -> list[str]:
  """What makes a step need less memory, as flags where they can be said."""
  mesh, width = config.mesh, config.model.width
  rows = mesh.data * mesh.fsdp
  larger = [size for size in range(mesh.fsdp + 1, rows + 1) if rows % size == 0 == width % size]
  remedies = ['--config.model.remat=iteration'] if config.model.remat == 'none' else []
  remedies += [f'--config.mesh.fsdp={larger[-1]} --config.mesh.data={rows // larger[-1]}'] if larger else []
  return [*remedies, '--config.mesh.tensor=2 or more', 'more chips with a larger fsdp axis', 'chips with more memory']
