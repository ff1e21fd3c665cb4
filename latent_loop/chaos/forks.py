"""Programs by the hundred: one process imports everything once and forks a child for each of them.

A child runs `launch.NAME` as `python -m` does, with its own arguments, and ends as a process ends. The process it is
forked from has never started a JAX backend, whose threads a fork would lose.
"""

import dataclasses
import gc
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_LOOK_SECS = 0.005
_ADDRESS_SPACE = 24 * 2**30  # bytes; an allocation beyond it fails, before the machine runs out of memory


@dataclasses.dataclass(frozen=True)
class Ended:
  """code: None for one that was killed after its limit; negative: the signal that ended it."""

  code: int | None
  said: str  # stdout
  complained: str  # stderr
  secs: float
  peak_bytes: int


class Programs:
  """Starts one program after the other, their output in `folder`; close it."""

  def __init__(self, folder: Path):
    self.folder = folder
    command = [sys.executable, '-m', 'latent_loop.chaos.forks']
    self._server = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

  def run(self, program: str, args: tuple[str, ...], folder: Path, limit_secs: float) -> Ended:
    """`python -m launch.PROGRAM ARGS` in `folder`, killed after `limit_secs`."""
    logs = [str(self.folder / name) for name in ('stdout', 'stderr')]
    request = {'program': program, 'args': args, 'folder': str(folder), 'limit_secs': limit_secs, 'logs': logs}
    print(json.dumps(request), file=self._server.stdin, flush=True)
    ended = json.loads(self._server.stdout.readline())
    return Ended(ended['code'], *(Path(log).read_text(errors='replace') for log in logs), *ended['used'])

  def close(self) -> None:
    self._server.stdin.close()
    self._server.wait()

  def __enter__(self) -> 'Programs':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


# --- the other side -----------------------------------------------------------------------------------------


def serve() -> dict[str, Any] | None:
  """Answers requests until there are no more; in a child, returns the request to fulfil."""
  for line in sys.stdin:
    request = json.loads(line)
    began, pid = time.monotonic(), os.fork()
    if pid == 0:
      return request
    code, usage = _wait(pid, began + request['limit_secs'])
    print(json.dumps({'code': code, 'used': (time.monotonic() - began, 1024 * usage.ru_maxrss)}), flush=True)
  return None


def _wait(pid: int, deadline: float) -> tuple[int | None, resource.struct_rusage]:
  while time.monotonic() < deadline:
    done, status, usage = os.wait4(pid, os.WNOHANG)
    if done:
      return os.waitstatus_to_exitcode(status), usage
    time.sleep(_LOOK_SECS)
  os.killpg(pid, signal.SIGKILL)
  return None, os.wait4(pid, 0)[2]


def become(request: dict[str, Any]) -> None:
  """Runs the program in this process, which is a fresh child."""
  os.setsid()
  resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
  os.chdir(request['folder'])
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for number, log in enumerate(request['logs'], 1):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  sys.argv = [request['program'], *request['args']]
  runpy.run_module(f'launch.{request["program"]}', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  from ml_collections import config_flags  # noqa: F401

  import latent_loop.benchmark
  import latent_loop.checkpoint.inspect
  import latent_loop.dry_run
  import latent_loop.interop.verify
  import latent_loop.loop
  import latent_loop.planner  # noqa: F401

  gc.freeze()  # a collection in a child would copy every page that it visits
  todo = serve()
  if todo is not None:
    become(todo)
