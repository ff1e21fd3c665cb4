"""Language modelling by depth: a looped model against its own layers run once, and against as many FLOPs run once.

python -m launch.study --study=experiments/studies/language.py --workdir=runs/language
python -m launch.figure study --run=runs/language --output=experiments/results/study_language

On the corpus of launch/prepare_small_text.sh. same_params: its layers, each run once, with as many tokens, and
(same_params_longer) with as many training FLOPs. same_flops: as many FLOPs per token in distinct layers, six times the
parameters of the loop's core, with as many tokens and so as many FLOPs.
"""

from experiments.small_text import get_config

DEPTHS = (1, 2, 4, 8, 16, 32, 64)
_STEPS, _LONGER = 300, 774


def get_variants():
  loop, same_params, longer, same_flops = (_small() for _ in range(4))
  for config in (same_params, longer, same_flops):
    config.depth.kind, config.depth.mean, config.depth.backprop_depth = 'fixed', 1, 1
  longer.train.num_steps = _LONGER
  same_flops.model.num_core_layers, same_flops.model.mlp_dim = 12, 380
  return {'loop': loop, 'same_params': same_params, 'same_params_longer': longer, 'same_flops': same_flops}


def _small():
  config = get_config()
  config.name = 'language'
  config.model.width, config.model.mlp_dim = 128, 384
  config.data.seq_len, config.train.loss_chunk, config.train.num_steps = 128, 128, _STEPS
  config.checkpoint.every_steps = config.eval.every_steps = 300
  config.eval.num_batches, config.eval.sample_tokens = 16, 0
  return config
