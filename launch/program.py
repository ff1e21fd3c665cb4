"""What every program shares: flags in, exit code out, and bad input as one sentence."""

import contextlib
import os
import re
import resource
import select
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from latent_loop.exit_codes import BAD_INPUT, BUG, SAVE_FAILED
from launch import xla_flags


def run(main: Callable[..., int], verbs: tuple[str, ...] = ()) -> None:
  """Parses flags and ends the process with the exit code of main(), or of main(verb) for a program with verbs.

  Bad flags, config keys and BadInput: a sentence and code 2; SaveFailed: a sentence and 13; an object store that
  fails: one of the two. A reader of standard output that leaves early, as head does: a sentence and 1. Anything else
  unforeseen: a traceback and 1.
  """
  xla_flags.forget_absent_tpus()
  _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  with contextlib.suppress(OSError, ValueError):  # as many open files as may be: data may have thousands of shards
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
  if sys.stdout is None:  # closed by whoever started this
    sys.stdout = open(os.devnull, 'w')
  sys.stdout.reconfigure(errors='backslashreplace')  # a name of a file that is not UTF-8 can be printed too
  app.run(lambda argv: _end(*_guard(lambda: main(*_verb(argv[1:], verbs)))), flags_parser=_parse)


def _verb(rest: list[str], verbs: tuple[str, ...]) -> list[str]:
  from latent_loop.errors import BadInput

  if verbs and (len(rest) != 1 or rest[0] not in verbs):
    raise BadInput(f'{" ".join(rest) or "no verb"}: this program takes one of the verbs {", ".join(verbs)}')
  if rest and not verbs:
    raise BadInput(f'{" ".join(rest)!r} belongs to no flag; put quotes around a value with spaces, as in --flag="a b"')
  return rest


_HELP_OF_CONFIG = """
  --config: experiment file, such as experiments/tiny_text.py
  --config.KEY=VALUE: any of its keys, such as --config.optim.learning_rate=5e-3; latent_loop/config/ has them all"""


def _parse(argv: list[str]) -> list[str]:
  from latent_loop.errors import BadInput
  from latent_loop.sealing import check_key

  if {'--help', '-help', '-h', '--helpfull', '--helpshort'} & set(argv[1:]):
    shared = [_HELP_OF_CONFIG] if 'config' in flags.FLAGS else []
    shared += [flags.FLAGS.module_help('launch.hosts')] if 'cluster' in flags.FLAGS else []
    print('\n'.join([sys.modules['__main__'].__doc__, flags.FLAGS.main_module_help(), *shared]))
    sys.exit(0)
  try:
    for arg in argv[1:]:
      if arg.startswith('--config.'):  # ml_collections would not say which key it does not know
        check_key(arg.removeprefix('--config.').partition('=')[0])
    # ml_collections cannot turn a number into None; `sealed` does.
    _NONE.extend(arg.removeprefix('--config.')[: -len('=None')] for arg in argv if _sets_none(arg))
    rest = flags.FLAGS([arg for arg in argv if not _sets_none(arg)])
  except BadInput as error:
    _refuse(str(error))
  except OSError:
    _refuse(_missing_config())
  except (Exception, SystemExit) as error:  # an experiment file is a program of the user's, and may raise anything
    cause = _raised_by_experiment(error)
    if isinstance(cause, flags.Error):
      _refuse(f'{_in_rules(_one_line(cause))}; see python -m launch.{Path(argv[0]).stem} --help')
    if isinstance(cause, BadInput):
      _refuse(f'--config={_config_path()}: {cause}')
    _refuse(f'--config={_config_path()}: it does not run ({type(cause).__name__}: {_one_line(cause)}); correct it')
  if flags.FLAGS['verbosity'].using_default_value:
    logging.set_verbosity(logging.FATAL)  # the libraries' chatter and tracebacks; --verbosity=0 brings them back
  return rest


def _raised_by_experiment(error: BaseException) -> BaseException:
  """What an experiment file raised: ml_collections and absl each wrap a ValueError or TypeError, traceback included."""
  while 'Error whilst parsing config file' in str(error):
    error = error.__cause__ or error.__context__
  return error


# How Python says that a value is of another type, and the rule that it stands for.
_RULES = {
  'invalid literal for int()': 'a whole number',
  'could not convert string to float': 'a number',
  "('Non-boolean argument": 'true or false',
}


