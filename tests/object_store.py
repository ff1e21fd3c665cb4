"""A stand-in for an object store: what TensorStore asks of Google's, over HTTP, slow, failing or silent on demand."""

import contextlib
import http.server
import itertools
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from email.message import Message

_OBJECTS = re.compile(r'/(?:upload/)?storage/v1/b/([^/]+)/o(?:/(.*))?')
_PAGE = 7  # keys in one answer to a list; few, so that further pages are asked for
BUCKET = 'bucket'
Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


class ObjectStore:
  """One bucket, and nothing in it. objects: key -> content, to look at, to damage, to put back."""

  def __init__(self):
    store = self

    class Handler(_Handler):
      answer = store.answer

    self._server = _Server(('127.0.0.1', 0), Handler)  # it listens from now on
    self.address = f'http://127.0.0.1:{self._server.server_port}'
    self.objects: dict[str, bytes] = {}
    self._generations: dict[str, int] = {}
    self._count, self._lock, self._running = itertools.count(1), threading.Lock(), False
    self.heal()

  def start(self) -> None:
    """Answers from now on, until the process ends."""
    if not self._running:
      threading.Thread(target=self._server.serve_forever, daemon=True).start()
      self._running = True

  def heal(self) -> None:
    """No faults."""
    self.delay_secs, self.fail_every = 0.0, 0  # before every answer; every Nth request ends with 503
    self.changes_left = float('inf')  # after that many writes and deletions, everything is refused with 403
    self.silent = self.unlisted = False  # requests are taken and not answered; lists alone are refused

  @contextlib.contextmanager
  def faults(self, **values: float | bool) -> Iterator[None]:
    """These attributes, until the end of the block."""
    vars(self).update(values)
    try:
      yield
    finally:
      self.heal()

  def answer(self, method: str, url: str, headers: Message, body: bytes) -> Answer:
    number = next(self._count)
    time.sleep(self.delay_secs)
    while self.silent:
      time.sleep(0.05)
    if self.fail_every and number % self.fail_every == 0:
      return _refusal(503, 'try again')
    parsed = urllib.parse.urlsplit(url)
    bucket, key = _OBJECTS.fullmatch(parsed.path).groups()
    query = dict(urllib.parse.parse_qsl(parsed.query, keep_blank_values=True))
    if bucket != BUCKET:
      return _refusal(404, 'The specified bucket does not exist.')
    with self._lock:
      if self.changes_left < (method != 'GET'):
        self.changes_left = -1
      if self.changes_left < 0 or (self.unlisted and key is None and method == 'GET'):
        return _refusal(403, 'no permission')
      self.changes_left -= method != 'GET'
      if key is None and method == 'GET':
        return self._list(query)
      return self._one(method, urllib.parse.unquote(key) if key else query['name'], query, headers, body)

  def _list(self, query: dict[str, str]) -> Answer:
    first = max(query.get('startOffset', ''), query.get('pageToken', ''))
    found = [key for key in sorted(self.objects) if key >= first and key.startswith(query.get('prefix', ''))]
    found = [key for key in found if key < query.get('endOffset', '\U0010ffff')]
    answer = {'items': [{'name': key, 'size': str(len(self.objects[key]))} for key in found[:_PAGE]]}
    return 200, {}, json.dumps({**answer, **({'nextPageToken': found[_PAGE]} if found[_PAGE:] else {})}).encode()

  def _one(self, method: str, key: str, query: dict[str, str], headers: Message, body: bytes) -> Answer:
    there = self._generations.get(key, 1) if key in self.objects else 0
    if int(query.get('ifGenerationMatch', there)) != there:
      return _refusal(412, 'another generation')
    if method == 'POST':
      self.objects[key], self._generations[key] = body, time.time_ns()
      return 200, {}, self._about(key)
    if not there:
      return _refusal(404, 'no such object')
    if method == 'DELETE':
      del self.objects[key]
      return 204, {}, b''
    if int(query.get('ifGenerationNotMatch', 0)) == there:
      return 304, {}, b''
    if query['alt'] == 'json':
      return 200, {}, self._about(key)
    return _part(self.objects[key], headers.get('Range'), {'x-goog-generation': str(there)})

  def _about(self, key: str) -> bytes:
    generation = str(self._generations.get(key, 1))
    return json.dumps({'name': key, 'generation': generation, 'size': str(len(self.objects[key]))}).encode()


def _refusal(status: int, message: str) -> Answer:
  return status, {}, json.dumps({'error': {'code': status, 'message': message}}).encode()


def _part(content: bytes, wanted: str | None, headers: dict[str, str]) -> Answer:
  """The bytes that a Range header asks for: first-last, first-, or -count."""
  if not wanted:
    return 200, headers, content
  first, last = re.fullmatch(r'bytes=(\d*)-(\d*)', wanted).groups()
  start = int(first) if first else max(len(content) - int(last), 0)
  end = min(int(last), len(content) - 1) if first and last else len(content) - 1
  if start > end:
    return 416, {'Content-Range': f'bytes */{len(content)}'}, b''
  return 206, {**headers, 'Content-Range': f'bytes {start}-{end}/{len(content)}'}, content[start : end + 1]


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128  # of connections that wait; one too many takes a second


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  wbufsize = -1  # an answer is one packet: in several it takes 40 ms
  answer = None

  def do_GET(self) -> None:
    body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    status, headers, content = type(self).answer(self.command, self.path, self.headers, body)
    with contextlib.suppress(OSError):  # the client may have given up
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      if status not in (204, 304):
        self.send_header('Content-Length', str(len(content)))
      self.end_headers()
      self.wfile.write(content)

  do_POST = do_DELETE = do_GET

  def log_message(self, *args: object) -> None:
    """Nothing: the tests' output is not its place."""


STORE = ObjectStore()  # one for the process: TensorStore reads its address once, from the environment
