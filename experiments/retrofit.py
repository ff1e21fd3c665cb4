"""Does a plain decoder gain from a loop that it was not trained with? Depth grows from 1 to 8 while it trains on.

Begin with a trained plain_text, exported as its file says:
  python -m launch.convert retrofit --hf=runs/plain_llama --output=runs/retrofitted --layers=0/1-2/3
  python -m launch.train --config=experiments/retrofit.py --init_from=runs/retrofitted --workdir=runs/retrofit
The control trains on as long without a loop, at the same learning rate:
  python -m launch.train --config=experiments/plain_text.py --init_from=runs/plain_text --workdir=runs/plain_more
    --config.train.num_steps=300 --config.optim.learning_rate=5e-3 --config.optim.adam_learning_rate=2e-3
Seen (experiments/results/retrofit_cpu.jsonl): no. All depths from 4 on come within 0.01 nats of the control, no lower,
after 300 steps as after 1000; depth 1 falls behind.
"""

from experiments.plain_text import get_config as plain_text


def get_config():
  config = plain_text()
  config.name = 'retrofit'
  config.model.injection, config.model.state_init = 'linear', 'truncated_normal'
  depth = config.depth
  depth.kind, depth.mean, depth.backprop_depth = 'poisson_lognormal', 8, 4
  depth.curriculum, depth.curriculum_steps = 'linear', 150
  config.optim.learning_rate, config.optim.adam_learning_rate = 5e-3, 2e-3
  config.train.num_steps = 300
  config.checkpoint.every_steps, config.eval.every_steps = 100, 100
  return config
