"""Packages of the optional groups in launch/requirements/, imported when they are needed."""

import importlib
from types import ModuleType

from latent_loop.errors import BadInput


def load(name: str, group: str, purpose: str) -> ModuleType:
  """The module `name`; raises BadInput, with the command that installs `group`, when it is absent."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    package = name.partition('.')[0]
    raise BadInput(
      f'{purpose}: the package {package} is not installed; pip install -r launch/requirements/{group}.txt'
    ) from error
