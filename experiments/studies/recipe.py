"""Why the recipe is what it is: one thing changed at a time, on a small model and real text.

python -m launch.study --study=experiments/studies/recipe.py --workdir=runs/recipe
python -m launch.figure study --run=runs/recipe --output=experiments/results/study_recipe
"""

from experiments.tiny_text import get_config

DEPTHS = (1, 2, 4, 8, 16, 32, 64)

_CHANGES = {
  'recipe': {},
  'pre_norm': {'model.block': 'pre_norm'},
  'add': {'model.injection': 'add'},
  'diagonal': {'model.injection': 'diagonal'},
  'zero_state': {'model.state_init': 'zero'},
  'fixed_depth': {'depth.kind': 'fixed'},
  'k1': {'depth.backprop_depth': 1},
  'k8': {'depth.backprop_depth': 8},
  # Through every iteration: with a random depth, the deeper half of the draws has more than the 8 above.
  'full_backprop_fixed_depth': {'depth.kind': 'fixed', 'depth.backprop_depth': 8},
}


def get_variants():
  variants = {}
  for name, changes in _CHANGES.items():
    config = get_config()
    config.name = 'recipe'
    config.model.width, config.model.mlp_dim = 64, 192
    config.data.seq_len, config.train.loss_chunk, config.train.num_steps = 64, 64, 300
    config.checkpoint.every_steps = config.eval.every_steps = 300
    config.eval.sample_tokens = 0
    config.update_from_flattened_dict(changes)
    variants[name] = config
  return variants
