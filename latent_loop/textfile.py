"""A text file that is written whole or not at all: a process killed meanwhile leaves the old one."""

import os
from pathlib import Path

TEMPORARY = '.tmp'  # what stands behind the name of a file that is being written


def write(path: Path, text: str) -> None:
  write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
  temporary = path.with_name(path.name + TEMPORARY)
  temporary.write_bytes(data)
  os.replace(temporary, path)
