"""The processes of one run: they meet, check that they are alike, watch each other, and leave together.

JAX alone aborts (in C++, exit code 134) or hangs when a process is missing or dies. So the processes first meet
over plain TCP at process 0, which tells all of them what is wrong in words. They keep those connections until
they leave: a connection that closes without a word is a lost process, and ends the others with PEER_LOST.
"""

import collections
import ctypes
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import jax

from latent_loop.errors import BadInput

BUG, BAD_INPUT, PEER_LOST = 1, 2, 14  # exit codes
TOGETHER = (0, 10, 11)  # exit codes that every process of a run ends with at the same step
SUSPECT_SECS = 6  # a lost process shows first as a collective that fails: how long to wait for the news of it
GRACE_SECS = 4  # a process that failed may have company: how long the others may take to say why themselves
SILENT_SECS = 30  # a machine that vanished sends no farewell: the kernel gives up on it after this long


@dataclass(frozen=True)
class Seat:
  """Where this process sits. coordinator: HOST:PORT where process 0 listens, as all others reach it."""

  coordinator: str
  num_processes: int
  process_id: int

  def __post_init__(self):
    host, _, port = self.coordinator.rpartition(':')
    if not (host and port.isdigit() and 0 < int(port) < 2**16):
      raise BadInput(
        f'--coordinator={self.coordinator}: not HOST:PORT; name the machine of process 0, as 10.0.0.1:8482'
      )
    if not 0 <= self.process_id < self.num_processes:
      raise BadInput(
        f'--process_id={self.process_id} with --num_processes={self.num_processes}: ids count from 0 to '
        f'{self.num_processes - 1}; correct one of them'
      )

  @property
  def address(self) -> tuple[str, int]:
    host, _, port = self.coordinator.rpartition(':')
    return host.strip('[]'), int(port)


def join(seat: Seat, facts: dict[str, str], wait_secs: float) -> 'Group':
  """Meets the other processes and starts JAX's own service; afterwards jax.devices() are those of all.

  facts: name -> value of whatever must be equal on all processes. Call it before anything that uses a device.
  Raises BadInput, the same sentence on every process that arrived, when one is missing after `wait_secs`, two
  claim one place, the facts differ, or process 0 cannot be reached.
  """
  facts = {**facts, '--num_processes': str(seat.num_processes)}
  if seat.process_id == 0:
    links = _gather(seat, facts, wait_secs)
    jax_port = _free_port()
    _send(links.values(), {'jax_port': jax_port})
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
    server = _listen(seat.address[1])
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
    if hello['process_id'] in links or hello['process_id'] == 0:
      faults.append(f'two processes have --process_id={hello["process_id"]}; number them from 0, each once')
      break
    links[hello['process_id']] = link
    faults += _differences(hello['process_id'], hello['facts'], facts)
  server.close()
  if faults:
    _send(came, {'refused': faults[0]})
    raise BadInput(faults[0])
  return links


def _missing(seat: Seat, links: dict, wait_secs: float) -> str:
  missing = [str(i) for i in range(1, seat.num_processes) if i not in links]
  names = ', '.join(missing[:8]) + (', ...' if len(missing) > 8 else '')
  return (
    f'{len(links) + 1} of {seat.num_processes} processes arrived at {seat.coordinator} within {wait_secs:g} s; '
    f'missing: process {names}; start every process, and look at the output of the missing ones'
  )


def _differences(process: int, there: dict[str, str], here: dict[str, str]) -> list[str]:
  names = [name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]
  if not names:
    return []
  what = '; '.join(
    f'{name} is {here.get(name)} on process 0 and {there.get(name)} on process {process}' for name in names[:4]
  )
  return [f'the processes are not alike: {what}; start all of them with the same command, code and packages']


def _call(seat: Seat, facts: dict[str, str], wait_secs: float) -> tuple[socket.socket, int]:
  """Any other process: (connection to process 0, port of JAX's service there); raises BadInput."""
  deadline = time.monotonic() + wait_secs
  link = _connect(seat, deadline, wait_secs)
  _send([link], {'process_id': seat.process_id, 'facts': facts})
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


def _listen(port: int) -> socket.socket:
  if socket.has_dualstack_ipv6():
    return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(('', port))


def _free_port() -> int:
  with _listen(0) as probe:
    return probe.getsockname()[1]


def _send(links: Iterable[socket.socket], message: dict[str, Any]) -> None:
  for link in links:
    try:
      link.sendall(json.dumps(message).encode() + b'\n')
    except OSError:
      pass  # it is gone: the watch notices


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


# --- staying together --------------------------------------------------------------------------------


