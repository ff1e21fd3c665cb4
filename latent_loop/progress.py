"""How a run is told: lines on the console, the writers of metrics, profiles."""

import math
import time
from typing import Any

import jax

from latent_loop import storage
from latent_loop.config import Config
from latent_loop.data.pipeline import Batches
from latent_loop.errors import BadInput
from latent_loop.metrics import make_writers
from latent_loop.model import Model, cost
from latent_loop.parallel import chips
from latent_loop.parallel.group import Alone, Group
from latent_loop.sealing import fingerprint
from latent_loop.storage import Path
from latent_loop.trust import alarms
from latent_loop.trust.rollback import Trouble
from latent_loop.trust.watchdog import Watchdog


def say(line: str) -> None:
  """One line to the console, from process 0 alone."""
  if jax.process_index() == 0:
    print(line, flush=True)


class Profiler:
  """Traces the steps from `steps[0]` up to, not including, `steps[1]` with jax.profiler, under workdir/profile.

  Of many processes the first one traces: its devices do what all do.
  """

  def __init__(self, workdir: Path, first: int, last: int, steps: tuple[int, int] | None):
    if steps:
      flag = f'--profile_steps={steps[0]}:{steps[1]}'
      if not 0 <= steps[0] < steps[1] <= last:
        raise BadInput(f'{flag} lies outside the steps of the run, 0:{last}; choose a range inside')
      storage.local_only(workdir, '--profile_steps')
      if steps[0] < first:  # the same command again, after a stop: refused, it would never go on
        say(f'{flag}: step {steps[0]} is done already, so this start writes no profile')
        steps = None
    self._steps = steps if jax.process_index() == 0 else None
    self._folder, self._tracing = workdir / 'profile', False

  def __enter__(self) -> 'Profiler':
    return self

  def before(self, step: int, state: Any) -> None:
    """Starts or stops the trace ahead of `step`, once `state`, what the step before it makes, is there."""
    if self._steps and step in self._steps:
      jax.block_until_ready(state)
    if self._steps and step == self._steps[0] and not self._tracing:  # a run may roll back to it
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # it walks the stacks of threads that may be ending: a trace killed a test so
      jax.profiler.start_trace(str(self._folder), profiler_options=options)
      self._tracing = True
    elif self._steps and step == self._steps[1] and self._tracing:
      self._stop()

  def _stop(self) -> None:
    jax.profiler.stop_trace()
    self._tracing = False
    say(f'wrote a profile to {self._folder}')

  def __exit__(self, *exception: object) -> None:
    if self._tracing:
      self._stop()


