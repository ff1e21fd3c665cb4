"""The training loop: restore, then batch, step, log, save, evaluate; the only stateful file."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from latent_loop import data, trained
from latent_loop.checkpoint import Checkpoints
from latent_loop.config import Config
from latent_loop.data.pipeline import Batches
from latent_loop.evals import depth as depth_eval
from latent_loop.exit_codes import DONE, NON_FINITE, PREEMPTED
from latent_loop.interrupt import Stopped, StopRequest
from latent_loop.kernels.choice import choose_attention
from latent_loop.metrics import JsonLines, read_lines
from latent_loop.model import Model, build
from latent_loop.optim import make_optimizer
from latent_loop.parallel import memory
from latent_loop.parallel import mesh as meshes
from latent_loop.parallel.group import Alone, Group
from latent_loop.progress import Logger, Profiler, say
from latent_loop.sealing import fingerprint
from latent_loop.step import TrainState, make_sharded_state, make_train_step
from latent_loop.storage import Path
from latent_loop.trust import alarms, diagnosis, guards, rollback
from latent_loop.trust.rollback import Rollback, Trouble
from latent_loop.trust.watchdog import SAVE_UNDER_WAY, Watchdog
from latent_loop.workdir import open_workdir, update_config


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
  evaluations: list[dict[str, Any]]  # the numbers of the last ones, oldest first
  fingerprint: str
  began: float  # time.perf_counter() at the start


def prepare(config: Config, workdir: Path) -> Run:
  """Everything up to the first step, with the newest checkpoint restored; what it refuses, it leaves as it was."""
  began = time.perf_counter()
  mesh = meshes.make_mesh(config.mesh)
  check_what_is_here(config, mesh)
  source, batches, data_fingerprint = open_data(config, mesh, workdir)
  model = build(config.model, config.depth)
  optimizer = make_optimizer(config.optim, config.train.num_steps)
  init, specs = make_sharded_state(config, model, optimizer, mesh)
  memory.check_state(jax.eval_shape(init), specs)
  open_workdir(workdir, config)
  checkpoints = Checkpoints(workdir, config.checkpoint)
  start, state = checkpoints.restore_newest(jax.eval_shape(init), specs, data_fingerprint) or (0, init())
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
    evaluations=past_evaluations(workdir, start),
    fingerprint=data_fingerprint,
    began=began,
  )


def check_what_is_here(config: Config, mesh: Any) -> None:
  """Raises BadInput when the devices cannot take a batch of this size, or lack the attention asked for."""
  meshes.check_batch(config.train.batch_size, config.train.num_microbatches, mesh.shape)
  memory.check_batch(config)
  choose_attention(config.model, config.data.seq_len, jax.default_backend())


def open_data(config: Config, mesh: Any, workdir: Path) -> tuple[data.Source, Batches, str]:
  """(the source, its training batches, of each of which this process builds its own rows, what both must stay)."""
  source = data.make_source(config)
  mine = trained.rows_here(config.train.batch_size, mesh)
  changes = config.data.changes_of(config.train.num_steps)
  rows, threads, together = source.rows('train'), config.data.read_threads, config.data.documents == 'together'
  batches = Batches(rows, config.seed, config.train.batch_size, mine, threads, changes, together)
  batches.rollbacks = rollback.read(workdir)
  source.rows('validation')[0]  # raises BadInput where there is none, and not after the last step
  return source, batches, f'{source.fingerprint}/{batches.order_hash()}'


def run(
  config: Config,
  workdir: Path,
  profile_steps: tuple[int, int] | None = None,
  group: Group | None = None,
  deadline: float = math.inf,
) -> int:
  """Trains until config.train.num_steps and writes the depth report; returns the exit code.

  group: this process's place among many. deadline: of time.monotonic(), when to save and stop at the latest.
  Started again it goes on from the newest checkpoint, bit for bit as if it had never stopped.
  """
  group = group or Alone()
  with Watchdog(config.guard, group.announce) as watch:
    group.on_hang, this = watch.bark, prepare(config, workdir)
    if finished_before(this):
      return DONE
    key = jax.random.key(config.seed)
    with StopRequest(deadline) as stop:
      with attended(this, watch, group, profile_steps) as (logger, profiler):
        if (code := make_up_for_an_evaluation(this, logger, watch)) is not None:
          return code
        while (step := this.start) < config.train.num_steps:
          profiler.before(step, this.state)
          watch.phase('data')
          batch = this.batches.batch(step)
          wait_secs = watch.phase('dispatch')
          this.state, metrics = this.train_step(this.state, trained.place(batch, this.mesh), key)
          watch.phase('device')
          logger.take(step + 1, metrics, wait_secs)
          watch.phase('peers')
          if (code := after_step(this, step + 1, logger, watch, group.agree(stop.requested()))) is not None:
            return code
      watch.phase('report')
      return report(this, stop, group)


@contextlib.contextmanager
def attended(this: Run, watch: Watchdog, group: Group | Alone, profile_steps: tuple[int, int] | None):
  """What stands beside the steps: metrics and profiles; and saves under way, which end with it."""
  group.check(this.start, {'the config': fingerprint(this.config), 'the data': this.fingerprint})
  logger = Logger(this.config, this.model, this.workdir, this.batches, this.start, this.began, watch, group)
  profiler = Profiler(this.workdir, this.start, this.config.train.num_steps, profile_steps)
  if this.start and jax.process_index() == 0:
    for line in update_config(this.workdir, this.config):
      say(f'changed since the run began: {line}')
  with this.checkpoints, logger, profiler:
    yield logger, profiler
    watch.phase(SAVE_UNDER_WAY)


def after_step(this: Run, step: int, logger: Logger, watch: Watchdog, stopping: bool) -> int | None:
  """Saves and evaluates when it is time, with `step` steps done; an exit code when the run ends here."""
  this.start = step
  last = step == this.config.train.num_steps
  saving = stopping or last or step % this.config.checkpoint.every_steps == 0
  watch.phase('device')
  if saving:  # look at this step's numbers first, and write them: a resume begins behind them
    logger.flush()
    watch.phase('save')
    logger.sync()
  faults = guards.not_finite(this.state) if saving or logger.failed else []
  if logger.failed or faults:
    watch.phase('diagnosis')
    return end_or_go_back(this, why_it_ends(this, step, logger.failed, faults), logger, watch)
  if saving:
    save(this, step, watch)
  if stopping and not last:
    wait_for_a_save(this, watch)
    say(f'stopped at step {step}, saved; start the same command again to continue')
    return PREEMPTED
  if step % this.config.eval.every_steps == 0 and not last:
    logger.flush()
    evaluate_on_the_way(this, step, logger, watch)
  return alarmed(this, logger, watch)


def make_up_for_an_evaluation(this: Run, logger: Logger, watch: Watchdog) -> int | None:
  """Evaluates the restored step when it was saved, and the run stopped, before its evaluation was."""
  due = this.start and this.start % this.config.eval.every_steps == 0 and this.start < this.config.train.num_steps
  if not due or any(numbers['step'] == this.start for numbers in this.evaluations):
    return None
  evaluate_on_the_way(this, this.start, logger, watch)
  return alarmed(this, logger, watch)


def evaluate_on_the_way(this: Run, step: int, logger: Logger, watch: Watchdog) -> None:
  watch.phase('evaluate')
  this.evaluations.append(evaluate(this, step))
  logger.restart_clock()
  for sentence in alarms.sentences(this.evaluations, this.config.guard, this.config.data.seq_len):
    healthy = this.evaluations[: -this.config.guard.alarm_patience]  # the trouble began after the last of these
    logger.alarms.append(Trouble(healthy[-1]['step'] + 1 if healthy else 1, step, sentence))


def alarmed(this: Run, logger: Logger, watch: Watchdog) -> int | None:
  """Says every new alarm once; the exit code when alarms stop the run."""
  found, logger.alarms = logger.alarms, []
  if found and this.config.guard.on_alarm == 'stop':
    first, last = min(alarm.first for alarm in found), max(alarm.last for alarm in found)
    return end_or_go_back(this, Trouble(first, last, '\n'.join(a.sentence for a in found)), logger, watch)
  for alarm in found:
    say(f'warning: {alarm.sentence}')
  return None


def end_or_go_back(this: Run, trouble: Trouble, logger: Logger, watch: Watchdog) -> int | None:
  """The exit code; None where the run went back to a step before the trouble, from which it goes on."""
  if len(this.batches.rollbacks) >= this.config.guard.rollback:
    say(f'{trouble.sentence}{trouble.advice}')
    return NON_FINITE
  say(trouble.sentence)
  wait_for_a_save(this, watch)
  watch.phase('roll back')
  step = this.checkpoints.go_back(trouble.first - 1)
  if step is None:
    say(f'no step before {trouble.first} is kept that config.guard.rollback could return to.{trouble.advice}')
    return NON_FINITE
  # Killed up to here, the run comes here again: from the same step, by the same batches. From here on it reads others.
  before = this.batches.rollbacks
  new = Rollback(step, rollback.place(trouble.last, before), trouble.sentence)
  this.batches.rollbacks = (*before, new)
  if jax.process_index() == 0:
    rollback.write(this.workdir, this.batches.rollbacks)
  say(
    f'returning to step {step}, roll-back {len(before) + 1} of {this.config.guard.rollback}; the data goes on at batch '
    f'{new.batch} of its stream, {new.batch - rollback.place(step, before)} batches are skipped'
  )
  restore_again(this)
  logger.go_back(this.start)
  return None


def restore_again(this: Run) -> None:
  """The newest step that there is now, and no more numbers than it has."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), this.state)
  specs = jax.tree.map(lambda x: x.sharding, this.state)
  this.state = None  # there may be no room for two
  this.start, this.state = this.checkpoints.restore_newest(shapes, specs, this.fingerprint)
  this.evaluations = [numbers for numbers in this.evaluations if numbers['step'] <= this.start]
  if jax.process_index() == 0:
    JsonLines(this.workdir / 'evals.jsonl', keep_through=this.start).close()