class Group:
  """The processes that met, watched by a thread. Process 0 is linked to all others, these to process 0 alone.

  Messages, one JSON line each: {'ended': process, 'code': exit code, None = lost}, passed on by process 0;
  {'stop': True} to process 0; {'step': s, 'stop': bool} from it: whether the run stops after step s.
  """

  def __init__(self, seat: Seat, links: dict[int, socket.socket]):
    self.seat, self._links = seat, links
    self._lock = threading.Lock()  # of sending
    self._ended: dict[int, int] = {}  # process -> the exit code it announced
    self._stop_wanted, self._word, self._closed = False, {}, 0
    self._changed = threading.Condition()
    for link in links.values():
      link.settimeout(None)
      _keep_alive(link)
    threading.Thread(target=self._watch, name='peers', daemon=True).start()

  def agree(self, step: int, wanted: bool) -> bool:
    """Whether all processes stop after `step`: True on all of them at one step, soon after one of them wanted it.

    Call it at every step. Process 0 says it for the step to come, so that nobody waits for the network.
    """
    if self.seat.process_id == 0:
      self._stop_wanted |= wanted
      first = not self._word
      for s in (step, step + 1) if first else (step + 1,):
        self._word[s] = self._stop_wanted
        self._tell({'step': s, 'stop': self._word[s]})
    elif wanted and not self._stop_wanted:
      self._stop_wanted = True
      self._tell({'stop': True})
    with self._changed:
      self._changed.wait_for(lambda: step in self._word)
      return self._word.pop(step)

  def leave(self, code: int) -> None:
    """Announces the end of this process; where all end alike, returns when all have."""
    me = self.seat.process_id
    if code in TOGETHER:
      others = set(range(1, self.seat.num_processes)) if me == 0 else {0}
      if me != 0:
        self._tell({'ended': me, 'code': code})
      with self._changed:
        self._changed.wait_for(lambda: others <= self._ended.keys())
      if me == 0:
        self._tell({'ended': 0, 'code': code})
        with self._changed:  # the others need JAX's service, which lives here, until they are gone
          self._changed.wait_for(lambda: self._closed == len(self._links), GRACE_SECS)
      return
    if code == BUG:
      failed = lambda: [item for item in self._ended.items() if item[1] not in TOGETHER]
      with self._changed:
        if self._changed.wait_for(failed, SUSPECT_SECS):
          self._give_up(*failed()[0])
    self._tell({'ended': me, 'code': code})

  def _tell(self, message: dict[str, Any]) -> None:
    with self._lock:
      _send(self._links.values(), message)

  def _watch(self) -> None:
    selector, rest = selectors.DefaultSelector(), {}
    for process, link in self._links.items():
      selector.register(link, selectors.EVENT_READ, process)
    while True:
      for key, _ in selector.select():
        try:
          data = key.fileobj.recv(2**16)
        except OSError:
          data = b''
        *lines, rest[key.data] = (rest.get(key.data, b'') + data).split(b'\n')
        for line in lines:
          self._take(json.loads(line))
        if not data:
          selector.unregister(key.fileobj)
          if key.data not in self._ended:
            self._take({'ended': key.data, 'code': None})
          with self._changed:
            self._closed += 1
            self._changed.notify_all()

  def _take(self, message: dict[str, Any]) -> None:
    if 'ended' in message:
      process, code = message['ended'], message['code']
      if self.seat.process_id == 0 and code not in TOGETHER:
        self._tell(message)
      if code is None:
        self._give_up(process, code)
      if code not in TOGETHER:
        threading.Timer(GRACE_SECS, self._give_up, (process, code)).start()
    with self._changed:
      if 'ended' in message:
        self._ended[process] = code
      elif 'step' in message:
        self._word[message['step']] = message['stop']
      else:
        self._stop_wanted = True
      self._changed.notify_all()

  def _give_up(self, process: int, code: int | None) -> NoReturn:
    what = 'was lost (killed, or its machine is gone)' if code is None else f'ended with exit code {code}'
    again = (
      'correct that'
      if code == BAD_INPUT
      else 'start the same command everywhere again: it continues from the last save'
    )
    print(
      f'error: process {process} of {self.seat.num_processes} {what}, so process {self.seat.process_id} ends too; look '
      f'at the output of that process, and {again}',
      file=sys.stderr,
      flush=True,
    )
    # Nothing else: a main thread that waits in a collective with a lost process never comes back.
    os._exit(BAD_INPUT if code == BAD_INPUT else PEER_LOST)


def _keep_alive(link: socket.socket) -> None:
  """The kernel, not a thread that a long computation could starve, asks a silent machine whether it still stands."""
  link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in (('TCP_KEEPIDLE', SILENT_SECS // 3), ('TCP_KEEPINTVL', SILENT_SECS // 6), ('TCP_KEEPCNT', 4)):
    if hasattr(socket, name):  # macOS has another name for the first
      link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
  link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
