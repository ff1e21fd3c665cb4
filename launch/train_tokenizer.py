"""Trains a byte-level BPE: python -m launch.train_tokenizer --input='docs/**/*.md' --output=tokenizer.json

The preset of arXiv 2502.05171: digits and punctuation isolated, 36 special tokens at the top, a chat template in
tokenizer_config.json beside the output. Reads what launch.prepare_data reads.
"""

from absl import flags

from latent_loop.exit_codes import DONE
from launch import program

_INPUT = flags.DEFINE_multi_string('input', None, 'glob, file or folder to read; repeat for more')
_VOCAB_SIZE = flags.DEFINE_integer('vocab_size', 4096, 'tokens in all, the 256 bytes and 36 special tokens included')
_OUTPUT = flags.DEFINE_string('output', None, 'the tokenizer.json to write')
_TEXT_KEY = flags.DEFINE_string('text_key', 'text', 'the key of .jsonl, or column of .parquet, that holds the text')

_SAMPLE_BYTES = flags.DEFINE_integer('sample_bytes', 2**28, 'about how much of the input to train on', lower_bound=1)


def main() -> int:
  from latent_loop.errors import BadInput
  from latent_loop.prepare import vocabulary

  if not (_INPUT.value and _OUTPUT.value):
    raise BadInput('--input and --output are needed: what to read, and the tokenizer.json to write')
  say = lambda line: print(line, flush=True)
  vocabulary.train(
    _INPUT.value,
    _VOCAB_SIZE.value,
    program.local_path_of('--output', _OUTPUT.value),
    _TEXT_KEY.value,
    _SAMPLE_BYTES.value,
    say,
  )
  return DONE


if __name__ == '__main__':
  program.run(main)
