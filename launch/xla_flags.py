"""What is set before JAX starts. An environment's own XLA_FLAGS stay as they are."""

import importlib.util
import os
import sys
from pathlib import Path

ONE_THREAD = '--xla_cpu_multi_thread_eigen=false'  # how XLA_FLAGS used to ask for it; JAX 0.10 to 0.11 overlook it

_GOOGLE = '0x1ae0'  # PCI vendor of TPUs
_DEVICES = '--xla_force_host_platform_device_count'


def use_threads(count: int | None) -> int:
  """Gives XLA's CPU work `count` threads and returns that count; raises BadInput for one below 1.

  None: NPROC where it is set, 1 where XLA_FLAGS ask for one thread, else the cores that this process may use. Only
  NPROC, and the cores that `taskset` leaves, bind JAX 0.10 and 0.11.
  """
  from latent_loop.errors import BadInput

  if count is not None and count < 1:
    raise BadInput(f'--threads={count} is below 1; give a positive number')
  nproc, allowed = os.environ.get('NPROC', ''), len(os.sched_getaffinity(0))
  asked = 1 if ONE_THREAD in os.environ.get('XLA_FLAGS', '') else int(nproc) if nproc.isdecimal() else allowed
  threads = min(count or asked, allowed)
  os.environ['NPROC'] = str(threads)
  return threads


def forget_absent_tpus() -> None:
  """Keeps JAX to the CPU where libtpu is installed, as launch.plan needs it, and there is no accelerator.

  JAX would look for TPUs at every start, and libtpu print five lines that read like a failure.
  """
  if 'JAX_PLATFORMS' in os.environ or importlib.util.find_spec('libtpu') is None:
    return
  if any(path.name.startswith(('nvidia', 'kfd', 'dxg')) for path in Path('/dev').iterdir()):  # GPUs
    return
  vendors = {path.read_text().strip() for path in Path('/sys/bus/pci/devices').glob('*/vendor')}
  if vendors and _GOOGLE not in vendors:
    os.environ['JAX_PLATFORMS'] = 'cpu'


def use_devices(count: int) -> None:
  """Shows the CPU as `count` devices, unless XLA_FLAGS already say a number."""
  xla_flags = os.environ.get('XLA_FLAGS', '')
  if _DEVICES not in xla_flags:
    os.environ['XLA_FLAGS'] = f'{xla_flags} {_DEVICES}={count}'.strip()


MALLOC = ':'.join(
  f'glibc.malloc.{setting}' for setting in ('mmap_max=0', 'trim_threshold=1099511627776', 'arena_max=1', 'hugetlb=1')
)


def keep_memory() -> None:
  """Starts this process anew, once, with a C library (glibc) that keeps freed memory and uses huge pages.

  XLA's CPU client allocates the temporaries of a step anew each time: for bench_w256 one gigabyte, whose page faults
  took a fifth of the step. glibc reads these settings at its own start only. Nothing happens where GLIBC_TUNABLES
  set malloc already, and on systems other than Linux.
  """
  tunables = os.environ.get('GLIBC_TUNABLES', '')
  if sys.platform == 'linux' and 'glibc.malloc.' not in tunables:
    environment = {**os.environ, 'GLIBC_TUNABLES': f'{tunables}:{MALLOC}'.lstrip(':')}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
