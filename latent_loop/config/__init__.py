"""Configuration: frozen dataclasses, typed and commented, hold the only defaults.

A config validates itself when it is made and never changes; derived values are properties. How people edit
one, and how it is sealed again, is in sealing.py.
"""

import itertools
import re
from dataclasses import dataclass, field
from typing import Literal

from latent_loop.config.data import DataConfig
from latent_loop.config.rules import check_counts, require
from latent_loop.errors import BadInput

_MOST_LAYERS = 1024  # each is a part of the program by itself
_DEEPEST = 2**20


@dataclass(frozen=True)
class ModelConfig:
  """The architecture (arXiv 2502.05171 section 3; Parcae's variants from arXiv 2604.12946)."""

  vocab_size: int = 264  # 256 bytes + 8 special tokens
  width: int = 128
  num_heads: int = 4
  mlp_dim: int = 384
  num_prelude_layers: int = 1
  num_core_layers: int = 2
  num_coda_layers: int = 1
  block: Literal['sandwich', 'pre_norm'] = 'sandwich'
  mlp: Literal['gated_silu', 'relu_squared'] = 'gated_silu'
  qk_bias: bool = True
  qk_norm: bool = False  # parameter-free RMS norm of queries and keys after rotary
  injection: Literal['linear', 'add', 'diagonal'] = 'linear'
  prelude_norm: bool = False  # RMS norm between the prelude and the loop
  core_exit: Literal['final_norm', 'projection', 'none'] = 'final_norm'  # what stands between loop and coda
  init: Literal['takase', 'scaled_zero'] = 'takase'
  scale_embedding: bool = True  # multiply token embeddings by sqrt(width)
  state_init: Literal['truncated_normal', 'zero'] = 'truncated_normal'
  norm_eps: float = 1e-6
  rope_base: float = 50_000.0
  compute_dtype: Literal['float32', 'bfloat16'] = 'float32'
  attention: Literal['auto', 'xla', 'cudnn', 'splash'] = 'auto'
  # What is computed again in the backward pass, for memory.
  remat: Literal['none', 'iteration', 'block'] = 'iteration'

  @property
  def head_dim(self) -> int:
    return self.width // self.num_heads

  def __post_init__(self):
    check_counts('model', vars(self), ('vocab_size', 'width', 'num_heads', 'mlp_dim', 'num_core_layers'), 1)
    for name in ('num_prelude_layers', 'num_core_layers', 'num_coda_layers'):
      value = vars(self)[name]
      require(0 <= value <= _MOST_LAYERS, f'config.model.{name}={value} must lie between 0 and {_MOST_LAYERS}')
    require(self.norm_eps > 0, f'config.model.norm_eps={self.norm_eps} must be positive')
    require(self.rope_base > 1, f'config.model.rope_base={self.rope_base} must be above 1; the paper uses 50000')
    require(
      self.width % (2 * self.num_heads) == 0,
      f'config.model.width={self.width} with num_heads={self.num_heads}: rotary embedding needs an '
      f'even width per head; use a width that is a multiple of {2 * self.num_heads}',
    )


@dataclass(frozen=True)
class DepthConfig:
  """How many times the core is applied: the law it is drawn from in training, and its mean."""

  kind: Literal['poisson_lognormal', 'poisson', 'uniform', 'fixed'] = 'poisson_lognormal'
  mean: int = 8
  sigma: float = 0.5  # of the log-normal rate; read by poisson_lognormal only
  backprop_depth: int = 4  # k: the last iterations, which carry gradient; all computed also where fewer are drawn
  curriculum: Literal['none', 'linear', 'one_minus_sqrt'] = 'none'
  curriculum_steps: int = 0  # the law's mean and k grow to their full values over these steps

  def __post_init__(self):
    require(self.mean >= 1, f'config.depth.mean={self.mean} is below 1; the core runs at least once')
    require(self.mean <= _DEEPEST, f'config.depth.mean={self.mean} is above {_DEEPEST}; no run is that deep, lower it')
    require(
      1 <= self.backprop_depth <= self.mean,
      f'config.depth.backprop_depth={self.backprop_depth} must lie between 1 and '
      f'config.depth.mean={self.mean}; lower it or raise the mean',
    )
    require(0 < self.sigma <= 10, f'config.depth.sigma={self.sigma} must lie in (0, 10]; the paper uses 0.5')
    check_counts('depth', vars(self), ('curriculum_steps',), 0)
    require(
      (self.curriculum == 'none') == (self.curriculum_steps == 0) and self.curriculum_steps >= 0,
      f'config.depth.curriculum={self.curriculum!r} does not fit curriculum_steps='
      f'{self.curriculum_steps}; set both, or neither',
    )