def _in_rules(sentence: str) -> str:
  """What absl says of a flag, with the rule in place of Python's words."""
  for words, rule in _RULES.items():
    flag, found, _ = sentence.partition(f': {words}')
    if found:
      name = flag.removeprefix('flag --').partition('=')[0]
      many = isinstance(flags.FLAGS[name], flags.MultiFlag)
      return f'{flag}: not {rule}' + f'; for more than one repeat the flag: --{name}=... --{name}=...' * many
  return sentence


_NONE: list[str] = []  # keys that the command line sets to None


def _sets_none(arg: str) -> bool:
  return arg.startswith('--config.') and arg.endswith('=None')


def _guard(main: Callable[[], int]) -> tuple[int, str]:
  """(exit code, what to say on stderr) of main()."""
  from latent_loop.errors import BadInput, SaveFailed, StoreFault

  try:
    code = main()
    sys.stdout.flush()
    return code, ''
  except BadInput as error:
    return BAD_INPUT, f'error: {_printable(error)}'
  except StoreFault as error:
    advice = 'check the name of the bucket, the credentials and the network, then start the same command again'
    return SAVE_FAILED if error.writing else BAD_INPUT, f'error: {_printable(error)}; {advice}'
  except SaveFailed as error:
    return SAVE_FAILED, f'error: {_printable(error)}'
  except Exception as error:  # the one place: an unforeseen error must still leave with its own exit code
    if isinstance(error, BrokenPipeError) and _reader_left():
      return BUG, 'error: what reads the output left before its end; what this program writes to files may be missing'
    if _out_of_memory(error):
      return BAD_INPUT, f'error: out of memory ({_one_line(error)[:300]}); {_SMALLER}'
    return BUG, traceback.format_exc()


def _reader_left() -> bool:
  """Whether nobody reads standard output any more; what is still to be written there goes nowhere then."""
  out = select.poll()
  out.register(sys.stdout.fileno(), 0)
  left = any(event & select.POLLERR for _, event in out.poll(0))
  if left:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return left


def _out_of_memory(error: Exception) -> bool:
  """Python's own, or how XLA says it."""
  text = str(error)
  return isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in text and 'memory' in text


_SMALLER = 'ask for less: a smaller batch, length or model, more microbatches or more devices'


_LEAVE: list[Callable[[int], None]] = []


def leave_by(leave: Callable[[int], None]) -> None:
  """From now on this process is one of many: it calls leave(exit code), and waits for no other, before it ends."""
  _LEAVE.append(leave)


def _end(code: int, message: str) -> None:
  for leave in _LEAVE:
    leave(code)
  if message:
    print(message.rstrip(), file=sys.stderr, flush=True)
  if _LEAVE:
    sys.stdout.flush()
    os._exit(code)  # an ordinary exit waits for threads, and those may wait for a process that is gone
  sys.exit(code)


def _refuse(sentence: str) -> None:
  print(f'error: {_printable(sentence)}', file=sys.stderr, flush=True)
  sys.exit(BAD_INPUT)


def _printable(sentence: object) -> str:
  """One line, whatever the names and values in it hold: line breaks, what a terminal obeys, no UTF-8."""
  return ''.join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(sentence))


def _one_line(error: BaseException) -> str:
  return ' '.join(str(error).split()).rstrip('.')


def define_config() -> flags.FlagHolder:
  return config_flags.DEFINE_config_file(
    'config', None, 'experiment file, such as experiments/tiny_text.py', lock_config=True
  )


def sealed(holder: flags.FlagHolder):
  """The frozen Config of --config with its overrides; raises BadInput."""
  from latent_loop import sealing
  from latent_loop.errors import BadInput

  try:
    values = holder.value
    if values is None and not _config_path():
      raise BadInput('--config is missing; give an experiment file such as experiments/tiny_text.py')
    if not hasattr(values, 'ignore_type'):  # as a ConfigDict has; of a file that is missing, the question raises
      raise BadInput(
        f'--config={_config_path()}: get_config() returns a {type(values).__name__}; the rule is a ConfigDict, '
        'return latent_loop.sealing.view(Config()) with your changes'
      )
    for dotted in _NONE:
      *groups, name = dotted.split('.')
      group = values
      for part in groups:
        group = group[part]
      with group.ignore_type():
        group[name] = None
    return sealing.seal(values)
  except OSError as error:  # ml_collections notices a missing file at the first access
    raise BadInput(_missing_config()) from error


