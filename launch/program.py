"""What every program shares: flags in, exit code out, and bad input as one sentence."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

BAD_INPUT, BUG = 2, 1


def run(main: Callable[[list[str]], int]) -> None:
  """Parses flags and ends the process with main(positional arguments)'s exit code.

  Bad flags, config keys and BadInput: a sentence and code 2. Anything else unforeseen: a traceback and 1.
  """
  app.run(lambda argv: sys.exit(_guard(lambda: main(argv[1:]))), flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  from latent_loop.config import check_key
  from latent_loop.errors import BadInput

  try:
    for arg in argv[1:]:
      if arg.startswith('--config.'):  # ml_collections would not say which key it does not know
        check_key(arg.removeprefix('--config.').partition('=')[0])
    rest = flags.FLAGS(argv)
    if flags.FLAGS['verbosity'].using_default_value:
      logging.set_verbosity(logging.ERROR)  # the libraries' chatter; --verbosity=0 brings it back
    return rest
  except BadInput as error:
    _refuse(str(error))
  except flags.Error as error:
    _refuse(f'{_one_line(error)}; see python -m launch.{Path(argv[0]).stem} --help')
  except (AttributeError, ImportError, KeyError, NameError, SyntaxError, TypeError, ValueError) as error:
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

  values = holder.value
  if values is None:
    raise BadInput('--config is missing; give an experiment file such as experiments/tiny_text.py')
  try:
    return config_lib.seal(values)
  except OSError as error:  # ml_collections notices a missing file at the first access
    path = config_flags.get_config_filename(flags.FLAGS[holder.name])
    raise BadInput(f'--config={path}: no such file; give one of experiments/*.py') from error


def workdir_of(value: str | None) -> Path:
  """--workdir as a path; raises BadInput when it is missing or a URL."""
  from latent_loop.errors import BadInput

  if not value:
    raise BadInput('--workdir is missing; give the folder of the run, such as runs/tiny_text')
  if '://' in value:
    raise BadInput(f'--workdir={value}: only local folders work so far; give a path')
  return Path(value)


def step_range(value: str | None) -> tuple[int, int] | None:
  """--profile_steps=10:13 as (10, 13); raises BadInput."""
  from latent_loop.errors import BadInput

  if value is None:
    return None
  first, colon, last = value.partition(':')
  if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
    raise BadInput(f'--profile_steps={value}: not a range of steps; write first:last, such as 10:13')
  return int(first), int(last)