def why_it_ends(this: Run, step: int, failed: dict[str, Any] | None, faults: list[str]) -> Trouble:
  """About a run that is not finite. faults: arrays of the train state that hold a value that is not."""
  advice = ' The same command would come here again: lower config.optim.learning_rate in a new --workdir'
  first = step
  if failed:
    step = failed['step']
    first = step - max(failed['skipped_in_row'], 1) + 1
  if faults:
    names = ', '.join(faults[:3]) + (f' and {len(faults) - 3} more' if len(faults) > 3 else '')
    sentence = f'step {step}: the train state is not finite in {names}; it was not saved.'
    return Trouble(first, step, sentence, advice)
  n, k = failed['n'], failed['k']
  batch = trained.place(this.batches.batch(step - 1), this.mesh)
  place = diagnosis.first_place(this.config, this.model, this.mesh, this.state.params, batch, step - 1, n + k)
  sentence = (
    f'step {step}: loss {failed["loss"]} and gradient norm {failed["grad_norm"]} at depth {n}+{k}, batch '
    f'{this.batches.hash(step - 1)}, the {failed["skipped_in_row"]}. update in a row that was skipped; the first value '
    f'that is not finite is in {place}. Nothing of it was saved.'
  )
  return Trouble(first, step, sentence, advice)


