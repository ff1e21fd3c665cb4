"""How fast batches are made, against what the step of training reads, and how fast text is prepared, in what memory."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from latent_loop import benchmark, data
from latent_loop.benchmark import Effort, Line
from latent_loop.config import Config
from latent_loop.data.embedded_text import read_documents
from latent_loop.data.packing import Row
from latent_loop.data.pipeline import Batches
from latent_loop.data.prepared import PreparedRows
from latent_loop.errors import BadInput
from latent_loop.shards.records import RECORD_TOKENS

_SECS = 1.0  # of each timed call
_DOCUMENT_BYTES = 4000


class FarAway:
  """Prepared rows whose records lie `secs` away, one request for each, as in an object store that is mounted."""

  def __init__(self, rows: PreparedRows, secs: float):
    self._rows, self._secs, self.requests = rows, secs, 0

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Row:
    count = sum((b - 1) // RECORD_TOKENS - a // RECORD_TOKENS + 1 for a, b in self._rows.layout.spans(index))
    self.requests += count
    time.sleep(count * self._secs)
    return self._rows[index]


def batches(config: Config, read_millis: list[float], effort: Effort) -> Iterator[Line]:
  """Lines of making batches from the disk and from `read_millis` away; then the step of training; raises BadInput."""
  began = time.perf_counter()
  rows = data.make_source(config).rows('train')
  opened = time.perf_counter() - began
  if read_millis and not isinstance(rows, PreparedRows):
    raise BadInput(f'--read_millis: only prepared data of one path can be moved away, not {config.data.source}')
  disk = _line_of(config, rows, effort)
  yield {**disk, 'source': config.data.source, 'rows': len(rows), 'open_seconds': opened}
  for millis in read_millis:
    far = FarAway(rows, millis / 1000)
    line = _line_of(config, far, effort)
    yield {**line, 'read_milliseconds': millis}
  law = config.depth
  for line in benchmark.train(config, [(law.mean - law.backprop_depth, law.backprop_depth)], effort):
    if line['mode'] == 'train':
      yield {**line, 'loader_over_step': disk['tokens_per_second'] / line['tokens_per_second']}


def _line_of(config: Config, rows: data.Rows, effort: Effort) -> Line:
  size, tokens = config.train.batch_size, config.train.batch_size * config.data.seq_len
  threads, together = config.data.read_threads, config.data.documents == 'together'
  made, step, seconds, cpu = Batches(rows, config.seed, size, threads=threads, together=together), 0, [], 0.0
  for number in range(effort.rounds * effort.repeats + 1):
    start, cpu_start, first = time.perf_counter(), time.process_time(), step
    while time.perf_counter() < start + _SECS:
      made.batch(step)
      step += 1
    if number:  # the first one opens files
      seconds.append((time.perf_counter() - start) / (step - first))
      cpu += (time.process_time() - cpu_start) / (step - first)
  median = statistics.median(seconds)
  return {'mode': 'data', 'read_threads': config.data.read_threads, 'batch_milliseconds': 1000 * median,
          'tokens_per_second': tokens / median, 'tokens_per_second_per_core': tokens * len(seconds) / cpu}  # fmt: skip


def prepare(megabytes: list[int], tokenizer: str, processes: int, say: Callable[[str], None]) -> Iterator[Line]:
  """A line for each amount of text that launch.prepare_data prepares, in a process of its own; raises BadInput."""
  for size in megabytes:
    with tempfile.TemporaryDirectory(prefix='latent_loop_') as folder:
      say(f'writing {size} MB of text')
      num_bytes = _write_text(Path(folder) / 'in.jsonl', size * 10**6)
      flags = [f'--input={folder}/in.jsonl', f'--output={folder}/out', f'--tokenizer={tokenizer}']
      command = [sys.executable, '-m', 'launch.prepare_data', *flags, f'--processes={processes}']
      seconds, cpu, peak_kib = _usage_of(command)
      body = json.loads((Path(folder) / 'out' / 'manifest.json').read_text())
      tokens = sum(shard['tokens'] for shard in body['shards'])
      yield {'mode': 'prepare', 'megabytes': num_bytes / 1e6, 'tokenizer': tokenizer, 'processes': processes,
             'seconds': seconds, 'megabytes_per_second_per_core': num_bytes / 1e6 / cpu,
             'tokens_per_second_per_core': tokens / cpu, 'peak_mib_of_a_process': peak_kib / 1024}  # fmt: skip


# A new process inherits the peak of the one that starts it, and we are large: a small one stands between.
_MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""


def _usage_of(command: list[str]) -> tuple[float, float, int]:
  """(seconds, CPU seconds of all its processes, KiB of the largest at its peak); raises BadInput when it fails."""
  measured = subprocess.run([sys.executable, '-c', _MEASURE, *command], stdout=subprocess.PIPE, check=True)
  code, *usage = json.loads(measured.stdout)
  if code:
    raise BadInput(f'{" ".join(command[1:])}: ended with {code}; what it said stands above')
  return tuple(usage)


def _write_text(path: Path, num_bytes: int) -> int:
  """Documents of Python's library, each begun with its number, so that none is there twice; returns their bytes."""
  text, written = '\n'.join(text for _, text in read_documents()), 0
  starts = np.random.default_rng(0).integers(0, len(text) - _DOCUMENT_BYTES, 2**20)
  with path.open('w', encoding='utf-8') as file:
    for number in range(num_bytes):
      if written >= num_bytes:
        break
      start = int(starts[number % len(starts)])
      document = f'document {number}\n{text[start : start + _DOCUMENT_BYTES]}'
      file.write(json.dumps({'text': document}) + '\n')
      written += len(document)
  return written
