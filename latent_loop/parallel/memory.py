"""Whether what a run keeps fits the memory of the machine; asked before any of it is allocated."""

import math
import os
from typing import Any

import jax

from latent_loop.config import Config
from latent_loop.errors import BadInput

_BYTES_PER_TOKEN = 20  # of a batch: tokens, targets, weights, positions, segments


def check_batch(config: Config) -> None:
  """Raises BadInput when this process's rows of a batch alone are more than its memory."""
  rows = -(-config.train.batch_size // jax.process_count())
  needed, capacity = rows * config.data.seq_len * _BYTES_PER_TOKEN, _host_bytes()
  if needed > capacity:
    raise BadInput(
      f'config.train.batch_size={config.train.batch_size} with config.data.seq_len={config.data.seq_len}: a batch '
      f'takes {_gib(needed)} in each process, and the machine has {_gib(capacity)}; lower one of them'
    )


def check_state(shapes: Any, specs: Any) -> None:
  """Raises BadInput when the train state alone is more than a device's memory. specs: the sharding of each array."""
  sizes = jax.tree.map(lambda a, s: math.prod(s.shard_shape(a.shape)) * a.dtype.itemsize, shapes, specs)
  needed, capacity = sum(jax.tree.leaves(sizes)), _device_bytes()
  if needed > capacity:
    raise BadInput(
      f'config.model and config.optim: parameters and optimizer take {_gib(needed)} on each device, which has '
      f'{_gib(capacity)}; take a smaller model, or split it over more devices with config.mesh.fsdp'
    )


def check_cache(needed: int) -> None:
  """Raises BadInput when keys and values of `needed` bytes, over all devices, are more than their memory."""
  capacity = _device_bytes() * jax.device_count()
  if needed > capacity:
    raise BadInput(
      f'the cache of keys and values would take {_gib(needed)}, and there are {_gib(capacity)}; use --cache=ring:1, '
      'fewer or shorter prompts, or a smaller --max_new_tokens or --depth'
    )


def check_unroll(needed: int, depth: int) -> None:
  """Raises BadInput when the numbers of an unroll, `needed` bytes, are more than this process's memory."""
  capacity = _host_bytes()
  if needed > capacity:
    raise BadInput(
      f'--depths={depth}: what every validation token does at each depth takes {_gib(needed)}, and the machine has '
      f'{_gib(capacity)}; ask for less'
    )


def _device_bytes() -> int:
  """Of one device of this process; the devices of a CPU share its memory."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('bytes_limit') or _host_bytes() // jax.local_device_count()


def _host_bytes() -> int:
  return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def _gib(size: int) -> str:
  return f'{size / 2**30:.1f} GiB'
