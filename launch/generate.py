"""Continues prompts: python -m launch.generate --workdir=runs/tiny_text --prompt='def ' --depth=16"""

from absl import flags

from launch import program

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a training run')
_PROMPT = flags.DEFINE_string('prompt', None, 'text to continue')
_PROMPTS = flags.DEFINE_string('prompts', None, 'file with one prompt per line, instead of --prompt')
_DEPTH = flags.DEFINE_integer('depth', None, 'iterations of the core per token; default: the mean depth in training')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, '0 = greedy')
_SEED = flags.DEFINE_integer('seed', 0, 'seed of the initial state and of sampling')
_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 128, 'tokens to add at most')


def main() -> int:
  workdir, prompts = program.workdir_of(_WORKDIR.value), _prompts()
  from latent_loop import trained

  model = trained.load(workdir)
  depth = model.config.depth.mean if _DEPTH.value is None else _DEPTH.value
  texts = trained.sample(model, prompts, depth, _NEW_TOKENS.value, _TEMPERATURE.value, _SEED.value)
  for prompt, text in zip(prompts, texts, strict=True):
    print(prompt + text)
  return 0


def _prompts() -> list[str]:
  from latent_loop.errors import BadInput

  if (_PROMPT.value is None) == (_PROMPTS.value is None):
    raise BadInput('give either --prompt=TEXT or --prompts=FILE with one prompt per line')
  if _PROMPT.value is not None:
    return [_PROMPT.value]
  path = program.path_of('prompts', _PROMPTS.value)
  if not path.is_file():
    raise BadInput(f'--prompts={path}: no such file; give a text file with one prompt per line')
  try:
    prompts = path.read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise BadInput(f'--prompts={path}: cannot be read as UTF-8 text ({error}); correct the file') from error
  if not prompts:
    raise BadInput(f'--prompts={path}: an empty file; the rule is one prompt per line, write one')
  return prompts


if __name__ == '__main__':
  program.run(main)
