"""Evaluates a run by depth: python -m launch.evaluate depths --workdir=runs/tiny_text [--depths=1 --depths=8]

exits: what each rule for stopping early saves and costs, up to one depth, and at which depths tokens of each kind, each
difficulty of a task or each folder of a mixture leave: ... exits --workdir=runs/tiny_text [--target_depth=4]

difficulties: whole answers of a task by difficulty and depth: ... difficulties --workdir=runs/tiny_task --difficulty=9
"""

import math

from absl import flags

from launch import program

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a training run')
_DEPTHS = flags.DEFINE_multi_integer(
  'depths',
  None,
  'test-time depth; repeat for more; default 1, 2, 4 .. 4 x mean; depths: 1, the mean and 4 x mean are always added; '
  'exits: one, default the mean',
)
_DIFFICULTIES = flags.DEFINE_multi_integer(
  'difficulty',
  None,
  'of a task; repeat for more; default the hardest of training, 1.5 times and twice that; exits: all of training',
  1,
)
_TARGET = flags.DEFINE_float('target_depth', None, 'exits: also the rules that keep to this mean depth', 1)


def main(verb: str) -> int:
  from latent_loop import data, trained

  program.keep_compiled()
  workdir = program.workdir_of(_WORKDIR.value)
  model = trained.load(workdir)
  source = data.make_source(model.config)
  return {'depths': _by_depth, 'exits': _by_exit_rule, 'difficulties': _by_difficulty}[verb](workdir, model, source)


def _by_depth(workdir, model, source) -> int:
  from latent_loop import trained
  from latent_loop.evals import depth as depth_eval

  mean = model.config.depth.mean
  # The report always shows 1, the mean and 4 times the mean.
  asked = depth_eval.check_depths(tuple(_DEPTHS.value), mean) if _DEPTHS.value else depth_eval.default_depths(mean)
  depths = tuple(sorted({*asked, 1, mean, 4 * mean}))
  evaluator = trained.make_evaluator(model.config, model.model, model.mesh, source, depths)
  numbers = evaluator(model.params, model.step)
  paths = trained.write_depth_report(model, workdir, numbers)
  print('\n'.join(depth_eval.table(numbers)))
  print('wrote ' + ' '.join(map(str, paths)))
  return 0


def _by_exit_rule(workdir, model, source) -> int:
  from latent_loop import calibration
  from latent_loop.errors import BadInput
  from latent_loop.evals import depth as depth_eval
  from latent_loop.evals import exits as exit_eval

  mean = model.config.depth.mean
  depths = depth_eval.check_depths(tuple(_DEPTHS.value or [mean]), mean)
  if _TARGET.value is not None and not math.isfinite(_TARGET.value):
    raise BadInput(f'--target_depth={_TARGET.value}: not a depth; give a number from 1')
  if len(depths) > 1:
    raise BadInput(f'--depths={list(depths)}: exits are counted up to one depth; give one')
  path, numbers = calibration.write_exits(model, workdir, source, depths[0], _TARGET.value, _DIFFICULTIES.value or ())
  print('\n'.join(exit_eval.table(numbers)))
  print(f'wrote {path}')
  return 0


def _by_difficulty(workdir, model, source) -> int:
  import json

  from latent_loop import difficulty
  from latent_loop.evals import depth as depth_eval

  mean = model.config.depth.mean
  depths = depth_eval.check_depths(tuple(_DEPTHS.value), mean) if _DEPTHS.value else depth_eval.default_depths(mean)
  asked = _DIFFICULTIES.value or difficulty.default_difficulties(model.config.data)
  path = difficulty.write(model, workdir, asked, depths)
  print('\n'.join(difficulty.table(json.loads(path.read_text()))))
  print(f'wrote {path}')
  return 0


if __name__ == '__main__':
  program.run(main, verbs=('depths', 'exits', 'difficulties'))
