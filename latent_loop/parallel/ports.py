"""TCP ports: to listen at one, and to find one that is free."""

import contextlib
import random
import socket

from latent_loop.errors import BadInput

# Below those that systems hand out to every connection (Linux from 32768) and to services of Kubernetes (from 30000):
# a port that is free stays so until it is used, seconds later.
_FIRST, _LAST = 20_000, 29_999


def listen(port: int) -> socket.socket:
  if socket.has_dualstack_ipv6():
    return socket.create_server(('', port), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(('', port))


def free_port() -> int:
  for port in random.SystemRandom().sample(range(_FIRST, _LAST + 1), 99):
    with contextlib.suppress(OSError), listen(port):
      return port
  raise BadInput(
    f'no free port: 99 of {_FIRST} to {_LAST} on this machine cannot be listened at; end the programs that hold them '
    '(ss -ltp)'
  )
