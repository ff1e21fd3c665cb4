"""A stand-in for an object store: what TensorStore asks of Google's, over HTTP, with delays and faults on demand."""

import contextlib
import http.server
import itertools
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator

_OBJECTS = re.compile(r'/(?:upload/)?storage/v1/b/([^/]+)/o(?:/(.*))?')
_PAGE = 7  # keys of one answer to a list; few, so that there are further pages


class ObjectStore:
  """Buckets of one server. objects: 'bucket/key' -> bytes, to look at and to damage."""

  def __init__(self, *buckets: str):
    self.buckets, self.objects, self.requests = set(buckets), {}, []
    self.delay_secs, self.fail_every = 0.0, 0  # of every request; which ones fail with 503
    self.refuse = ()  # methods that are answered with 403
    self.silent = threading.Event()  # while it is set, requests are read and never answered
    self._generations: dict[str, int] = {}
    self._count, self._lock = itertools.count(1), threading.Lock()

  @contextlib.contextmanager
  def serve(self) -> Iterator[str]:
    """The address, as long as it is up."""
    store = self

    class Handler(_Handler):
      answer = store.answer

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
      yield f'http://127.0.0.1:{server.server_port}'
    finally:
      self.silent.clear()
      server.shutdown()
      server.server_close()

  def answer(self, method: str, url: str, headers: dict, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one request."""
    number = next(self._count)
    parsed = urllib.parse.urlsplit(url)
    self.requests.append(f'{method} {url}')
    time.sleep(self.delay_secs)
    while self.silent.is_set():
      time.sleep(0.05)
    if self.fail_every and number % self.fail_every == 0:
      return 503, {}, b'{"error": {"code": 503, "message": "try again"}}'
    if method in self.refuse:
      return 403, {}, b'{"error": {"code": 403, "message": "no permission"}}'
    match = _OBJECTS.fullmatch(parsed.path)
    if not match or match[1] not in self.buckets:
      return 404, {}, b'{"error": {"code": 404, "message": "The specified bucket does not exist."}}'
    query = dict(urllib.parse.parse_qsl(parsed.query, keep_blank_values=True))
    with self._lock:
      if match[2] is None and method == 'GET':
        return self._list(match[1], query)
      key = f'{match[1]}/{urllib.parse.unquote(match[2]) if match[2] else query["name"]}'
      return self._one(method, key, query, headers, body)

  def _list(self, bucket: str, query: dict) -> tuple[int, dict, bytes]:
    names = sorted(key.removeprefix(f'{bucket}/') for key in self.objects if key.startswith(f'{bucket}/'))
    first, last = query.get('startOffset', ''), query.get('endOffset')
    start = query.get('pageToken', '')
    found = [
      n
      for n in names
      if n.startswith(query.get('prefix', '')) and n >= first and n >= start and (last is None or n < last)
    ]
    answer = {'items': [{'name': name, 'size': str(len(self.objects[f'{bucket}/{name}']))} for name in found[:_PAGE]]}
    if found[_PAGE:]:
      answer['nextPageToken'] = found[_PAGE]
    return 200, {}, json.dumps(answer).encode()

  def _one(self, method: str, key: str, query: dict, headers: dict, body: bytes) -> tuple[int, dict, bytes]:
    there = self._generations.get(key, 0) if key in self.objects else 0
    if int(query.get('ifGenerationMatch', there)) != there:
      return 412, {}, b'{}'
    if method == 'POST':
      self.objects[key], self._generations[key] = body, time.time_ns()
      return 200, {}, json.dumps({'name': key, 'generation': str(self._generations[key])}).encode()
    if not there:
      return 404, {}, b'{}'
    if method == 'DELETE':
      del self.objects[key]
      return 204, {}, b''
    if int(query.get('ifGenerationNotMatch', -1)) == there:
      return 304, {}, b''
    if query.get('alt') == 'json':
      return 200, {}, json.dumps({'name': key, 'generation': str(there), 'size': len(self.objects[key])}).encode()
    return self._content(self.objects[key], headers.get('Range'), {'x-goog-generation': str(there)})

  def _content(self, content: bytes, wanted: str | None, headers: dict) -> tuple[int, dict, bytes]:
    if not wanted:
      return 200, headers, content
    first, last = re.fullmatch(r'bytes=(\d*)-(\d*)', wanted).groups()
    first, last = (int(first), int(last or len(content) - 1)) if first else (len(content) - int(last), len(content) - 1)
    if first >= len(content):
      return 416, {'Content-Range': f'bytes */{len(content)}'}, b''
    last = min(last, len(content) - 1)
    return 206, {**headers, 'Content-Range': f'bytes {first}-{last}/{len(content)}'}, content[first : last + 1]


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  wbufsize = -1  # an answer is one packet
  answer = None

  def do_GET(self):
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

  do_POST = do_DELETE = do_PUT = do_HEAD = do_GET

  def log_message(self, *args):
    pass
