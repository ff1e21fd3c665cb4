"""What a model costs: parameters by part, FLOPs per token as functions of depth.

Convention: two FLOPs per multiply-add of a matrix product; attention counted over the full T x T square,
not its causal half; norms, activations, softmax and the optimizer are not counted; a lookup is free.
`train` is what the model as written needs (forward and backward), with the whole injection in every iteration;
`recompute` is what rematerialization adds, `spared` what computing the drive once, ahead of the loop, takes away.
"""

import dataclasses
import math

import jax

from latent_loop.model import Model
from latent_loop.parallel.sharding import path_of


@dataclasses.dataclass(frozen=True)
class Cost:
  """Parameters by part, and FLOPs per token for rows of seq_len tokens."""

  parameters: dict[str, int]
  outer: int  # forward FLOPs of prelude, coda and what stands between loop and coda
  core: int  # forward FLOPs of one iteration
  head: int  # forward FLOPs of the logits
  remat: str  # config.model.remat, or 'block_in_iteration'
  coda: int  # the part of outer that every reading of a state pays, with the head
  outer_blocks: int  # forward FLOPs of the prelude's and coda's blocks alone
  core_blocks: int  # forward FLOPs of one iteration's blocks, without the injection
  core_last_block: int  # forward FLOPs of the last of an iteration's blocks
  drive: int  # forward FLOPs of the injection's part that does not read the state

  @property
  def total_parameters(self) -> int:
    return sum(self.parameters.values())

  def forward(self, depth: float) -> float:
    return self.outer + self.head + self.core * depth

  def generated(self, depth: float, reads: float) -> float:
    """One token behind the prompt: its prelude, `depth` iterations, and `reads` looks at what they predict."""
    return self.outer - self.coda + self.core * depth + reads * (self.coda + self.head)

  def train(self, n: float, k: float) -> float:
    """Forward and backward; the n iterations without gradient run forward only."""
    return 3 * (self.outer + self.head) + self.core * (n + 3 * k)

  def recompute(self, k: float, loss_chunks: int) -> float:
    """What the backward pass computes again: logits in chunks, and blocks or iterations by config.model.remat."""
    iteration = self.core - self.drive
    again = {'none': 0, 'iteration': iteration * k, 'block': self.outer_blocks + self.core_blocks * k}
    # The iteration is computed again up to the input of its last block, and then each block by itself.
    again['block_in_iteration'] = again['block'] + (iteration - self.core_last_block) * k
    return self.head * (loss_chunks > 1) + again[self.remat]

  def gathering_per_iteration(self) -> 'Cost':
    """The cost where iterations gather their weights: all are computed again, whatever config.model.remat says."""
    return dataclasses.replace(self, remat='block_in_iteration' if self.remat == 'block' else 'iteration')

  def spared(self, n: float, k: float) -> float:
    """What every iteration but the first with gradient does not compute, though `train` counts it."""
    return self.drive * (n + 3 * (k - 1))

  def computed(self, n: float, k: float, loss_chunks: int) -> float:
    """What a training step really computes."""
    return self.train(n, k) + self.recompute(k, loss_chunks) - self.spared(n, k)


def count(model: Model, seq_len: int) -> Cost:
  """The cost of `model`, from the shapes of its parameters; allocates nothing."""
  cfg = model.cfg
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
  parameters: dict[str, int] = {}
  matrices: dict[str, int] = {}
  for keypath, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    path, size = path_of(keypath), math.prod(leaf.shape)
    part = path.split('/')[0]
    parameters[part] = parameters.get(part, 0) + size
    if path.endswith('/kernel') or path == 'injection/b':
      matrices[part] = matrices.get(part, 0) + size
  attention = 4 * seq_len * cfg.width  # scores and weighted values of one layer
  blocks = lambda part, layers: 2 * matrices.get(part, 0) + layers * attention
  coda = blocks('coda', cfg.num_coda_layers)
  outer = blocks('prelude', cfg.num_prelude_layers) + coda
  core_exit = 2 * matrices.get('core_exit', 0)
  core = blocks('core', cfg.num_core_layers)
  injection = 2 * matrices.get('injection', 0)
  return Cost(
    parameters=parameters,
    outer=outer + core_exit,
    core=core + injection,
    head=2 * parameters['embed'],
    remat=cfg.remat,
    coda=coda + core_exit,
    outer_blocks=outer,
    core_blocks=core,
    core_last_block=core // cfg.num_core_layers,
    drive=injection // 2 if cfg.injection == 'linear' else injection,
  )
