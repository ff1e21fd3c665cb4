"""HTTP around the scheduler: the OpenAI routes, a look at the load, the chat page. On starlette."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from latent_loop.errors import BadInput
from latent_loop.serving import fields, wire
from latent_loop.serving.fields import Asked, Limits, NoSuchModel
from latent_loop.serving.scheduler import Busy, Closing, Job, Scheduler
from latent_loop.tokenizer import Tokenizer

MAX_BODY_BYTES = 2**20
_BODY_SECS = 30
_HEADERS = {'cache-control': 'no-store'}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def make_app(scheduler: Scheduler, tokenizer: Tokenizer, limits: Limits) -> Starlette:
  page = (Path(__file__).parent / 'chat.html').read_text()

  async def completions(request: Request) -> Any:
    return await answer(request, fields.COMPLETION, chat=False)

  async def chat_completions(request: Request) -> Any:
    return await answer(request, fields.CHAT, chat=True)

  async def answer(request: Request, known: dict, chat: bool) -> Any:
    values = fields.parse(await _body(request), known)
    if chat and 'messages' not in values:
      raise BadInput('messages is missing; give a list such as [{"role": "user", "content": "..."}]')
    asked = fields.asked_of(values, tokenizer, limits)
    return Answering(scheduler, asked, wire.Writer(chat, limits.model, asked, tokenizer))

  async def models(request: Request) -> Response:
    return _json({'object': 'list', 'data': [{'id': limits.model, 'object': 'model', 'owned_by': 'latent_loop'}]})

  async def health(request: Request) -> Response:
    status, code = ('ok', 200) if scheduler.takes_jobs else ('stopping', 503)
    body = {'status': status, **scheduler.load(), 'depth': limits.depth, 'max_depth': limits.max_depth}
    return _json(body, code)

  async def chat(request: Request) -> Response:
    return HTMLResponse(page, headers={**_HEADERS, 'content-security-policy': _POLICY})

  routes = [
    Route('/v1/completions', completions, methods=['POST']),
    Route('/v1/chat/completions', chat_completions, methods=['POST']),
    Route('/v1/models', models),
    Route('/health', health),
    Route('/', chat),
  ]
  return Starlette(routes=routes, exception_handlers={kind: _refuse for kind in _STATUS})


_STATUS = {NoSuchModel: 404, BadInput: 400, Busy: 429, Closing: 503, HTTPException: 500, Exception: 500}


def _json(value: Any, status: int = 200, headers: dict | None = None) -> Response:
  return Response(wire.to_json(value), status, {**_HEADERS, **(headers or {})}, 'application/json')


async def _refuse(request: Request, error: Exception) -> Response:
  return _json(*_refusal(error))


def _refusal(error: Exception) -> tuple[dict, int, dict]:
  """(body, status, headers)."""
  if isinstance(error, HTTPException):  # of a route or method that there is not, or our own
    routes = 'there are POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /health and GET /'
    sentence = f'no such route or method; {routes}' if error.status_code in (404, 405) else error.detail
    return wire.error_body(sentence, error.status_code), error.status_code, dict(error.headers or {})
  status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
  sentence = str(error) if status != 500 or isinstance(error, RuntimeError) else 'a bug of the server; see its log'
  if isinstance(error, BadInput):  # which may speak of a program's flags
    sentence = re.sub(r'--(?=[a-z])', '', sentence).replace('max_new_tokens', 'max_tokens')
  return wire.error_body(sentence, status), status, {'retry-after': '1'} if status == 429 else {}


async def _body(request: Request) -> bytes:
  too_large = HTTPException(413, f'the body is larger than {MAX_BODY_BYTES} bytes; send less')
  if int(request.headers.get('content-length', 0)) > MAX_BODY_BYTES:
    raise too_large
  body = bytearray()
  try:
    async with asyncio.timeout(_BODY_SECS):
      async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
          raise too_large
  except TimeoutError as error:
    raise HTTPException(408, f'the body did not come within {_BODY_SECS} s; send it at once') from error
  except ClientDisconnect as error:
    raise HTTPException(400, 'the client left before its body was complete; send it again') from error
  return bytes(body)


class Answering:
  """An ASGI response that makes its answer: the client's leaving ends the job."""

  def __init__(self, scheduler: Scheduler, asked: Asked, writer: wire.Writer):
    loop = asyncio.get_running_loop()
    self._changed = asyncio.Event()
    self._scheduler, self._asked, self._writer = scheduler, asked, writer
    self._job = Job(asked.request, lambda: _call(loop, self._changed.set))
    scheduler.submit(self._job)

  async def __call__(self, scope: dict, receive: Callable[[], Awaitable], send: Callable[..., Awaitable]) -> None:
    talk = self._stream(send) if self._asked.stream else self._whole(scope, receive, send)
    tasks = [asyncio.create_task(talk), asyncio.create_task(_gone(receive))]
    try:
      await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
      if tasks[0].done():
        tasks[0].result()
    finally:
      self._scheduler.cancel(self._job)
      for task in tasks:
        task.cancel()

  async def _next(self) -> list[tuple[str, int]]:
    """The pieces that came since the last call; raises what ended the job."""
    await self._changed.wait()
    self._changed.clear()
    if self._job.error is not None:
      raise self._job.error
    return self._writer.read(self._job.answer)

  async def _whole(self, scope, receive, send) -> None:
    try:
      while self._writer.finish is None:
        await self._next()
      response = _json(self._writer.whole())
    except (BadInput, RuntimeError) as error:
      response = _json(*_refusal(error))
    await response(scope, receive, send)

  async def _stream(self, send: Callable[..., Awaitable]) -> None:
    headers = [(b'content-type', b'text/event-stream; charset=utf-8'), (b'cache-control', b'no-store')]
    more = lambda body, last=False: send({'type': 'http.response.body', 'body': body, 'more_body': not last})
    await send({'type': 'http.response.start', 'status': 200, 'headers': headers})
    try:
      while self._writer.finish is None:
        pieces = await self._next()
        if pieces or self._writer.finish is not None:
          await more(wire.event(self._writer.chunk(pieces)))
      if self._asked.include_usage:
        await more(wire.event(self._writer.last_chunk()))
      await more(b'data: [DONE]\n\n', last=True)
    except (BadInput, RuntimeError) as error:  # the status is sent: the error comes as an event
      await more(wire.event(_refusal(error)[0]), last=True)


async def _gone(receive: Callable[[], Awaitable]) -> None:
  """Returns once the client has left."""
  while (await receive())['type'] != 'http.disconnect':
    pass


def _call(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
  """In the loop's thread, unless the loop has ended."""
  try:
    loop.call_soon_threadsafe(what)
  except RuntimeError:
    pass