def finished_before(this: Run) -> bool:
  """Says where the run stands; True when there is nothing left to do."""
  total = this.config.train.num_steps
  if this.start:
    say(f'{this.workdir}: continuing at step {this.start} of {total}')
  done = this.start >= total and (this.workdir / 'depth_report.json').exists()  # which is written last
  if done:
    this.checkpoints.close()
    say(f'{this.workdir}: already finished; read depth_report.html there, or give another --workdir to train again')
  return done


def save(this: Run, step: int, watch: Watchdog) -> None:
  wait_for_a_save(this, watch)
  watch.phase('save')
  meta = {'config': dataclasses.asdict(this.config), 'data_fingerprint': this.fingerprint}
  this.checkpoints.save(step, this.state, meta)


def wait_for_a_save(this: Run, watch: Watchdog) -> None:
  """Returns when no save is under way; raises SaveFailed when that one failed."""
  watch.phase(SAVE_UNDER_WAY)
  this.checkpoints.wait()


def past_evaluations(workdir: Path, step: int) -> list[dict[str, Any]]:
  """What an earlier start of this run evaluated up to `step`: its alarms count on."""
  past = [numbers for numbers in read_lines(workdir / 'evals.jsonl') if numbers['step'] <= step]
  return [numbers for numbers in past if alarms.readable(numbers)]


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


def report(this: Run, stop: StopRequest, group: Group | Alone) -> int:
  """Evaluates and writes once all steps are saved, or leaves it to another start when a signal comes; an exit code."""
  try:
    if group.agree(stop.signaled):  # and not a time limit, which every start with nothing left to do might reach
      raise Stopped
    stop.at_once = jax.process_count() == 1  # of many, the others would wait in a collective
    finish(this)
    stop.at_once = False
  except Stopped:
    say('stopped ahead of the report, with all steps saved; start the same command again to write it')
    return PREEMPTED
  return DONE


def finish(this: Run) -> None:
  """The depth report and a few samples."""
  total = this.config.train.num_steps
  numbers = evaluate(this, total)
  done = trained.Trained(this.config, this.model, this.state.averaged_params, this.mesh, total)
  paths = []
  prompts = this.source.prompts() if this.config.eval.sample_tokens else []
  if prompts:
    paths.append(trained.write_samples(done, this.workdir, prompts))
  if jax.process_index() == 0:
    paths += trained.write_depth_report(done, this.workdir, numbers)
    say('\n'.join(depth_eval.table(numbers)))
    say('wrote ' + ' '.join(map(str, paths)))
