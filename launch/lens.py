"""What a model thinks on its way: python -m launch.lens --workdir=runs/tiny_text --prompt='def ' --output=lens.html

One HTML file that needs no network: the prediction after every iteration of every token, and how the states move.
"""

from absl import flags

from launch import program

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a training run')
_PROMPT = flags.DEFINE_string('prompt', None, 'text to look at, up to 511 bytes')
_DEPTH = flags.DEFINE_integer('depth', None, 'iterations to show; default: 4 times the mean depth in training')
_SEED = flags.DEFINE_integer('seed', 0, 'seed of the initial states, as in launch.generate')
_OUTPUT = flags.DEFINE_string('output', 'lens.html', 'the HTML file to write')


def main() -> int:
  from latent_loop.errors import BadInput

  workdir, output = program.workdir_of(_WORKDIR.value), program.path_of('--output', _OUTPUT.value)
  if not _PROMPT.value:
    raise BadInput('--prompt is missing or empty; give a text to look at, such as --prompt="def "')
  if output.is_dir() or not output.parent.is_dir():
    raise BadInput(f'--output={output}: not a file in a folder that exists; give one, such as lens.html')
  from latent_loop import data, trained
  from latent_loop.evals import lens
  from latent_loop.inference.text import request_of
  from latent_loop.report import lens as page

  program.keep_compiled()
  model = trained.load(workdir)
  depth = 4 * model.config.depth.mean if _DEPTH.value is None else _DEPTH.value
  tokenizer = data.make_tokenizer(model.config.data)
  if tokenizer.fingerprint != 'bytes':
    raise BadInput(f'--workdir={workdir}: its tokens are not bytes, and the lens can show no others so far')
  request = request_of(tokenizer, _PROMPT.value, depth=depth, seed=_SEED.value)
  seen = lens.look(model.model, model.params, request)
  about = {'name': model.config.name, 'step': model.step, 'mean_depth': model.config.depth.mean}
  numbers = lens.summarize(seen, request, about)
  try:
    page.write(output, numbers)
  except OSError as error:
    raise BadInput(f'--output={output}: cannot be written ({error.strerror}); give another file') from error
  print(page.summary(numbers))
  print(f'wrote {output}')
  return 0


if __name__ == '__main__':
  program.run(main)
