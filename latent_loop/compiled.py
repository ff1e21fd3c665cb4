"""What a start compiles is kept for the next one.

JAX keeps it in files that it writes in place and reads back unchecked: one flipped bit is a crash or, worse, another
program. So each entry carries its hash here, and one that does not fit is thrown away and compiled anew.
"""

import hashlib
import os
import platform
import re
from pathlib import Path

import jax
from jax._src import compilation_cache  # no public place to put a checksum; tests/test_compiled.py sees it break
from jax._src.compilation_cache_interface import CacheInterface


class Checked(CacheInterface):
  """JAX's folder of compiled programs, with a hash ahead of each."""

  def __init__(self, folder: str):
    self._files, _ = _files_of(folder)
    self._path = self._files._path

  def get(self, key: str) -> bytes | None:
    entry = self._files.get(key)
    if entry is None:
      return None
    digest, value = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    if digest == _digest(key, value):
      return value
    (self._path / f'{key}-cache').unlink(missing_ok=True)
    return None

  def put(self, key: str, value: bytes) -> None:
    self._files.put(key, _digest(key, value) + value)


def _digest(key: str, value: bytes) -> bytes:
  return hashlib.sha256(key.encode() + b'/' + value).digest()


_DIGEST_BYTES = len(_digest('', b''))
_files_of = compilation_cache.get_file_cache


def keep(folder: str) -> None:
  """From now on this process keeps what it compiles there."""
  jax.config.update('jax_compilation_cache_dir', folder)
  compilation_cache.get_file_cache = lambda path: (Checked(path), path)


def machine(threads: str | None) -> str:
  """A name for what XLA compiles for on a CPU and JAX's keys do not say: its instructions, and who shares a loop.

  threads: NPROC, where it is set.
  """
  try:
    flags = re.search('^(?:flags|Features)\\s*:.*$', Path('/proc/cpuinfo').read_text(), flags=re.MULTILINE)
  except OSError:  # no Linux
    flags = None
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  text = f'{platform.machine()} {flags and flags[0]} {threads} {cores}'
  return hashlib.sha256(text.encode()).hexdigest()[:16]
