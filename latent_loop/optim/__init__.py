"""The optimizer of a run: schedule, clipping, weight-decay groups, one optax chain."""

import re
from typing import Any

import jax
import optax

from latent_loop.config import OptimConfig
from latent_loop.optim.adam_atan2 import scale_by_adam_atan2
from latent_loop.parallel.sharding import path_of


def make_schedule(cfg: OptimConfig, num_steps: int) -> optax.Schedule:
  """Linear warm-up from 0, constant, linear cooldown to final_lr_fraction; a function of the step from 0."""
  warmup, cooldown = cfg.warmup_of(num_steps), cfg.cooldown_of(num_steps)
  peak, final = cfg.learning_rate, cfg.learning_rate * cfg.final_lr_fraction
  # The first step of a warm-up already moves: at step 0 the rate is peak / warmup.
  rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
  fall = optax.linear_schedule(peak, final, max(cooldown, 1))
  parts = [(rise, 0)] if warmup else []
  parts += [(optax.constant_schedule(peak), warmup)]
  parts += [(fall, num_steps - cooldown)] if cooldown else []
  return optax.join_schedules([part for part, _ in parts], [start for _, start in parts[1:]])


def decay_mask(cfg: OptimConfig, params: Any) -> Any:
  """True for every parameter that decays: those whose path no pattern of config.optim.no_decay matches."""

  def decays(keypath, _):
    path = path_of(keypath)
    return not any(re.search(pattern, path) for pattern in cfg.no_decay)

  return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(cfg: OptimConfig, num_steps: int) -> optax.GradientTransformation:
  """Clip, then the update of cfg.kind, then decoupled weight decay that follows the schedule."""
  clip = [] if cfg.clip_norm is None else [optax.clip_by_global_norm(cfg.clip_norm)]
  return optax.chain(*clip, KINDS[cfg.kind](cfg, make_schedule(cfg, num_steps)))


def _adamw(cfg: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  mask = lambda params: decay_mask(cfg, params)
  return optax.adamw(schedule, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=mask)


def reference_tensor(path: str) -> str:
  """Which tensor of the reference a parameter is part of: queries, keys and values are one there, gate and up too."""
  path = re.sub(r'attn/[qkv]/kernel$', 'attn/qkv/kernel', path)
  return re.sub(r'mlp/(gate|up)/kernel$', 'mlp/gate_up/kernel', re.sub(r'attn/[qk]/bias$', 'attn/qk/bias', path))


def _adam_atan2(cfg: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  """The paper's optimizer: at the peak rate one step shrinks a weight by exactly weight_decay."""
  mask = lambda params: decay_mask(cfg, params)
  return optax.chain(
    scale_by_adam_atan2(cfg.b1, cfg.b2, cfg.eps, reference_tensor),
    optax.add_decayed_weights(cfg.weight_decay / cfg.learning_rate, mask),
    optax.scale_by_learning_rate(schedule),
  )


def _muon(cfg: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Muon for kernels; AdamW, at its own rate, for embedding, norms, biases and the injection's own parameters."""
  ratio = 1.0 if cfg.adam_learning_rate is None else cfg.adam_learning_rate / cfg.learning_rate
  muon = optax.contrib.muon(
    schedule,
    beta=cfg.muon_momentum,
    eps=cfg.eps,
    weight_decay=cfg.weight_decay,
    weight_decay_mask=lambda params: decay_mask(cfg, params),
    muon_weight_dimension_numbers=muon_dimensions,
  )
  label = lambda path, _: 'muon' if path_of(path).endswith('/kernel') else 'adamw'
  labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
  return optax.partition({'muon': muon, 'adamw': _adamw(cfg, lambda step: ratio * schedule(step))}, labels)


def muon_dimensions(params: Any) -> Any:
  """Which axes of each kernel are the inputs and the outputs of its matrix; None for all that is no kernel."""

  def dimensions(keypath, p):
    path = path_of(keypath)
    if not path.endswith('/kernel'):
      return None
    inputs = p.ndim - 1 if path.endswith('out/kernel') else 1
    return optax.contrib.MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, p.ndim)))

  return jax.tree_util.tree_map_with_path(dimensions, params)


KINDS = {'adamw': _adamw, 'adam_atan2': _adam_atan2, 'muon': _muon}
