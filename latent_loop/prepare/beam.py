"""The same tasks as an Apache Beam pipeline, on any of its runners.

What passes through Beam is which task to do; tokens go from file to file, as on one machine. So every worker must see
the input and the output folder, and the files are those of a local run, whoever did which task and however often.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from latent_loop.errors import BadInput
from latent_loop.interrupt import StopRequest
from latent_loop.prepare import units
from latent_loop.prepare.crew import Stopped
from latent_loop.shards.records import settled


class Crew:
  """crew.Crew, by a Beam runner. options: Beam's own, such as '--direct_num_workers=4'."""

  def __init__(self, runner: str, options: tuple[str, ...], stop: StopRequest, say: Callable[[str], None]):
    self._runner, self._options, self._stop, self._say = runner, options, stop, say
    self._beam = _load(runner)

  def do(self, function: Callable, tasks: list[tuple], sizes: list[int], title: str) -> list:
    """function(*task) of every task, in order; a task is (what has a key, the work folder, ...).

    Raises what the first failing one raises, and Stopped.
    """
    self._say(f'{title}: {len(tasks)} parts, {self._runner}')
    with _pipeline_in_words(self._runner):
      from apache_beam.options.pipeline_options import PipelineOptions

      options = PipelineOptions([f'--runner={self._runner}', *self._options])
      with self._beam.Pipeline(options=options) as pipeline:
        todo = pipeline | 'tasks' >> self._beam.Create(tasks) | 'spread' >> self._beam.Reshuffle()
        _ = todo | title >> self._beam.Map(functools.partial(_do, function))
    if self._stop.requested():
      raise Stopped(f'stopped while {title}: {len(tasks)} of {len(tasks)} parts are')
    return [_result(part.key, work) for part, work, *_ in tasks]


def _load(runner: str) -> ModuleType:
  try:
    import apache_beam
  except ImportError as error:
    raise BadInput(
      f'--runner={runner}: Apache Beam is not installed here, and needs an environment of its own; start bash '
      'launch/beam.sh with the same flags'
    ) from error
  return apache_beam


@contextlib.contextmanager
def _pipeline_in_words(runner: str) -> Iterator[None]:
  try:
    yield
  except (ValueError, RuntimeError) as error:
    raise BadInput(
      f'--runner={runner}: the pipeline failed ({" ".join(str(error).split())[-500:]}); what is done is kept: correct '
      'the options of --beam or the cluster, then start the same command again'
    ) from error


def _do(function: Callable, task: tuple) -> None:
  """Runs on a worker. A fault that trying again would not mend is written down, since runners try again and again."""
  part, work, *_ = task
  try:
    function(*task)
    _fault_path(part.key, work).unlink(missing_ok=True)  # of an earlier try
  except (BadInput, OSError) as error:
    with settled(_fault_path(part.key, work)) as temporary:
      temporary.write_text(json.dumps([isinstance(error, BadInput), str(error)]))


def _fault_path(key: str, work: Path) -> Path:
  return work / f'{key}.fault'


def _result(key: str, work: Path) -> dict:
  """The mark that a worker left. Raises BadInput or OSError as the worker met it."""
  path = _fault_path(key, work)
  if path.exists():
    is_input, sentence = json.loads(path.read_text())
    path.unlink()
    raise BadInput(sentence) if is_input else OSError(sentence)
  try:
    return units.mark_of(work, key)
  except FileNotFoundError as error:
    raise BadInput(
      f'{work}: the workers left nothing here; give an --output, and inputs, on a disk that all of them see'
    ) from error
