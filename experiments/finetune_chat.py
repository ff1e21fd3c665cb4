"""Does a pretrained model answer once it has read conversations? Only the assistant's words are targets.

320 short conversations (experiments/chats.jsonl: sums, counting, repeating, the alphabet), from a trained tiny_text:
  python -m launch.train --config=experiments/finetune_chat.py --init_from=runs/tiny_text --workdir=runs/finetune_chat
  echo 'say loop twice' | python -m launch.generate --workdir=runs/finetune_chat --chat
An imported checkpoint begins it as well: --init_from=DIR of launch.convert from_hf, with config.model set as there.
Your own conversations: --config.data.paths="('chats/*.jsonl',)".
"""

from experiments.tiny_text import get_config as tiny_text


def get_config():
  config = tiny_text()
  config.name = 'finetune_chat'
  data = config.data
  data.source, data.paths, data.packing = 'chat', ('experiments/chats.jsonl',), 'best_fit'
  data.validation_fraction = 0.1
  optim = config.optim
  optim.learning_rate, optim.adam_learning_rate, optim.warmup_steps = 5e-3, 2e-3, 10
  config.train.num_steps = 100
  config.checkpoint.every_steps, config.eval.every_steps, config.eval.num_batches = 50, 50, 1
  config.eval.sample_tokens = 40
  return config