@dataclass(frozen=True)
class OptimConfig:
  """Optimizer and learning-rate schedule. Warm-up and cooldown: in steps, or as a fraction of the run."""

  kind: Literal['adamw', 'adam_atan2', 'muon'] = 'adamw'
  learning_rate: float = 2e-3
  adam_learning_rate: float | None = None  # muon only: for what Muon does not handle; None = the same
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  no_decay: tuple[str, ...] = (r'/scale$', r'/bias$', r'injection/(log_a|dt_bias|b)$', r'core_exit/kernel$')
  clip_norm: float | None = 1.0
  muon_momentum: float = 0.95
  warmup_steps: int = 0
  warmup_fraction: float = 0.0
  cooldown_steps: int = 0
  cooldown_fraction: float = 0.0
  final_lr_fraction: float = 0.0
  ema_decay: float | None = None  # of the parameters; None = no average is kept

  def __post_init__(self):
    rate = self.learning_rate
    require(rate > 0, f'config.optim.learning_rate={rate} must be positive')
    for name, steps, fraction in (
      ('warmup', self.warmup_steps, self.warmup_fraction),
      ('cooldown', self.cooldown_steps, self.cooldown_fraction),
    ):
      require(
        steps >= 0 and 0 <= fraction <= 1 and not (steps and fraction),
        f'config.optim.{name}_steps={steps} and {name}_fraction={fraction}: give one of them, '
        'steps from 0 or a fraction from 0 to 1',
      )
    for name in ('b1', 'b2', 'muon_momentum', 'ema_decay'):
      value = vars(self)[name]
      require(value is None or 0 <= value < 1, f'config.optim.{name}={value} must lie in [0, 1)')
    for name in ('eps', 'clip_norm', 'adam_learning_rate'):
      value = vars(self)[name]
      require(value is None or value > 0, f'config.optim.{name}={value} must be positive')
    decay, final = self.weight_decay, self.final_lr_fraction
    require(decay >= 0, f'config.optim.weight_decay={decay} is negative; give 0 or more')
    require(0 <= final <= 1, f'config.optim.final_lr_fraction={final} must lie between 0 and 1')
    for pattern in self.no_decay:
      try:
        re.compile(pattern)
      except re.error as error:
        raise BadInput(f'config.optim.no_decay: {pattern!r} is not a regular expression ({error})') from error

  def warmup_of(self, num_steps: int) -> int:
    """Steps of warm-up in a run of num_steps."""
    return self.warmup_steps or round(self.warmup_fraction * num_steps)

  def cooldown_of(self, num_steps: int) -> int:
    """Steps of cooldown in a run of num_steps."""
    return self.cooldown_steps or round(self.cooldown_fraction * num_steps)


@dataclass(frozen=True)
class TrainConfig:
  """The run: how long, how much per step, and how the loss is computed."""

  num_steps: int = 1000
  batch_size: int = 8  # global, in sequences
  num_microbatches: int = 1  # gradient accumulation; one depth serves all of them
  loss_chunk: int = 256  # positions whose logits exist at the same time; where they are not all, computed twice
  z_loss: float = 0.0

  def __post_init__(self):
    check_counts('train', vars(self), ('num_steps', 'batch_size', 'num_microbatches', 'loss_chunk'), 1)
    require(
      self.batch_size % self.num_microbatches == 0,
      f'config.train.batch_size={self.batch_size} does not divide into num_microbatches='
      f'{self.num_microbatches}; use a multiple',
    )
    require(self.z_loss >= 0, f'config.train.z_loss={self.z_loss} is negative; give 0 or more')


@dataclass(frozen=True)
class MeshConfig:
  """Devices per mesh axis; -1 takes the devices that are left."""

  data: int = -1  # replicas of the weights
  fsdp: int = 1  # ways that weights, optimizer and rows are split
  tensor: int = 1  # ways that heads, hidden units and vocabulary are split
  dcn: int = 1  # TPU slices, joined by the data-center network; each holds replicas
  weights: Literal['gather_once', 'gather_per_microbatch', 'gather_per_iteration'] = 'gather_once'

  def __post_init__(self):
    sizes = {name: vars(self)[name] for name in ('data', 'fsdp', 'tensor', 'dcn')}
    require(
      all(size == -1 or size >= 1 for size in sizes.values()) and list(sizes.values()).count(-1) <= 1,
      f'config.mesh has sizes {sizes}; each is at least 1, and one may be -1',
    )


@dataclass(frozen=True)
class CheckpointConfig:
  """When to save the train state, and which saves to keep."""

  every_steps: int = 200
  keep_last: int = 2
  keep_every_steps: int | None = None  # keep every p-th step for ever

  def __post_init__(self):
    require(self.every_steps >= 1, f'config.checkpoint.every_steps={self.every_steps} is below 1')
    require(self.keep_last >= 1, f'config.checkpoint.keep_last={self.keep_last} is below 1')
    every = self.keep_every_steps
    require(every is None or every >= 1, f'config.checkpoint.keep_every_steps={every} is below 1')


@dataclass(frozen=True)
class EvalConfig:
  """Validation during training and in the depth report."""

  every_steps: int = 200
  num_batches: int = 8  # of the training batch size
  sample_tokens: int = 160  # length of each sample written at the end of the run; 0 = none

  def __post_init__(self):
    require(self.every_steps >= 1, f'config.eval.every_steps={self.every_steps} is below 1')
    check_counts('eval', vars(self), ('num_batches',), 1)
    tokens = self.sample_tokens
    require(
      0 <= tokens <= 2**16, f'config.eval.sample_tokens={tokens} must lie between 0 and {2**16}: people read them'
    )


