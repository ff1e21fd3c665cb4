"""Prepares text for training: python -m launch.prepare_data --input='docs/**/*.jsonl' --output=data/docs

Reads .txt, .md, source files, .jsonl (.gz, .zst), .parquet and .arrow; --input may be repeated, and a folder stands for
the text and source files under it, or is one that save_to_disk of Hugging Face's `datasets` wrote. A column of ready
token ids is taken as it is: --text_key=input_ids. Killed or stopped, start it again: it goes on where it was.
With --runner a Beam runner does the work, on machines that all see the input and the output folder. Beam needs an
environment of its own: bash launch/beam.sh --runner=DirectRunner ...
Train on the output with config.data.source='prepared'.
"""

import os

from absl import flags

from latent_loop.exit_codes import DONE, PREEMPTED
from launch import program

_INPUT = flags.DEFINE_multi_string('input', None, 'glob, file or folder to read; repeat for more')
_TOKENIZER = flags.DEFINE_string('tokenizer', 'bytes', 'bytes, or the path of a tokenizer.json')
_OUTPUT = flags.DEFINE_string('output', None, 'folder to write')
_TEXT_KEY = flags.DEFINE_string(
  'text_key', 'text', 'the key of .jsonl, or column of .parquet and .arrow, of text or token ids'
)
_INVALID_UTF8 = flags.DEFINE_enum(
  'invalid_utf8', 'error', ['error', 'drop'], 'what to do with a document that is not UTF-8: stop, or leave it out'
)
_VALIDATION = flags.DEFINE_float('validation_fraction', 0.01, 'share of the documents that is held out, by their hash')
_MIN_BYTES = flags.DEFINE_integer('min_bytes', 32, 'shorter documents are dropped', lower_bound=1)
_MAX_BYTES = flags.DEFINE_integer('max_bytes', 4 * 2**20, 'longer documents are dropped', lower_bound=1)
_FORMAT = flags.DEFINE_enum(
  'format', 'arrayrecord', ['arrayrecord', 'zarr3'], 'of the shards: one file each, or an array that other tools read'
)
_PROCESSES = flags.DEFINE_integer('processes', None, 'how many work at once; default: one for each core', lower_bound=1)

_RUNNER = flags.DEFINE_string('runner', 'local', 'local, or a Beam runner: DirectRunner, FlinkRunner, SparkRunner, ...')
_BEAM = flags.DEFINE_multi_string('beam', [], "an option of Beam's, such as --beam=--direct_num_workers=4; repeat")


def main() -> int:
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the processes are the parallelism
  from latent_loop.errors import BadInput
  from latent_loop.prepare import crew, filters, run

  if not (_INPUT.value and _OUTPUT.value):
    raise BadInput('--input and --output are needed: what to read, and the folder to write')
  if not 0 <= _VALIDATION.value < 1:
    raise BadInput(f'--validation_fraction={_VALIDATION.value}: not a share; give a number from 0 to below 1')
  if _MIN_BYTES.value > _MAX_BYTES.value:
    raise BadInput(
      f'--min_bytes={_MIN_BYTES.value} is above --max_bytes={_MAX_BYTES.value}, so all documents would be '
      'dropped; lower the first or raise the second'
    )
  request = run.Request(
    patterns=_INPUT.value,
    tokenizer=_TOKENIZER.value,
    output=program.local_path_of('--output', _OUTPUT.value),
    text_key=_TEXT_KEY.value,
    invalid_utf8=_INVALID_UTF8.value,
    validation_fraction=_VALIDATION.value,
    limits=filters.Limits(_MIN_BYTES.value, _MAX_BYTES.value),
    processes=_PROCESSES.value or os.cpu_count(),
    format=_FORMAT.value,
    runner=_RUNNER.value,
    beam_options=tuple(_BEAM.value),
  )
  say = lambda line: print(line, flush=True)
  try:
    found = run.prepare(request, say)
  except crew.Stopped as stopped:
    say(f'{stopped} done and kept; start the same command again to continue')
    return PREEMPTED
  for line in run.summary(found):
    say(line)
  say(f'{request.output} is ready')
  return DONE


if __name__ == '__main__':
  program.run(main)
