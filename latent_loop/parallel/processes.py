"""The processes of one run meet, and check that they are alike; then they stay together (parallel/group.py).

JAX alone aborts (in C++, exit code 134) or hangs when a process is missing or dies. So the processes first meet
over plain TCP at process 0, which tells all of them what is wrong in words. They keep those connections.
"""

import collections
import ctypes
import json
import signal
import socket
import time
from typing import Any

import jax

from latent_loop.errors import BadInput
from latent_loop.parallel.group import GRACE_SECS, SILENT_SECS, Group, Seat, differences, send
from latent_loop.parallel.ports import free_port, listen


def join(seat: Seat, facts: dict[str, str], wait_secs: float) -> 'Group':
  """Meets the other processes and starts JAX's own service; afterwards jax.devices() are those of all.

  facts: name -> value of whatever must be equal on all processes. Call it before anything that uses a device.
  Raises BadInput, the same sentence on every process that arrived, when one is missing after `wait_secs`, two
  claim one place, the facts differ, or process 0 cannot be reached.
  """
  facts = {**facts, '--num_processes': str(seat.num_processes)}
  if seat.process_id == 0:
    links = _gather(seat, facts, wait_secs)
    jax_port = free_port()
    send(links.values(), {'jax_port': jax_port})
  else:
    link, jax_port = _call(seat, facts, wait_secs)
    links = {0: link}
  group = Group(seat, links)
  jax.config.update('jax_enable_preemption_service', False)  # it would swallow the signals that stop a run
  _delay_abort()
  jax.distributed.initialize(
    f'{seat.coordinator.rpartition(":")[0]}:{jax_port}',
    seat.num_processes,
    seat.process_id,
    cluster_detection_method='deactivate',  # or SLURM's would leave each process one device
    initialization_timeout=int(wait_secs) + GRACE_SECS,
    heartbeat_timeout_seconds=10 * SILENT_SECS,  # ours is the faster one
    shutdown_timeout_seconds=GRACE_SECS,
  )
  return group


def _delay_abort() -> None:
  """Gives the watch 6 s, the number of the signal, to end this process with its own code and words.

  JAX aborts from a thread of C++ 0.1 s after process 0 died, at times before a thread of Python gets a turn.
  """
  libc = ctypes.CDLL(None)
  libc.signal(signal.SIGABRT, libc.sleep)


def check_devices() -> str:
  """What was found, as one line; raises BadInput when the processes have unequal numbers of devices."""
  found = collections.Counter(device.process_index for device in jax.devices())
  here = found[jax.process_index()]
  for process in range(jax.process_count()):
    if found[process] != found[0]:
      raise BadInput(
        f'process {process} has {found[process]} devices and process 0 has {found[0]}; every process needs the same '
        'number: check its machine'
      )
  return f'{found.total()} devices of {jax.process_count()} x {here} ({jax.devices()[0].device_kind})'


# --- meeting -----------------------------------------------------------------------------------------


def _gather(seat: Seat, facts: dict[str, str], wait_secs: float) -> dict[int, socket.socket]:
  """Process 0: a connection to every other process; on any fault tells all who came, and raises BadInput."""
  try:
    server = listen(seat.address[1])
  except OSError as error:
    raise BadInput(
      f'--coordinator={seat.coordinator}: this machine cannot listen there ({error}); use another port'
    ) from None
  deadline, came, faults = time.monotonic() + wait_secs, [], []
  links: dict[int, socket.socket] = {}
  while len(links) < seat.num_processes - 1:
    server.settimeout(max(deadline - time.monotonic(), 0.01))
    try:
      link, _ = server.accept()
    except TimeoutError:
      faults.append(_missing(seat, links, wait_secs))
      break
    hello = _receive(link, 5)
    if not isinstance(hello, dict) or 'process_id' not in hello:
      link.close()  # a stranger on this port
      continue
    came.append(link)
    if hello['process_id'] == 0 or (hello['process_id'] in links and not _is_gone(links[hello['process_id']])):
      faults.append(f'two processes have --process_id={hello["process_id"]}; number them from 0, each once')
      break
    links[hello['process_id']] = link
    faults += differences(hello['process_id'], hello['facts'], facts)
  server.close()
  if faults:
    send(came, {'refused': faults[0]})
    raise BadInput(faults[0])
  return links


def _is_gone(link: socket.socket) -> bool:
  """Whether the process at the other end, which says nothing while it waits, has ended; its next start calls anew."""
  link.settimeout(0)
  try:
    return link.recv(1, socket.MSG_PEEK) == b''
  except BlockingIOError:
    return False
  except OSError:
    return True


def _missing(seat: Seat, links: dict, wait_secs: float) -> str:
  missing = [str(i) for i in range(1, seat.num_processes) if i not in links]
  names = ', '.join(missing[:8]) + (', ...' if len(missing) > 8 else '')
  return (
    f'{len(links) + 1} of {seat.num_processes} processes arrived at {seat.coordinator} within {wait_secs:g} s; '
    f'missing: process {names}; start every process, and look at the output of the missing ones'
  )


def _call(seat: Seat, facts: dict[str, str], wait_secs: float) -> tuple[socket.socket, int]:
  """Any other process: (connection to process 0, port of JAX's service there); raises BadInput."""
  deadline = time.monotonic() + wait_secs
  link = _connect(seat, deadline, wait_secs)
  send([link], {'process_id': seat.process_id, 'facts': facts})
  # Process 0 speaks first: it may still wait for others, with a clock of its own.
  answer = _receive(link, wait_secs + GRACE_SECS)
  if not isinstance(answer, dict) or not answer.keys() & {'refused', 'jax_port'}:
    raise BadInput(
      f'--coordinator={seat.coordinator}: what answers there is not process 0 of this run, or it ended while waiting; '
      'look at its output, and start all processes again'
    )
  if 'refused' in answer:
    raise BadInput(answer['refused'])
  return link, answer['jax_port']


def _connect(seat: Seat, deadline: float, wait_secs: float) -> socket.socket:
  while True:
    try:
      link = socket.create_connection(seat.address, timeout=5)
      if link.getsockname() != link.getpeername():  # on one machine, a socket can happen to reach itself
        return link
      link.close()
      reason = 'nobody listens'
    except OSError as error:
      reason = str(error)
    if time.monotonic() > deadline:
      raise BadInput(
        f'--coordinator={seat.coordinator}: process 0 was not reached within {wait_secs:g} s ({reason}); start '
        'process 0 on that machine, and check the name, the port and the firewall'
      )
    time.sleep(0.3)


def _receive(link: socket.socket, timeout_secs: float) -> Any:
  """One message, or None when the other side closes, is silent or speaks another language."""
  link.settimeout(timeout_secs)
  data = b''
  try:
    while not data.endswith(b'\n'):
      more = link.recv(2**16)
      if not more:
        return None
      data += more
    return json.loads(data)
  except (OSError, ValueError):
    return None
