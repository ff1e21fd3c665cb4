"""A server under many clients that leave, err and ask for too much: are the answers right, is anything left behind?

The server is a process of its own, `python -m launch.serve` on a small run of one step. Every answer that a client
saw to its end is compared with the plain engine's.
"""

import collections
import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_loop import data, trained
from latent_loop.chaos import small
from latent_loop.errors import BadInput
from latent_loop.inference.engine import ExitRule
from latent_loop.inference.text import request_of, text_of
from latent_loop.sealing import write_experiment

_ROOT = Path(__file__).parents[2]
CLIENTS, SLOTS, QUEUE, TOTAL, MAX_DEPTH = 8, 4, 2, 512, 16
_WARM_SHARE = 1 / 4  # of the time; memory is flat from then on
GROWTH_BYTES = 24 * 2**20  # of resident memory, at most, from the warm-up to the end: allocators keep some
_START_SECS, _IDLE_SECS, _END_SECS = 120, 10, 30
_BAD = {  # body -> status
  b'{"prompt": ': 400,
  b'[]': 400,
  b'{"prompt": 3}': 400,
  b'{"prompt": "a", "depth": 17}': 400,
  b'{"prompt": "a", "exit": "klx"}': 400,
  b'{"prompt": "a", "n": 2}': 400,
  b'{"prompt": "a", "model": "gpt"}': 404,
  b' ' * (2**20 + 1): 413,
}


def make_bodies(seed: int, count: int = 16) -> list[dict[str, Any]]:
  """Requests that differ in all they can."""
  dice = random.Random(seed)
  bodies = []
  for i in range(count):
    body = {'prompt': ''.join(dice.choices('0123456789+= ', k=dice.choice([1, 5, 14, 30]))), 'seed': i}
    body |= {'max_tokens': dice.choice([1, 9, 40, 64]), 'depth': dice.choice([1, 2, 5, MAX_DEPTH])}
    body |= {'temperature': dice.choice([0, 0.7]), 'exit': dice.choice(['none', 'kl:1e-3', 'latent-diff:0.1:2'])}
    bodies.append(body)
  return bodies


