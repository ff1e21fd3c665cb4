"""Where this process sits among the processes of a run, from flags or a cluster's environment; and its entry.

One machine needs none of these flags.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import re
import urllib.error
import urllib.request
from pathlib import Path

from absl import flags

from launch import program

_CLUSTER = flags.DEFINE_enum('cluster', None, ['tpu', 'slurm'], 'where to read coordinator, number and id from')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT on the machine of process 0, instead of --cluster')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'processes of the run, with --coordinator')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'which of them this is, from 0, with --coordinator')
_WAIT_SECS = flags.DEFINE_float('wait_secs', 300, 'how long processes wait for each other at the start', lower_bound=1)

_TPU_PORT = 8482
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def join(config, workdir):
  """Meets the other processes and prints the preflight; returns the Group, or None for a process alone.

  Raises BadInput, on all processes alike, when they cannot work together.
  """
  seat = seat_of(dict(os.environ))
  if seat is None or seat.num_processes == 1:
    return None
  from latent_loop.parallel import processes

  first = seat.process_id == 0
  if first:
    print(f'preflight: waiting up to {_WAIT_SECS.value:g} s for {seat.num_processes} processes at {seat.coordinator}')
  group = processes.join(seat, _facts(config, workdir), _WAIT_SECS.value)
  program.leave_by(group.leave)
  devices = processes.check_devices()
  if first:
    print(f'preflight: {seat.num_processes} of {seat.num_processes} processes, alike; {devices}', flush=True)
  return group


def seat_of(environment: dict[str, str]):
  """The Seat that flags and `environment` give, None without any; raises BadInput."""
  from latent_loop.errors import BadInput
  from latent_loop.parallel.group import Seat

  by_hand = {
    '--coordinator': _COORDINATOR.value,
    '--num_processes': _NUM_PROCESSES.value,
    '--process_id': _PROCESS_ID.value,
  }
  missing = [flag for flag, value in by_hand.items() if value is None]
  if len(missing) < len(by_hand):
    if _CLUSTER.value or missing:
      other = '--cluster' if _CLUSTER.value else ' and '.join(missing)
      raise BadInput(
        f'{", ".join(by_hand)} go together and without --cluster; {"drop" if _CLUSTER.value else "give"} {other}'
      )
    return Seat(*by_hand.values())
  if _CLUSTER.value == 'slurm':
    return _slurm_seat(environment)
  if _CLUSTER.value == 'tpu':
    return _tpu_seat(environment)
  _refuse_to_train_alone(environment)
  return None


def _refuse_to_train_alone(environment: dict[str, str]) -> None:
  """Each of many processes would train the whole run by itself, over the same files, or wait in libtpu for ever."""
  from latent_loop.errors import BadInput

  tasks = environment.get('SLURM_NTASKS', '1') if 'SLURM_STEP_NODELIST' in environment else '1'
  workers = environment.get('TPU_WORKER_HOSTNAMES', '').split(',')
  for cluster, count in (('slurm', int(tasks)), ('tpu', len(workers))):
    if count > 1:
      raise BadInput(f'this is one of {count} processes that {cluster} started, and --cluster={cluster} is missing')


def _slurm_seat(environment: dict[str, str]):
  from latent_loop.errors import BadInput
  from latent_loop.parallel.group import Seat

  names = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_STEP_NUM_NODES')
  missing = [name for name in names if name not in environment]
  if missing:
    raise BadInput(f'--cluster=slurm: {", ".join(missing)} not set, so srun did not start this; see launch/slurm.sh')
  job, nodes, tasks, task, num_nodes = (environment[name] for name in names)
  if tasks != num_nodes:
    raise BadInput(
      f'--cluster=slurm: {tasks} tasks on {num_nodes} nodes; one process drives all devices of a node: '
      'use --ntasks-per-node=1'
    )
  # 'node7', 'node[007-009,012]' and 'node[1-2]-ib,other' start with node7, node007 and node1-ib.
  first = re.sub(r'^([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?.*$', r'\1\2\3', nodes)
  # Jobs that share a node meet at different ports, above those that the kernel gives to clients.
  return Seat(f'{first}:{61440 + int(job) % 4096}', int(tasks), int(task))


def _tpu_seat(environment: dict[str, str]):
  """On GKE the environment knows all; on a TPU VM the machine's metadata server does."""
  from latent_loop.parallel.group import Seat

  if {'TPU_WORKER_HOSTNAMES', 'TPU_WORKER_ID'} <= environment.keys():
    workers, worker, slices = environment['TPU_WORKER_HOSTNAMES'].split(','), environment['TPU_WORKER_ID'], environment
  else:
    # Either hosts, or name:id:address of each.
    workers = [part.split(':')[-1] for part in _metadata(environment, 'worker-network-endpoints').split(',')]
    worker = _metadata(environment, 'agent-worker-number')
    lines = (line.partition(':') for line in _metadata(environment, 'tpu-env').splitlines())
    slices = {name.strip(): value.strip().strip("'") for name, _, value in lines}
  host = slices.get('MEGASCALE_COORDINATOR_ADDRESS') or workers[0]
  num_slices, slice_id = (
    int(slices.get(f'MEGASCALE_{name}') or default) for name, default in (('NUM_SLICES', 1), ('SLICE_ID', 0))
  )
  return Seat(f'{host.partition(":")[0]}:{_TPU_PORT}', len(workers) * num_slices, int(worker) + slice_id * len(workers))


def _metadata(environment: dict[str, str], key: str) -> str:
  from latent_loop.errors import BadInput

  host = environment.get('GCE_METADATA_IP', 'metadata.google.internal')
  url = f'http://{host}/computeMetadata/v1/instance/attributes/{key}'
  try:
    with urllib.request.urlopen(urllib.request.Request(url, headers={'Metadata-Flavor': 'Google'}), timeout=10) as page:
      return page.read().decode()
  except (OSError, urllib.error.URLError) as error:
    raise BadInput(f'--cluster=tpu: {url} does not answer ({error}), so this is no TPU VM; drop the flag') from error


def _facts(config, workdir) -> dict[str, str]:
  """What must be equal on all processes: the config key by key, the code, the packages, the folder."""
  from latent_loop import sealing

  code = hashlib.sha256()
  for path in sorted(Path(sealing.__file__).parent.rglob('*.py')):
    code.update(path.read_bytes())
  return {
    **{key: repr(value) for key, value in sealing.flat(dataclasses.asdict(config), 'config.').items()},
    '--workdir': str(workdir),
    'code in latent_loop/': code.hexdigest()[:12],
    'python': platform.python_version(),
    **{f'package {name}': importlib.metadata.version(name) for name in _PACKAGES},
  }
