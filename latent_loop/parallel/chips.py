"""What the makers say their chips can do; per chip, which may show up as two JAX devices."""

import dataclasses
import math

GiB = 2**30
HOST_GPUS = 8  # JAX devices in one host of GPUs


@dataclasses.dataclass(frozen=True)
class Chip:
  """Nominal numbers of one chip, from data sheets.

  kinds: what JAX calls it (a prefix). flops: dense bfloat16 FLOP/s. hbm_bandwidth and link_bandwidth in bytes/s;
  link_bandwidth is what the chip sends to its neighbors (ICI, NVLink) over all links in one direction, and
  network_bandwidth, where these links end at the host, what it sends to other hosts over its share of the host's cards.
  """

  name: str
  kinds: tuple[str, ...]
  flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float = math.inf
  devices: int = 1  # of JAX, that are one chip where their coordinates do not tell


CHIPS = (
  Chip('v4', ('TPU v4',), 275e12, 32 * GiB, 1.23e12, 150e9),
  Chip('v5e', ('TPU v5 lite', 'TPU v5e'), 197e12, 16 * GiB, 0.82e12, 100e9),
  Chip('v5p', ('TPU v5p', 'TPU v5'), 459e12, 95 * GiB, 2.77e12, 300e9),
  Chip('v6e', ('TPU v6 lite', 'TPU v6e'), 918e12, 32 * GiB, 1.64e12, 224e9),
  Chip('tpu7x', ('TPU7x', 'TPU v7', 'TPU 7x'), 2307e12, 192 * GiB, 7.37e12, 600e9),
  Chip('a100', ('NVIDIA A100',), 312e12, 80 * GiB, 2.04e12, 300e9, 25e9),
  Chip('h100', ('NVIDIA H100',), 989e12, 80 * GiB, 3.35e12, 450e9, 50e9),
  Chip('h200', ('NVIDIA H200',), 989e12, 141 * GiB, 4.8e12, 450e9, 50e9),
  Chip('mi250x', ('AMD Instinct MI250X',), 383e12, 128 * GiB, 3.28e12, 250e9, 25e9, devices=2),
)


def chip_of(device_kind: str) -> Chip | None:
  """The chip that JAX calls `device_kind`, or None where it is not in the table (a CPU)."""
  hits = [chip for chip in CHIPS if device_kind.startswith(chip.kinds)]
  return hits[0] if hits else None


def count_chips(devices: list) -> int:
  """Chips behind `devices`, all of a kind: TPU cores at the same place of the same slice share one."""
  if devices[0].platform == 'tpu':
    return len({(getattr(d, 'slice_index', 0), tuple(d.coords)) for d in devices})
  chip = chip_of(devices[0].device_kind)
  return -(-len(devices) // chip.devices) if chip else len(devices)


def peak_flops(devices: list) -> float | None:
  """Nominal FLOP/s of all `devices`, or None where they are unknown: utilization is then not reported."""
  chip = chip_of(devices[0].device_kind)
  return chip.flops * count_chips(devices) if chip else None