def serve(minutes: float, seed: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
  """Numbers, and under 'ok' whether all is as it should be. folder: an empty one. Raises BadInput."""
  workdir, bodies = _make_run(folder), make_bodies(seed)
  want = _plain_answers(workdir, bodies)
  counts, faults, lock = collections.Counter(), [], threading.Lock()

  def note(kind: str, fault: str | None = None) -> None:
    with lock:
      counts[kind] += 1
      if fault is not None:
        faults.append(fault)
        say(fault)

  with _Process(workdir, folder / 'serve.log') as server:
    say(f'server: {server.ready}')
    clients = [_Client(server.port, bodies, want, random.Random(f'{seed} {i}'), note) for i in range(CLIENTS)]
    for body in bodies:  # every program is compiled before memory counts
      clients[0].finish(body)
    end = time.monotonic() + 60 * minutes
    threads = [threading.Thread(target=client.work, args=(end,)) for client in clients]
    for thread in threads:
      thread.start()
    time.sleep(60 * minutes * _WARM_SHARE)
    warm = server.resident_bytes()
    for thread in threads:
      thread.join()
    idle = _until_idle(server.port)
    grown = server.resident_bytes() - warm
    clients[0].finish(bodies[0])  # it still answers
    code = server.stop()
  result = {'minutes': minutes, 'seed': seed, **counts, 'faults': faults[:20], 'idle_at_the_end': idle}
  result |= {'resident_mib': round(warm / 2**20), 'grown_mib': round(grown / 2**20, 1), 'exit_code': code}
  enough = all(counts[kind] for kind in ('finished', 'left', 'refused'))
  return {**result, 'ok': not faults and idle and grown <= GROWTH_BYTES and code == 0 and enough}


def _make_run(folder: Path) -> Path:
  config = small.small_config(**{'name': 'chaos_serve', 'train.num_steps': 1, 'data.seq_len': 20})
  experiment, workdir = write_experiment(config, folder / 'serve.py'), folder / 'run'
  _call('launch.train', f'--config={experiment}', f'--workdir={workdir}')
  return workdir


def _call(module: str, *arguments: str) -> None:
  done = subprocess.run([sys.executable, '-m', module, *arguments], cwd=_ROOT, capture_output=True, text=True)
  if done.returncode != 0:
    raise BadInput(f'{module} {" ".join(arguments)} ended with {done.returncode}: {done.stderr[-500:]}')


def _plain_answers(workdir: Path, bodies: list[dict[str, Any]]) -> list[str]:
  model = trained.load(workdir)
  tokenizer = data.make_tokenizer(model.config.data)
  requests = []
  for body in bodies:
    options = {name: body[name] for name in ('depth', 'temperature', 'seed')}
    rule = ExitRule.parse(body['exit'])
    requests.append(request_of(tokenizer, body['prompt'], max_new_tokens=body['max_tokens'], exit=rule, **options))
  return [text_of(tokenizer, answer)[0] for answer in trained.engine_of(model).answer(requests)]


class _Process:
  """launch.serve as a process; leaving the context kills what is left of it."""

  def __init__(self, workdir: Path, log: Path):
    flags = {'port': 0, 'slots': SLOTS, 'queue': QUEUE, 'max_total_tokens': TOTAL, 'max_depth': MAX_DEPTH}
    command = [sys.executable, '-m', 'launch.serve', f'--workdir={workdir}', *(f'--{k}={v}' for k, v in flags.items())]
    self._log = log
    with log.open('wb') as file:
      self._process = subprocess.Popen(
        command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
      )

  def __enter__(self) -> '_Process':
    deadline = time.monotonic() + _START_SECS
    while not (found := re.search(r'at http://127\.0\.0\.1:(\d+).*', self._log.read_text())):
      if self._process.poll() is not None or time.monotonic() > deadline:
        self.__exit__()
        raise BadInput(f'launch.serve did not start: {self._log.read_text()[-500:]}')
      time.sleep(0.1)
    self.port, self.ready = int(found[1]), found[0]
    return self

  def __exit__(self, *exception: object) -> None:
    if self._process.poll() is None:
      os.killpg(self._process.pid, signal.SIGKILL)
      self._process.wait()

  def resident_bytes(self) -> int:
    pages = int(Path(f'/proc/{self._process.pid}/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')

  def stop(self) -> int | None:
    """The exit code after SIGTERM; None when it does not end."""
    self._process.send_signal(signal.SIGTERM)
    try:
      return self._process.wait(_END_SECS)
    except subprocess.TimeoutExpired:
      return None


class _Client:
  """Asks, listens or leaves, one request after the other."""

  def __init__(self, port: int, bodies: list[dict], want: list[str], dice: random.Random, note: Callable[..., None]):
    self._port, self._bodies, self._want, self._dice, self._note = port, bodies, want, dice, note

  def work(self, end: float) -> None:
    ways = [(self.finish, 4), (self._leave, 3), (self._err, 1)]
    while time.monotonic() < end:
      (way,) = self._dice.choices([way for way, _ in ways], [weight for _, weight in ways])
      try:
        way(self._dice.choice(self._bodies))
      except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        self._note('broken', f'{way.__name__}: {type(error).__name__} {error}')

  def finish(self, body: dict[str, Any]) -> None:
    """To the end, whole or as a stream; the text has to be the engine's."""
    stream = self._dice.random() < 0.5
    with self._post(json.dumps({**body, 'stream': stream}).encode()) as response:
      if response.status == 429:
        self._note('told to wait')
        time.sleep(0.05)
        return
      text = response.read().decode()
    if response.status != 200:
      self._note('broken', f'{body} was answered {response.status} {text[:200]}')
      return
    if stream:
      events = [line.removeprefix('data: ') for line in text.split('\n\n') if line and line != 'data: [DONE]']
      text = ''.join(json.loads(event)['choices'][0]['text'] for event in events)
    else:
      text = json.loads(text)['choices'][0]['text']
    want = self._want[self._bodies.index(body)]
    self._note('finished', None if text == want else f'{body}: the server says {text!r}, the engine {want!r}')

  def _leave(self, body: dict[str, Any]) -> None:
    """Some time after asking for a long answer, before or after its first words."""
    body = {**body, 'max_tokens': 400, 'depth': MAX_DEPTH, 'exit': 'none', 'stream': self._dice.random() < 0.7}
    with self._post(json.dumps(body).encode(), wait=False) as connection:
      time.sleep(self._dice.choice([0, 0.01, 0.05]))
      if self._dice.random() < 0.5:
        with contextlib.suppress(TimeoutError):
          connection.sock.settimeout(0.3)
          connection.sock.recv(300)
    self._note('left')

  def _err(self, body: dict[str, Any]) -> None:
    bad, status = self._dice.choice(list(_BAD.items()))
    try:
      with self._post(bad) as response:
        sentence = json.loads(response.read())['error']['message']
    except ConnectionError:  # it was told 413 while it still sent
      if status != 413:
        raise
      self._note('refused')
      return
    right = response.status == status and sentence
    self._note('refused', None if right else f'{bad[:60]} was answered {response.status}, not {status}')

  @contextlib.contextmanager
  def _post(self, body: bytes, wait: bool = True):
    """The response, or with wait=False the connection."""
    with contextlib.closing(http.client.HTTPConnection('127.0.0.1', self._port, timeout=60)) as connection:
      connection.request('POST', '/v1/completions', body, {'content-type': 'application/json'})
      yield connection.getresponse() if wait else connection


def _until_idle(port: int) -> bool:
  """Whether all slots and the queue are empty soon after the last client is gone."""
  deadline = time.monotonic() + _IDLE_SECS
  while time.monotonic() < deadline:
    with contextlib.closing(http.client.HTTPConnection('127.0.0.1', port, timeout=10)) as connection:
      connection.request('GET', '/health')
      load = json.loads(connection.getresponse().read())
    if load['busy'] == load['queued'] == 0:
      return True
    time.sleep(0.1)
  return False
