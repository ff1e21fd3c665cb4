"""A trained model as a server: socket, board, scheduler and HTTP, from the first request to an orderly end."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from latent_loop.errors import BadInput
from latent_loop.inference.board import Board
from latent_loop.inference.engine import Request
from latent_loop.interrupt import StopRequest
from latent_loop.serving.app import make_app
from latent_loop.serving.fields import Limits
from latent_loop.serving.scheduler import Scheduler
from latent_loop.tokenizer import Tokenizer

GRACE_SECS = 10  # from a signal to the end of what still runs


class _Server(uvicorn.Server):
  """Tells the scheduler of the signal, so that what runs ends in time."""

  def __init__(self, config: uvicorn.Config, scheduler: Scheduler):
    super().__init__(config)
    self._scheduler = scheduler

  def handle_exit(self, number: int, frame: object) -> None:
    self._scheduler.close(GRACE_SECS)
    super().handle_exit(number, frame)


def listen(host: str, port: int) -> socket.socket:
  """Raises BadInput. Port 0 is any free one."""
  try:
    return socket.create_server((host, port), backlog=1024)
  except (OSError, OverflowError) as error:
    code = getattr(error, 'errno', None) or 0
    why = os.strerror(code) if code > 0 else error  # socket.create_server says more, but twice
    raise BadInput(f'--host={host} --port={port}: cannot listen there ({why}); choose another port') from error


def warm_up(board: Board, tokens: int = 1) -> None:
  """Compiles what short prompts need, before somebody waits for it."""
  board.admit(0, Request((0,) * tokens, depth=board.max_depth, max_new_tokens=2))
  board.advance(board.max_depth + 1)
  board.release(0)


def _make(board: Board, tokenizer: Tokenizer, limits: Limits, queue: int) -> tuple[_Server, Scheduler]:
  scheduler = Scheduler(board, queue)
  app = make_app(scheduler, tokenizer, limits)
  config = uvicorn.Config(
    app, log_level='warning', access_log=False, lifespan='off', timeout_graceful_shutdown=GRACE_SECS + 5
  )
  return _Server(config, scheduler), scheduler


def run(
  board: Board, tokenizer: Tokenizer, limits: Limits, queue: int, listener: socket.socket, on_ready: Callable[[], None]
) -> None:
  """Serves until a signal comes, and a little longer for those whose answers are being made."""
  warm_up(board)
  server, scheduler = _make(board, tokenizer, limits, queue)
  scheduler.start()
  on_ready()
  with StopRequest():  # uvicorn raises the signal once more when it is done
    server.run(sockets=[listener])
  scheduler.close(0)
  scheduler.join()


@contextlib.contextmanager
def in_background(board: Board, tokenizer: Tokenizer, limits: Limits, queue: int) -> Iterator[tuple[str, Scheduler]]:
  """(the URL, the scheduler) of a server in threads of this process; for trials."""
  warm_up(board)
  server, scheduler = _make(board, tokenizer, limits, queue)
  with listen('127.0.0.1', 0) as listener:
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), name='http')
    scheduler.start()
    thread.start()
    try:
      yield f'http://127.0.0.1:{listener.getsockname()[1]}', scheduler
    finally:
      scheduler.close(0)
      server.should_exit = True
      thread.join()
      scheduler.join()
