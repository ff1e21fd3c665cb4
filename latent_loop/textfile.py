"""A text file that is written whole or not at all: a process killed meanwhile leaves the old one."""

import os
from pathlib import Path

TEMPORARY = '.tmp'  # what stands behind the name of a file that is being written


def write(path: Path, text: str) -> None:
  temporary = path.with_name(path.name + TEMPORARY)
  temporary.write_text(text)
  os.replace(temporary, path)