class Logger:
  """Reads the metrics of a step while the next one runs, and writes them every log interval.

  Reading one step late also bounds the steps in flight: more than about 32 with a collective deadlock
  on virtual CPU devices.
  """

  def __init__(
    self,
    config: Config,
    model: Model,
    workdir: Path,
    batches: Batches,
    start: int,
    began: float,
    watch: Watchdog,
    group: Group | Alone,
  ):
    """start: the step to do next. began: time.perf_counter() at the start of the program's work."""
    self._config, self._batches, self._began, self._watch, self._group = config, batches, began, watch, group
    self._workdir = workdir
    self._cost = cost.count(model, config.data.seq_len)
    self._writers = make_writers(config.log, workdir, start) if jax.process_index() == 0 else []
    self._pending: tuple | None = None
    self.failed: dict[str, Any] | None = None  # the numbers of the step that must be the last
    self.alarms: list[Trouble] = []  # that nobody has said yet
    self._first = True
    self.restart_clock()
    self._peak = chips.peak_flops(jax.devices())

  def __enter__(self) -> 'Logger':
    return self

  def take(self, step: int, metrics: dict[str, jax.Array], wait_secs: float) -> None:
    """Takes this step's metrics and handles those of the step before."""
    self._wait_secs += wait_secs
    self.flush()
    self._pending = (step, metrics)

  def flush(self) -> None:
    """Handles the pending step; sets `failed` when the run must not go on."""
    if self._pending is None or self.failed:
      return
    (step, metrics), self._pending = self._pending, None
    values = {'step': step, **{name: value.item() for name, value in jax.device_get(metrics).items()}}
    slow = self._watch.step_done(values['n'], values.pop('next_n'))
    if slow:
      say(f'step {step}: {slow}')
    self._steps += 1
    self._flops += self._cost.train(values['n'], values['k'])
    if values['skipped_in_row']:
      self._report_skip(values)
    if values['skipped_in_row'] >= self._config.guard.max_skips_in_row or not math.isfinite(values['param_norm']):
      self.failed = values
    if step % self._config.guard.cross_check_steps == 0:
      self._group.check(step, self._facts(values))
    if step % self._config.log.every_steps == 0 or step == self._config.train.num_steps:
      self._write(step, values)
    elif self._first:
      self.restart_clock()  # the first step was compiled
    if self._first:
      say(f'first step done {time.perf_counter() - self._began:.1f} s after the start, compiling included')
    self._first = False

  def go_back(self, step: int) -> None:
    """Forgets what came after `step`, in the files as well: the run does it again."""
    self._pending, self.failed, self.alarms = None, None, []
    for writer in self._writers:
      writer.close()
    self._writers = make_writers(self._config.log, self._workdir, step) if self._writers else []
    self.restart_clock()

  def sync(self) -> None:
    """Returns when all lines that were logged are where others read them."""
    for writer in self._writers:
      writer.sync()

  def _report_skip(self, values: dict[str, Any]) -> None:
    say(
      f'step {values["step"]}: loss {values["loss"]}, gradient norm {values["grad_norm"]} at depth '
      f'{values["n"]}+{values["k"]}, batch {self._batches.hash(values["step"] - 1)}: not finite, so the update was '
      f'skipped ({values["skipped_in_row"]} in a row, {values["skipped"]} in all)'
    )

  def _facts(self, values: dict[str, Any]) -> dict[str, str]:
    """What must be equal on all processes after a step."""
    depth, batch = f'{values["n"]}+{values["k"]}', self._batches.hash(values['step'] - 1)
    return {'the depth drawn': depth, 'the hash of the batch': batch, 'the config': fingerprint(self._config)}

  def _write(self, step: int, values: dict[str, Any]) -> None:
    config = self._config
    secs = time.perf_counter() - self._since
    tokens = config.train.batch_size * config.data.seq_len
    alarm = alarms.loss_too_high(step, step * tokens, values['loss'], config.guard)
    self.alarms += [Trouble(step, step, alarm)] if alarm else []
    values['tokens_per_second'] = self._steps * tokens / secs
    values['data_wait_seconds'] = self._wait_secs / self._steps
    values['slow_steps'] = self._watch.slow_steps
    values['batch_hash'] = self._batches.hash(step - 1)
    line = (
      f'step {step}/{config.train.num_steps}  loss {values["loss"]:.4f}  grad {values["grad_norm"]:.2f}  '
      f'lr {values["learning_rate"]:.2e}  depth {values["n"]}+{values["k"]}  {values["tokens_per_second"]:.0f} tok/s  '
      f'data wait {self._wait_secs / secs:.1%}'
    )
    if self._peak:
      values['mfu'] = self._flops * tokens / secs / self._peak
      line += f'  mfu {values["mfu"]:.1%}'
    left_secs = int((config.train.num_steps - step) * secs / self._steps)
    say(f'{line}  {left_secs // 60}m{left_secs % 60:02d}s left')
    for writer in self._writers:
      writer.write(step, {name: value for name, value in values.items() if name != 'step'})
    self.restart_clock()

  def restart_clock(self) -> None:
    """Speeds are measured from here: after a line is written, and after an evaluation, which is no training."""
    self._since, self._steps, self._wait_secs, self._flops = time.perf_counter(), 0, 0.0, 0.0

  def __exit__(self, *exception: object) -> None:
    for writer in self._writers:
      writer.close()
