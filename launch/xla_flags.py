"""What is set in the environment before JAX starts. XLA_FLAGS that are there are kept: ours are added behind them."""

import os

ONE_THREAD = '--xla_cpu_multi_thread_eigen=false'  # how XLA_FLAGS used to ask for it; JAX 0.10 to 0.11 overlook it


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
