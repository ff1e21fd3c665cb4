"""Predicted seconds of a step from counts: FLOPs, bytes of HBM traffic, bytes between chips, each over its peak.

XLA's cost analysis ignores trip counts, so everything here is counted analytically at a realized depth. The model is a
ceiling: matrix units and HBM are taken to overlap perfectly, collectives to overlap nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from latent_loop.config import Config
from latent_loop.model import depth
from latent_loop.model.cost import Cost
from latent_loop.parallel import mesh as meshes
from latent_loop.parallel.chips import HOST_GPUS
from latent_loop.planner.hlo import Collective
from latent_loop.planner.topology import Topology

DCN_BANDWIDTH = 6.25e9  # bytes/s per chip: 200 Gbit/s for a host of four
_DRAWS = 4096
# Bytes of activations that a block moves through HBM per token, in units of one width (read and written once each by
# the norms, residuals, rotary and gating between its matrix products), forward.
_TRAFFIC_PER_BLOCK = 24


@dataclasses.dataclass(frozen=True)
class StepTime:
  """Seconds of one optimizer step at (n, k)."""

  n: int
  k: int
  matmul: float
  memory: float
  communication: float
  model_flops_per_device: float
  peak: float

  @property
  def seconds(self) -> float:
    return max(self.matmul, self.memory) + self.communication

  @property
  def mfu(self) -> float:
    return self.model_flops_per_device / self.seconds / self.peak


class Roofline:
  """Step time as a function of depth for a config on a topology."""

  def __init__(self, config: Config, cost: Cost, topology: Topology, collectives: list[Collective], microbatches: int):
    again = config.mesh.weights == 'gather_per_iteration'
    self._cost = cost.gathering_per_iteration() if again else cost
    self._config, self._topology = config, topology
    self._microbatches = microbatches
    self._sent = [(collective, self._bandwidth(collective)) for collective in collectives]

  def at(self, n: int, k: int) -> StepTime:
    config, cost, chips = self._config, self._cost, self._topology.chips_per_device
    tokens = config.train.batch_size * config.data.seq_len / self._topology.num_devices
    peak = self._topology.chip.flops * chips
    ran = config.depth.backprop_depth  # iterations past k are computed, too
    return StepTime(
      n=n,
      k=k,
      matmul=tokens * cost.computed(n, ran, config.loss_chunks) / peak,
      memory=self._hbm_bytes(n, ran, tokens) / (self._topology.chip.hbm_bandwidth * chips),
      communication=self._communication(n),
      model_flops_per_device=tokens * (cost.train(n, k) - cost.spared(n, k)),  # or the ceiling would be above 100 %
      peak=peak,
    )

  def _hbm_bytes(self, n: int, k: int, tokens: float) -> float:
    cfg, sizes = self._config.model, self._cost.parameters
    item = jnp.dtype(cfg.compute_dtype).itemsize
    core = sizes['core'] + sizes.get('injection', 0)
    outer = sum(sizes.values()) - core
    # Forward, recomputation and the two products of the backward pass each read the weights; the last also adds to
    # a float32 gradient. Without gradient, forward only.
    passes = {'core': n + 4 * k, 'outer': 3}
    weights = item * (passes['core'] * core + passes['outer'] * outer) + 8 * (k * core + outer)
    blocks = cfg.num_core_layers * passes['core'] + (cfg.num_prelude_layers + cfg.num_coda_layers) * passes['outer']
    activations = tokens * blocks * _TRAFFIC_PER_BLOCK * cfg.width * item
    optimizer = 28 * sum(sizes.values()) / self._ways()  # parameter, two moments and gradient, float32
    return self._microbatches * weights / self._config.mesh.tensor + activations + optimizer

  def _ways(self) -> int:
    return max(self._config.mesh.fsdp, 1) * max(self._config.mesh.tensor, 1)

  def _communication(self, n: int) -> float:
    return sum(collective.bytes_per_step(n) / bandwidth for collective, bandwidth in self._sent)

  def _bandwidth(self, collective: Collective) -> float:
    """Bytes/s of one device. A ring leaves each host once over the network cards of all its members there."""
    chip, chips = self._topology.chip, self._topology.chips_per_device
    if 'dcn' in collective.axes:
      return DCN_BANDWIDTH * chips
    sizes = meshes.resolve(self._config.mesh, self._topology.num_devices)
    ids = np.arange(self._topology.num_devices).reshape(tuple(sizes.values()))
    members = ids[tuple(slice(None) if axis in collective.axes else 0 for axis in sizes)]
    near = int((members < HOST_GPUS).sum())
    if near == members.size:
      return chip.link_bandwidth * chips
    cards = 1 if collective.kind in ('collective-permute', 'all-to-all') else near
    return min(chip.link_bandwidth, chip.network_bandwidth * cards) * chips

  def over_law(self) -> list[StepTime]:
    """The step at many draws of the depth law, after any curriculum."""
    law = dataclasses.replace(self._config.depth, curriculum='none', curriculum_steps=0)
    keys = jax.random.split(jax.random.key(0), _DRAWS)
    n_R, k_R = jax.jit(jax.vmap(lambda key: depth.draw(law, key, jnp.int32(0))))(keys)
    return [self.at(int(n), int(k)) for n, k in zip(np.asarray(n_R), np.asarray(k_R), strict=True)]
