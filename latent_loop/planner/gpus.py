"""NVIDIA GPUs to compile for where there are none: their numbers, as XLA's compiler wants to be told them."""

import importlib.util

import jax
from jax.experimental import topologies
from jaxlib import xla_client

from latent_loop.errors import BadInput
from latent_loop.parallel.chips import HOST_GPUS, Chip

HAS_COMPILER = any(map(importlib.util.find_spec, ('jax_cuda13_plugin', 'jax_cuda12_plugin')))
# Of one chip: compute capability, multiprocessors, float32 units of each, bytes of shared memory of each and the most
# of a block, of the second-level cache, clock in GHz.
_HOPPER = ((9, 0), 132, 128, 233472, 232448, 52428800, 1.98)
_CHIPS = {'a100': ((8, 0), 108, 64, 167936, 166912, 41943040, 1.41), 'h100': _HOPPER, 'h200': _HOPPER}
MEMORY_VARIABLE = 'XLA_CLIENT_MEM_FRACTION'
OPTIONS = {'xla_gpu_autotune_level': 0}  # there is nothing to try kernels on


def devices(chip: Chip, count: int) -> list:
  """`count` GPUs to compile for; none without JAX's CUDA plugin, or for a chip not described here."""
  if chip.name not in _CHIPS or not HAS_COMPILER:
    return []
  jax.devices()  # registers the plugin
  hosts = count // HOST_GPUS if count % HOST_GPUS == 0 else 1
  shape = f'1x{hosts}x{count // hosts}'
  return list(topologies.get_topology_desc('', 'cuda', target_config=_described(chip), topology=shape).devices)


def memory_share() -> float:
  """The part of a GPU's memory that JAX gives a process: by its own default, or what the environment says."""
  try:
    share = xla_client.generate_pjrt_gpu_plugin_options().get('memory_fraction', 0.75)
  except ValueError as error:
    raise BadInput(f'the environment: JAX does not take it ({error}); mend or unset {MEMORY_VARIABLE}') from error
  if not 0 < share <= 1:
    raise BadInput(f'{MEMORY_VARIABLE}={share:g} in the environment: it is a share of a GPU, above 0 and at most 1')
  return share


def _described(chip: Chip) -> str:
  """XLA's GpuTargetConfigProto as text."""
  (major, minor), cores, units, shared, shared_of_block, cache, clock = _CHIPS[chip.name]
  features = 'feature_extension: ACCELERATED_FEATURES' if major == 9 else ''
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_of_block}
      core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock} l2_cache_size: {cache}
      memory_bandwidth: {int(chip.hbm_bandwidth)} device_memory_size: {chip.hbm_bytes} device_address_bits: 64
      cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
      name: "{chip.kinds[0]}" device_vendor: "NVIDIA Corporation"
      driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    runtime_version {{ major: 12 minor: 8 patch: 0 }}
    device_description_str: "{chip.kinds[0]}"
  """
