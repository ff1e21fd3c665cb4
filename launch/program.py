"""What every program shares: flags in, exit code out, and bad input as one sentence."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

BAD_INPUT, BUG = 2, 1


def run(main: Callable[[list[str]], int]) -> None:
  """Parses flags and ends the process with main(positional arguments)'s exit code.

  Bad flags, config keys and BadInput: a sentence and code 2. Anything else unforeseen: a traceback and 1.
  """
  app.run(lambda argv: sys.exit(_guard(lambda: main(argv[1:]))), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _refuse(f'{_one_line(error)}; see python -m launch.{Path(argv[0]).stem} --help')
  except (AttributeError, KeyError, TypeError, ValueError) as error:  # ml_collections, on --config.a.b=value
    _refuse(f'{_one_line(error)}; see the keys in latent_loop/config.py')
  except (ImportError, SyntaxError, NameError) as error:
    _refuse(f'--config: the experiment file does not run ({type(error).__name__}: {_one_line(error)}); correct it')


def _guard(main: Callable[[], int]) -> int:
  from latent_loop.errors import BadInput

  try:
    return main()
  except BadInput as error:
    _refuse(str(error))
  except Exception:  # the one place: an unforeseen error must still leave with its own exit code
    traceback.print_exc()
    return BUG


def _refuse(sentence: str) -> None:
  print(f'error: {sentence}', file=sys.stderr, flush=True)
  sys.exit(BAD_INPUT)


def _one_line(error: BaseException) -> str:
  return ' '.join(str(error).split()).rstrip('.')


def define_config() -> flags.FlagHolder:
  return config_flags.DEFINE_config_file(
    'config', None, 'experiment file, such as experiments/tiny_text.py', lock_config=True
  )


def sealed(holder: flags.FlagHolder):
  """The frozen Config of --config with its overrides; raises BadInput."""
  from latent_loop import config as config_lib
  from latent_loop.errors import BadInput

  try:
    values = holder.value
  except FileNotFoundError as error:
    raise BadInput(f'--config={error.filename}: no such file; give one of experiments/*.py') from error
  if values is None:
    raise BadInput('--config is missing; give an experiment file such as experiments/tiny_text.py')
  return config_lib.seal(values)


def workdir_of(value: str | None) -> Path:
  """--workdir as a path; raises BadInput when it is missing or a URL."""
  from latent_loop.errors import BadInput

  if not value:
    raise BadInput('--workdir is missing; give the folder of the run, such as runs/tiny_text')
  if '://' in value:
    raise BadInput(f'--workdir={value}: only local folders work so far; give a path')
  return Path(value)


def quiet() -> None:
  """Keeps the libraries' chatter off the console; set before JAX is imported."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