@dataclass(frozen=True)
class GuardConfig:
  """What stops a run, or warns, before it is lost."""

  max_skips_in_row: int = 3  # updates skipped for a loss or gradient that is not finite, then exit code 11
  startup_secs: float = 3600.0  # how long the first steps, any save and so on may take, compiling included
  patience_secs: float = 180.0  # later: how long nothing may move, at least; then stacks, and exit code 12
  patience_factor: float = 10.0  # ... and at least this times what the depth of the step explains
  slow_factor: float = 3.0  # a step above this times what its depth explains is reported
  cross_check_steps: int = 50  # how often processes compare depth, batch and config
  on_alarm: Literal['warn', 'stop'] = 'warn'  # what the alarms below do; stop = exit code 11
  alarm_patience: int = 2  # evaluations in a row that must raise an alarm about depth
  alarm_after_steps: int = 1000  # from which step on depth must pay and iterations contract
  max_token_correlation: float = 0.95  # of states at the mean depth, as a share of what can be; above: collapse
  min_depth_gain: float = 0.005  # nats between depth 1 and the mean; below: the state is ignored
  max_contraction: float = 1.0  # factor on the residual per iteration past the mean depth
  max_loss: float | None = None  # nats per token, of logged steps ...
  max_loss_after_tokens: int = 0  # ... once so many tokens are seen
  rollback: int = 0  # instead of exit code 11: so often return to the last good step, skipping the batches since

  def __post_init__(self):
    check_counts('guard', vars(self), ('max_skips_in_row',), 1)
    for name in ('cross_check_steps', 'patience_factor', 'slow_factor', 'alarm_patience'):
      value = vars(self)[name]
      require(value >= 1, f'config.guard.{name}={value} is below 1; give 1 or more')
    require(self.rollback >= 0, f'config.guard.rollback={self.rollback} is below 0; 0 = off')
    for name in ('startup_secs', 'patience_secs', 'max_token_correlation', 'max_contraction', 'max_loss'):
      value = vars(self)[name]
      require(value is None or value > 0, f'config.guard.{name}={value} must be positive')


@dataclass(frozen=True)
class LogConfig:
  """Where metrics go besides the console and metrics.jsonl."""

  every_steps: int = 10
  tensorboard: bool = False
  wandb_project: str = ''  # empty = no Weights & Biases

  def __post_init__(self):
    require(self.every_steps >= 1, f'config.log.every_steps={self.every_steps} is below 1')


@dataclass(frozen=True)
class Config:
  """One experiment."""

  name: str = 'unnamed'
  seed: int = 0
  model: ModelConfig = field(default_factory=ModelConfig)
  depth: DepthConfig = field(default_factory=DepthConfig)
  data: DataConfig = field(default_factory=DataConfig)
  optim: OptimConfig = field(default_factory=OptimConfig)
  train: TrainConfig = field(default_factory=TrainConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)
  checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
  eval: EvalConfig = field(default_factory=EvalConfig)
  log: LogConfig = field(default_factory=LogConfig)
  guard: GuardConfig = field(default_factory=GuardConfig)

  @property
  def loss_chunks(self) -> int:
    """In how many parts of its positions a row's loss is computed."""
    return max(self.data.seq_len // self.train.loss_chunk, 1)

  def __post_init__(self):
    begins = [0, *(step for step, _ in self.data.changes_of(self.train.num_steps)), self.train.num_steps]
    require(
      all(a < b for a, b in itertools.pairwise(begins)),
      f'config.data.weight_changes: of config.train.num_steps={self.train.num_steps} they would begin at steps '
      f'{begins[1:-1]}, and each needs a step of its own; move them, or train longer',
    )
    chunk, seq_len = self.train.loss_chunk, self.data.seq_len
    require(
      seq_len % min(chunk, seq_len) == 0,
      f'config.train.loss_chunk={chunk} does not divide config.data.seq_len={seq_len}; use a divisor',
    )
    needed = 1 - (-self.guard.alarm_patience * self.eval.every_steps // self.checkpoint.every_steps)
    require(
      not self.guard.rollback or self.guard.on_alarm == 'warn' or self.checkpoint.keep_last >= needed,
      "config.guard.rollback with on_alarm='stop' returns to ahead of the last alarm_patience evaluations; raise "
      f'config.checkpoint.keep_last={self.checkpoint.keep_last} to {needed}, with these intervals',
    )
    steps = self.train.num_steps
    ramps = self.optim.warmup_of(steps) + self.optim.cooldown_of(steps)
    require(
      ramps <= steps,
      f'config.optim: warm-up and cooldown take {ramps} steps, more than config.train.num_steps={steps}; shorten '
      'them or train longer',
    )
    require(0 <= self.seed < 2**31, f'config.seed={self.seed} must lie in [0, 2**31): it seeds every random draw')
