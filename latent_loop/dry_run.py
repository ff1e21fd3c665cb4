"""What a config would train, without a device: the sealed config, parameters, FLOPs and mesh as asked."""

import dataclasses

from latent_loop import data
from latent_loop.config import Config, DataConfig
from latent_loop.evals.depth import default_depths
from latent_loop.model import build, cost, depth
from latent_loop.sealing import fingerprint, to_json


def describe(config: Config) -> str:
  """The text that `train --dry_run` prints."""
  data.check_name(config.data)
  counts = cost.count(build(config.model, config.depth), config.data.seq_len)
  k = config.depth.backprop_depth
  n = max(config.depth.mean - k, 0)
  parts = [f'  {name:<13}{size:>16,}' for name, size in counts.parameters.items()]
  flops = [f'  depth {r:<5}{counts.forward(r) / 1e9:12.4f}' for r in default_depths(config.depth.mean)]
  model, again, spared = counts.train(n, k), counts.recompute(k, config.loss_chunks), counts.spared(n, k)
  computed = counts.computed(n, k, config.loss_chunks)
  tokens = config.train.batch_size * config.data.seq_len
  mixture = _mixture(config.data, config.train.num_steps) if len(config.data.paths) > 1 else []
  mesh = ', '.join(
    f'{axis}={"the rest" if size == -1 else size}' for axis, size in dataclasses.asdict(config.mesh).items()
  )
  return '\n'.join(
    [
      to_json(config).rstrip(),
      f'config fingerprint {fingerprint(config)}',
      '',
      f'parameters   {counts.total_parameters:>16,}',
      *parts,
      '',
      'FLOPs per token in GFLOP; 2 per multiply-add, attention over the full T x T square, lookups free',
      'forward, by depth:',
      *flops,
      f'training at n={n} without gradient, k={k} with:',
      f'  forward    {counts.forward(n + k) / 1e9:12.4f}',
      f'  and backward{model / 1e9:11.4f}   (model FLOPs; utilization is reported against this)',
      f'  computed   {computed / 1e9:12.4f}   ({again / 1e9:.4f} more: computed again, remat {config.model.remat}; '
      f'{spared / 1e9:.4f} less: the injection multiplies the prelude once, not in every iteration)',
      f'law {config.depth.kind} of mean {config.depth.mean}: mean of what it draws {depth.expected(config.depth):.2f}',
      '',
      f'mesh as asked: {mesh}',
      f'tokens per step {tokens:,}; in all {tokens * config.train.num_steps:,} over {config.train.num_steps:,} steps',
      *mixture,
    ]
  )


def _mixture(cfg: DataConfig, num_steps: int) -> list[str]:
  """The shares of several paths, and when they change."""
  out = ['mixture, shares of the rows:']
  for step, weights in [(0, cfg.weights), *cfg.changes_of(num_steps)]:
    total = sum(weights)
    shares = ', '.join(f'{weight / total:.2%} {path}' for weight, path in zip(weights, cfg.paths, strict=False))
    out.append(f'  from step {step:<9,} {shares or "of each path as many as it has"}')
  return out
