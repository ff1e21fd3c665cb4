"""What a start compiled is found by the next, and never believed when it was altered."""

import subprocess
import sys
from pathlib import Path

import pytest

from latent_loop.compiled import Checked

START = """
import sys
import jax
from latent_loop import compiled

compiled.keep(sys.argv[1])
events = []
jax.monitoring.register_event_listener(lambda name, **more: events.append(name.rpartition('/')[2]))
value = jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((5, 5)))
print(value, events.count('cache_hits'), events.count('cache_misses'))
"""


def test_every_altered_bit_and_every_cut_is_noticed(tmp_path):
  whole = b'a program'
  entry = tmp_path / 'key-cache'
  Checked(str(tmp_path)).put('key', whole)
  good = entry.read_bytes()
  assert Checked(str(tmp_path)).get('key') == whole and Checked(str(tmp_path)).get('other') is None
  flips = [(i, 1 << bit) for i in range(len(good)) for bit in range(8)]
  for bad in [
    *(good[:i] + bytes([good[i] ^ bit]) + good[i + 1 :] for i, bit in flips),
    *(good[:i] for i in range(len(good))),
  ]:
    entry.write_bytes(bad)
    assert Checked(str(tmp_path)).get('key') is None and not entry.exists()
  (tmp_path / 'other-cache').write_bytes(good)
  assert Checked(str(tmp_path)).get('other') is None, 'the entry of another program'
  Checked(str(tmp_path)).put('key', whole)
  assert Checked(str(tmp_path)).get('key') == whole, 'what was thrown away can come again'


@pytest.mark.slow
def test_jax_goes_through_it(tmp_path):
  """With the pinned JAX: kept, found, thrown away when altered."""

  def start() -> list[str]:
    command = [sys.executable, '-c', START, str(tmp_path)]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()

  value, hits, misses = start()
  assert (value, hits) == ('125.0', '0') and int(misses) >= 1
  assert start() == ['125.0', misses, '0']
  for entry in tmp_path.glob('*-cache'):
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
  assert start() == ['125.0', '0', misses]
