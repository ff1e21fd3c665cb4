"""The processes of one run stay together: they watch each other, agree when to stop, compare facts, leave in order.

Their TCP connections, made by parallel/processes.py, last until they leave: one that closes without a word is a lost
process, and ends the others with PEER_LOST.
"""

import json
import os
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from latent_loop.errors import BadInput
from latent_loop.exit_codes import BAD_INPUT, BUG, HANG, PEER_LOST, TOGETHER

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


def send(links: Iterable[socket.socket], message: dict[str, Any]) -> None:
  for link in links:
    try:
      link.sendall(json.dumps(message).encode() + b'\n')
    except OSError:
      pass  # it is gone: the watch notices


def differences(process: int, there: dict[str, str], here: dict[str, str]) -> list[str]:
  names = [name for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]
  if not names:
    return []
  what = '; '.join(
    f'{name} is {here.get(name)} on process 0 and {there.get(name)} on process {process}' for name in names[:4]
  )
  return [f'the processes are not alike: {what}; start all of them with the same command, code and packages']


class Alone:
  """What Group is to many, for a single process."""

  on_hang: Callable[[str], None]

  def agree(self, wanted: bool) -> bool:
    return wanted

  def check(self, step: int, facts: dict[str, str]) -> None:
    pass

  def announce(self, code: int) -> None:
    pass


class Group:
  """The processes that met, watched by a thread. Process 0 is linked to all others, these to process 0 alone.

  Messages, one JSON line each: {'ended': process, 'code': exit code, None = lost}, passed on by process 0;
  {'stop': True} to process 0; {'round': i, 'stop': bool} from it: whether the run stops after its i-th step since the
  start, which is not its number where a run was resumed or rolled back;
  {'check': s, 'process': p, 'facts': {...}} to process 0, {'refused': sentence} from it when facts differ.
  """

  def __init__(self, seat: Seat, links: dict[int, socket.socket], end: Callable[[int], None] = os._exit):
    self.seat, self._links, self._end = seat, links, end
    self._lock = threading.Lock()  # of sending
    self._ended: dict[int, int] = {}  # process -> the exit code it announced
    self._stop_wanted, self._round, self._word, self._closed = False, 0, {}, 0
    self._facts: dict[int, dict[int, dict]] = {}  # on process 0: step -> process -> what it said
    self.on_hang: Callable[[str], None] = lambda reason: None  # called when another process reports that it hangs
    self._changed = threading.Condition()
    for link in links.values():
      link.settimeout(None)
      _keep_alive(link)
    threading.Thread(target=self._watch, name='peers', daemon=True).start()

  def agree(self, wanted: bool) -> bool:
    """Whether all processes stop after this step: True on all of them at one step, soon after one of them wanted it.

    Call it at every step. Process 0 says it for the step to come, so that nobody waits for the network.
    """
    i, self._round = self._round, self._round + 1
    if self.seat.process_id == 0:
      self._stop_wanted |= wanted
      for j in (i, i + 1) if i == 0 else (i + 1,):
        self._word[j] = self._stop_wanted
        self._tell({'round': j, 'stop': self._word[j]})
    elif wanted and not self._stop_wanted:
      self._stop_wanted = True
      self._tell({'stop': True})
    with self._changed:
      self._changed.wait_for(lambda: i in self._word)
      return self._word.pop(i)

  def check(self, step: int, facts: dict[str, str]) -> None:
    """Compares `facts` over all processes, without waiting; where they differ, all end with BAD_INPUT."""
    message = {'check': step, 'process': self.seat.process_id, 'facts': facts}
    if self.seat.process_id == 0:
      self._compare(message)
    else:
      self._tell(message)

  def announce(self, code: int) -> None:
    """Says why this process is about to end by itself."""
    self._tell({'ended': self.seat.process_id, 'code': code})

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
    self.announce(code)

  def _compare(self, message: dict[str, Any]) -> None:
    with self._changed:
      said = self._facts.setdefault(message['check'], {})
      said[message['process']] = message['facts']
      if len(said) < self.seat.num_processes:
        return
      del self._facts[message['check']]
    for process, facts in sorted(said.items()):
      for fault in differences(process, facts, said[0]):
        sentence = f'at step {message["check"]} {fault}'
        self._tell({'refused': sentence})
        self._refuse(sentence)

  def _tell(self, message: dict[str, Any]) -> None:
    with self._lock:
      send(self._links.values(), message)

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
      if code == HANG:
        self.on_hang(f'process {process} reports that nothing moves')
    elif 'check' in message:
      return self._compare(message)
    elif 'refused' in message:
      self._refuse(message['refused'])
    with self._changed:
      if 'ended' in message:
        self._ended[process] = code
      elif 'round' in message:
        self._word[message['round']] = message['stop']
      else:
        self._stop_wanted = True
      self._changed.notify_all()

  def _refuse(self, sentence: str) -> None:
    print(f'error: {sentence}', file=sys.stderr, flush=True)
    self._end(BAD_INPUT)

  def _give_up(self, process: int, code: int | None) -> None:
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
    self._end(BAD_INPUT if code == BAD_INPUT else PEER_LOST)


def _keep_alive(link: socket.socket) -> None:
  """The kernel, not a thread that a long computation could starve, asks a silent machine whether it still stands."""
  link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in (('TCP_KEEPIDLE', SILENT_SECS // 3), ('TCP_KEEPINTVL', SILENT_SECS // 6), ('TCP_KEEPCNT', 4)):
    if hasattr(socket, name):  # macOS has another name for the first
      link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
  link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
