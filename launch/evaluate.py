"""Evaluates a run by depth: python -m launch.evaluate depths --workdir=runs/tiny_text [--depths=1 --depths=8]"""

from absl import flags

from launch import program

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a training run')
_DEPTHS = flags.DEFINE_multi_integer('depths', None, 'test-time depth; repeat for more; default 1, 2, 4 .. 4 x mean')


def main(verb: str) -> int:
  from latent_loop import data, trained
  from latent_loop.evals import depth as depth_eval

  del verb  # there is one so far
  workdir = program.workdir_of(_WORKDIR.value)
  model = trained.load(workdir)
  mean = model.config.depth.mean
  # The report always shows 1, the mean and 4 times the mean.
  asked = depth_eval.check_depths(tuple(_DEPTHS.value)) if _DEPTHS.value else depth_eval.default_depths(mean)
  depths = tuple(sorted({*asked, 1, mean, 4 * mean}))
  source = data.make_source(model.config)
  evaluator = trained.make_evaluator(model.config, model.model, model.mesh, source, depths)
  numbers = evaluator(model.params, model.step)
  paths = trained.write_depth_report(model, workdir, numbers)
  print('\n'.join(depth_eval.table(numbers)))
  print('wrote ' + ' '.join(map(str, paths)))
  return 0


if __name__ == '__main__':
  program.run(main, verbs=('depths',))
