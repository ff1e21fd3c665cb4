"""The depth-recurrent language model as an NNX declaration: embed, prelude, core, coda, readout.

Nothing here loops over depth; model/depth_loop.py does, around `iterate`.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from latent_loop.config import ModelConfig
from latent_loop.model import initializers
from latent_loop.model.injection import INJECTIONS, Drive
from latent_loop.model.layers import BLOCKS, Projection, RMSNorm, Rows
from latent_loop.parallel.sharding import ROW_AXES, constrain


class Embedding(nnx.Module):
  """The token table, tied: rows in, scores out."""

  def __init__(self, cfg: ModelConfig, inits: initializers.Inits, key: jax.Array):
    self.embedding = nnx.Param(inits.inner(key, (cfg.vocab_size, cfg.width)))
    self.scale = math.sqrt(cfg.width) if cfg.scale_embedding else 1.0

  def lookup(self, tokens_BT: jax.Array) -> jax.Array:
    # Gathered over fsdp first: a lookup in a table sharded over its width would replicate the rows.
    table_VD = constrain(self.embedding[...], 'tensor', None)
    return table_VD[tokens_BT] * self.scale

  def scores(self, y_BTD: jax.Array) -> jax.Array:
    return jnp.einsum('BTD,VD->BTV', y_BTD, self.embedding[...], preferred_element_type=jnp.float32)


class LoopedLM(nnx.Module):
  """Params and the five stages of the model (2502.05171 section 3)."""

  def __init__(self, cfg: ModelConfig, mean_depth: int, key: jax.Array):
    inits = initializers.make_inits(cfg, mean_depth)
    num_layers = cfg.num_prelude_layers + cfg.num_core_layers + cfg.num_coda_layers
    keys = iter(jax.random.split(key, num_layers + 3))
    blocks = lambda count: nnx.List([BLOCKS[cfg.block](cfg, inits, next(keys)) for _ in range(count)])
    self.embed = Embedding(cfg, inits, next(keys))
    self.prelude = blocks(cfg.num_prelude_layers)
    self.injection = INJECTIONS[cfg.injection](cfg, inits, next(keys))
    self.core = blocks(cfg.num_core_layers)
    self.coda = blocks(cfg.num_coda_layers)
    self.final_norm = RMSNorm(cfg.width, cfg.norm_eps)
    self.prelude_norm = RMSNorm(cfg.width, cfg.norm_eps) if cfg.prelude_norm else None
    exit_init, exit_key = initializers.orthogonal(initializers.base_std(cfg)), next(keys)
    projected = cfg.core_exit == 'projection'
    self.core_exit = Projection((cfg.width, cfg.width), exit_init, exit_key) if projected else None
    self.cfg = cfg

  def embed_input(self, tokens_BT: jax.Array, rows: Rows) -> jax.Array:
    """e = P(x)."""
    with jax.named_scope('prelude'):
      e_BTD = self._run(self.prelude, constrain_BTD(self.embed.lookup(tokens_BT)), rows)
      return e_BTD if self.prelude_norm is None else self.prelude_norm(e_BTD)

  def drive(self, e_BTD: jax.Array) -> Drive:
    return self.injection.drive(e_BTD)

  def iterate(self, s_BTD: jax.Array, drive: Drive, rows: Rows) -> jax.Array:
    """s_i = R(e, s_{i-1}): one iteration, the only place where the core is applied."""
    with jax.named_scope('core'):
      return self._run(self.core, constrain_BTD(self.injection.join(s_BTD, drive)), rows)

  def leave_core(self, s_BTD: jax.Array) -> jax.Array:
    """What the coda reads of a state: its final norm (the reference's), Parcae's projection C, or all of it."""
    exits = {'final_norm': self.final_norm, 'projection': self.core_exit, 'none': lambda s_BTD: s_BTD}
    return exits[self.cfg.core_exit](s_BTD)

  def apply_coda(self, s_BTD: jax.Array, rows: Rows) -> jax.Array:
    """The coda's output under the final norm, ready for `scores`. The norm's scale serves twice."""
    with jax.named_scope('coda'):
      return self.final_norm(self._run(self.coda, self.leave_core(s_BTD), rows))

  def scores(self, y_BTD: jax.Array) -> jax.Array:
    """Logits in float32."""
    return self.embed.scores(y_BTD)

  def _run(self, blocks, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    for block in blocks:
      run = lambda x, block=block: block(x, rows)
      x_BTD = (jax.checkpoint(run) if self.cfg.remat == 'block' else run)(x_BTD)
    return x_BTD


def constrain_BTD(x_BTD: jax.Array) -> jax.Array:
  """Rows over the axes that split rows, positions and width whole."""
  return constrain(x_BTD, ROW_AXES, None, None)
