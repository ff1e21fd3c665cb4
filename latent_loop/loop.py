"""The training loop: restore, then batch, step, log, save, evaluate; the only stateful file."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from latent_loop import data, trained
from latent_loop.checkpoint import Checkpoints
from latent_loop.config import Config
from latent_loop.data.pipeline import Batches
from latent_loop.errors import BadInput
from latent_loop.evals import depth as depth_eval
from latent_loop.interrupt import StopRequest
from latent_loop.kernels.choice import choose_attention
from latent_loop.metrics import JsonLines, make_writers
from latent_loop.model import Model, build, cost
from latent_loop.optim import make_optimizer
from latent_loop.parallel import chips
from latent_loop.parallel import mesh as meshes
from latent_loop.step import TrainState, make_sharded_state, make_train_step
from latent_loop.workdir import open_workdir, update_config

DONE, PREEMPTED, NON_FINITE = 0, 10, 11  # exit codes


@dataclasses.dataclass
class Run:
  """What a run needs at every step; made once by `prepare`."""

  config: Config
  workdir: Path
  mesh: Any
  model: Model
  source: data.Source
  batches: Batches
  train_step: Callable
  evaluator: Callable
  checkpoints: Checkpoints
  state: TrainState
  start: int  # the step to do next
  fingerprint: str
  began: float  # time.perf_counter() at the start


def prepare(config: Config, workdir: Path) -> Run:
  """Everything up to the first step, with the newest checkpoint restored; what it refuses, it leaves as it was."""
  began = time.perf_counter()
  mesh = meshes.make_mesh(config.mesh)
  meshes.check_batch(config.train.batch_size, config.train.num_microbatches, mesh.shape)
  choose_attention(config.model, config.data.seq_len, jax.default_backend())  # or a sentence why not
  source = data.make_source(config)
  mine = trained.rows_here(config.train.batch_size, mesh)
  batches = Batches(source.rows('train'), config.seed, config.train.batch_size, mine)
  fingerprint = f'{source.fingerprint}/{batches.order_hash()}'
  model = build(config.model, config.depth)
  optimizer = make_optimizer(config.optim, config.train.num_steps)
  init, specs = make_sharded_state(config, model, optimizer, mesh)
  open_workdir(workdir, config)
  checkpoints = Checkpoints(workdir, config.checkpoint)
  start, state = checkpoints.restore_newest(jax.eval_shape(init), specs, fingerprint) or (0, init())
  return Run(
    config=config,
    workdir=workdir,
    mesh=mesh,
    model=model,
    source=source,
    batches=batches,
    train_step=make_train_step(config, model, optimizer, mesh, specs),
    evaluator=trained.make_evaluator(config, model, mesh, source, depth_eval.default_depths(config.depth.mean)),
    checkpoints=checkpoints,
    state=state,
    start=start,
    fingerprint=fingerprint,
    began=began,
  )


def alone(step: int, wanted: bool) -> bool:
  """Whether a single process stops after `step`: as it wants."""
  return wanted


def run(
  config: Config,
  workdir: Path,
  profile_steps: tuple[int, int] | None = None,
  agree: Callable[[int, bool], bool] = alone,
) -> int:
  """Trains until config.train.num_steps and writes the depth report; returns the exit code.

  agree(step, wanted) -> whether all processes stop after this step, given whether this one wants to.
  Started again it goes on from the newest checkpoint, bit for bit as if it had never stopped.
  """
  this = prepare(config, workdir)
  if finished_before(this):
    return DONE
  total, key = config.train.num_steps, jax.random.key(config.seed)
  with this.checkpoints, StopRequest() as stop, Logger(this) as logger, Profiler(this, profile_steps) as profiler:
    for step in range(this.start, total):
      profiler.before(step)
      wait_start = time.perf_counter()
      batch = this.batches.batch(step)
      wait_secs = time.perf_counter() - wait_start
      this.state, metrics = this.train_step(this.state, trained.place(batch, this.mesh), key)
      logger.take(step + 1, metrics, batch.hash(), wait_secs)
      stopping, last = agree(step, stop.requested), step + 1 == total
      saving = stopping or last or (step + 1) % config.checkpoint.every_steps == 0
      if saving:  # look at this step's numbers first, and write them: a resume begins behind them
        logger.flush()
      if logger.non_finite:
        return NON_FINITE
      if saving:
        save(this, step + 1)
      if stopping and not last:
        this.checkpoints.wait()
        say(f'stopped at step {step + 1}, saved; start the same command again to continue')
        return PREEMPTED
      if (step + 1) % config.eval.every_steps == 0 and not last:
        logger.flush()
        evaluate(this, step + 1)
        logger.restart_clock()
  finish(this)
  return DONE


def finished_before(this: Run) -> bool:
  """Says where the run stands; True when there is nothing left to do."""
  total = this.config.train.num_steps
  if this.start:
    say(f'{this.workdir}: continuing at step {this.start} of {total}')
  files = ['depth_report.json', *(['samples.txt'] if this.config.eval.sample_tokens else [])]
  done = this.start >= total and all((this.workdir / name).exists() for name in files)
  if done:
    this.checkpoints.close()
    say(f'{this.workdir}: already finished; read depth_report.html there, or give another --workdir to train again')
  elif this.start:
    if jax.process_index() == 0:
      for line in update_config(this.workdir, this.config):
        say(f'changed since the run began: {line}')
  return done


def save(this: Run, step: int) -> None:
  meta = {'config': dataclasses.asdict(this.config), 'data_fingerprint': this.fingerprint}
  this.checkpoints.save(step, this.state, meta)


def evaluate(this: Run, step: int) -> dict[str, Any]:
  """Validation by depth: a line on the console, and one in evals.jsonl."""
  numbers = this.evaluator(this.state.averaged_params, step)
  mean = this.config.depth.mean
  losses = ', '.join(f'{numbers["loss_by_depth"][str(r)]:.4f} at depth {r}' for r in sorted({1, mean, 4 * mean}))
  say(f'validation at step {step}: loss {losses}')
  if jax.process_index() == 0:
    evals = JsonLines(this.workdir / 'evals.jsonl', keep_through=step - 1)
    evals.write(step, numbers)
    evals.close()
  return numbers


def finish(this: Run) -> None:
  """The depth report and a few samples."""
  total = this.config.train.num_steps
  numbers = evaluate(this, total)
  done = trained.Trained(this.config, this.model, this.state.averaged_params, this.mesh, total)
  paths = []
  if this.config.eval.sample_tokens:
    paths.append(trained.write_samples(done, this.workdir, this.source.prompts()))
  if jax.process_index() == 0:
    paths += trained.write_depth_report(done, this.workdir, numbers)
    say('\n'.join(depth_eval.table(numbers)))
    say('wrote ' + ' '.join(map(str, paths)))


class Profiler:
  """Traces the steps from `steps[0]` up to, not including, `steps[1]` with jax.profiler, under workdir/profile.

  Of many processes the first one traces: its devices do what all do.
  """

  def __init__(self, this: Run, steps: tuple[int, int] | None):
    total = this.config.train.num_steps
    if steps and not this.start <= steps[0] < steps[1] <= total:
      raise BadInput(
        f'--profile_steps={steps[0]}:{steps[1]} lies outside the steps to do, {this.start}:{total}; '
        'choose a range inside'
      )
    self._steps = steps if jax.process_index() == 0 else None
    self._folder, self._tracing = this.workdir / 'profile', False

  def __enter__(self) -> 'Profiler':
    return self

  def before(self, step: int) -> None:
    """Starts or stops the trace ahead of `step`."""
    if self._steps and step == self._steps[0]:
      jax.profiler.start_trace(str(self._folder))
      self._tracing = True
    elif self._steps and step == self._steps[1]:
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

  def __init__(self, this: Run):
    self._this = this
    self._cost = cost.count(this.model, this.config.data.seq_len)
    self._writers = make_writers(this.config.log, this.workdir, this.start) if jax.process_index() == 0 else []
    self._pending: tuple | None = None
    self.non_finite, self._first = False, True
    self.restart_clock()
    self._peak = chips.peak_flops(jax.devices())

  def __enter__(self) -> 'Logger':
    return self

  def take(self, step: int, metrics: dict[str, jax.Array], batch_hash: str, wait_secs: float) -> None:
    """Takes this step's metrics and handles those of the step before."""
    self._wait_secs += wait_secs
    self.flush()
    self._pending = (step, metrics, batch_hash)

  def flush(self) -> None:
    """Handles the pending step; sets `non_finite` when its loss or gradient was not."""
    if self._pending is None:
      return
    (step, metrics, batch_hash), self._pending = self._pending, None
    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
    self._steps += 1
    self._flops += self._cost.train(values['n'], values['k'])
    if not all(math.isfinite(values[name]) for name in ('loss', 'grad_norm', 'param_norm')):
      say(
        f'step {step}: loss {values["loss"]}, gradient norm {values["grad_norm"]}, parameter norm '
        f'{values["param_norm"]} at depth {values["n"]}+{values["k"]}, batch {batch_hash}: not finite, and not saved. '
        'The same command would come here again: lower config.optim.learning_rate in a new --workdir'
      )
      self.non_finite = True
    elif step % self._this.config.log.every_steps == 0 or step == self._this.config.train.num_steps:
      self._write(step, values, batch_hash)
    elif self._first:
      self.restart_clock()  # the first step was compiled
    if self._first:
      say(f'first step done {time.perf_counter() - self._this.began:.1f} s after the start, compiling included')
    self._first = False

  def _write(self, step: int, values: dict[str, Any], batch_hash: str) -> None:
    config = self._this.config
    secs = time.perf_counter() - self._since
    tokens = config.train.batch_size * config.data.seq_len
    values['tokens_per_second'] = self._steps * tokens / secs
    values['data_wait_seconds'] = self._wait_secs / self._steps
    values['batch_hash'] = batch_hash
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
      writer.write(step, values)
    self.restart_clock()

  def restart_clock(self) -> None:
    """Speeds are measured from here: after a line is written, and after an evaluation, which is no training."""
    self._since, self._steps, self._wait_secs, self._flops = time.perf_counter(), 0, 0.0, 0.0

  def __exit__(self, *exception: object) -> None:
    for writer in self._writers:
      writer.close()


def say(line: str) -> None:
  """One line to the console, from process 0 alone."""
  if jax.process_index() == 0:
    print(line, flush=True)