def _missing_config() -> str:
  path = _config_path()
  if os.path.isfile(path):
    return f'--config={path}: it reads a file that is missing or cannot be read; correct it'
  return f'--config={path}: no such file; give one of experiments/*.py'


def _config_path() -> str:
  """What --config names; '' when it is not given."""
  for i, arg in enumerate(sys.argv):
    flag, _, value = arg.lstrip('-').partition('=')
    if arg.startswith('-') and flag == 'config':
      return value or ''.join(sys.argv[i + 1 : i + 2])
  return ''


def workdir_of(value: str | None, flag: str = '--workdir'):
  """--workdir as a path, also of an object store; raises BadInput when it is missing or no such path."""
  from latent_loop import storage
  from latent_loop.errors import BadInput

  if not value:
    raise BadInput(f'{flag} is missing; give the folder of the run, such as runs/tiny_text')
  watch_stores()
  place = storage.path(value, flag)
  return path_of(flag, value) if storage.is_local(place) else place


def watch_stores() -> None:
  """How this process deals with object stores; to be called before it names one."""
  # A connection on which nothing comes for so long counts as broken; TensorStore would wait for ever.
  os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS', '30')
  os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES', '1')
  os.environ.setdefault('TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS', '30')
  os.environ['EPATH_USE_TF'] = 'false'  # or etils takes an installed TensorFlow for gs://, and not latent_loop/storage


def keep_compiled() -> None:
  """The next start finds what this one compiles, in JAX_COMPILATION_CACHE_DIR or under ~/.cache/latent_loop.

  Nothing is kept where neither can be: no variable, and no home that can be written.
  """
  from latent_loop import compiled

  named, home = os.environ.get('JAX_COMPILATION_CACHE_DIR'), os.path.expanduser('~')
  if named or os.access(home, os.W_OK):
    compiled.keep(named or f'{home}/.cache/latent_loop/{compiled.machine(os.environ.get("NPROC"))}')


def path_of(flag: str, value: str) -> Path:
  """The value of a flag as a path; raises BadInput for one that no file can have, such as a name that is too long."""
  from latent_loop.errors import BadInput

  try:
    Path(value).exists()
  except OSError as error:
    raise BadInput(f'{flag}={value[:80]}: no file can be there ({error.strerror}); give another path') from error
  return Path(value)


def local_path_of(flag: str, value: str) -> Path:
  """As `path_of`, for what is written to local folders only; raises BadInput for a URL."""
  from latent_loop.errors import BadInput

  if '://' in value:
    raise BadInput(f'{flag}={value}: written to local folders only; give one, and copy what is there to the store')
  return path_of(flag, value)


def loader(workdir: str | None, hf: str | None, tensor: int) -> Callable:
  """() -> (the model of --workdir or --hf on the devices, its tokenizer).

  Raises BadInput, at once where both or none are given.
  """
  from latent_loop.errors import BadInput

  if workdir is not None and hf is not None:
    raise BadInput(f'--workdir={workdir} and --hf={hf}: two models; give one of them')
  place = workdir_of(workdir) if hf is None else path_of('--hf', hf)

  def load():
    import jax

    from latent_loop import trained
    from latent_loop.interop import from_hf

    if jax.device_count() % tensor:
      raise BadInput(
        f'--tensor={tensor}: so many devices share each layer, and the {jax.device_count()} here make no whole number '
        'of such groups; give a divisor'
      )
    model = (trained.load if hf is None else from_hf.load)(place, tensor)
    tokenizer = trained.tokenizer_of(model.config)
    if tokenizer is None:
      again = 'in the --hf folder that it was made from, and make it again' if hf is None else 'there'
      raise BadInput(
        f'{place}: its text is bytes and their begin, 257 token ids, and {model.config.model.vocab_size} are known; '
        f'put its own tokenizer.json {again}'
      )
    return model, tokenizer

  return load


def step_range(value: str | None) -> tuple[int, int] | None:
  """--profile_steps=10:13 as (10, 13); raises BadInput."""
  from latent_loop.errors import BadInput

  if value is None:
    return None
  found = re.fullmatch('([0-9]{1,15}):([0-9]{1,15})', value)
  if not found or int(found[1]) >= int(found[2]):
    raise BadInput(f'--profile_steps={value}: not a range of steps; write first:last, such as 10:13')
  return int(found[1]), int(found[2])
