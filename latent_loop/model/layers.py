"""The parts of a transformer block, declared with NNX; every array is an argument or a Param.

Params are named for what they are (`kernel`, `bias`, `scale`): sharding rules and weight-decay groups
go by these paths. Kernels and biases are cast to the compute dtype by the caller, scales are not.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from latent_loop.config import ModelConfig
from latent_loop.kernels.choice import choose_attention
from latent_loop.kernels.cudnn import cudnn
from latent_loop.kernels.plain import plain_attention
from latent_loop.kernels.product import product
from latent_loop.kernels.rotary import Turn, rotate, turn_of
from latent_loop.kernels.splash import splash
from latent_loop.model import initializers
from latent_loop.parallel.sharding import on_own_rows, target_platform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What attention must know about the rows of a batch.

  positions_BT: place of each token in its document, from 0.
  segment_ids_BT: tokens see only tokens of the same segment; 0 marks padding. None: a row is one document.
  """

  positions_BT: jax.Array
  segment_ids_BT: jax.Array | None
  turn: Turn | None = None  # rotary tables of the positions, where they were made ahead

  def ready(self, cfg: ModelConfig) -> 'Rows':
    """The same with its rotary tables, for all layers and iterations that follow. A loop makes them, so that they are
    kept: the CPU compiler would put cosines and sines into each pass that reads them (experiments/LOG.md)."""
    if self.turn is not None:
      return self
    turn = jax.lax.map(lambda positions_T: turn_of(positions_T, cfg.head_dim, cfg.rope_base), self.positions_BT)
    return dataclasses.replace(self, turn=turn)

  def attend(self, q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Causal attention inside segments, by what config.model.attention means on this platform."""
    kind, ids_BT = choose_attention(cfg, q_BTNH.shape[1], target_platform()), self.segment_ids_BT
    if kind == 'splash' and on_own_rows():
      return splash(q_BTNH, k_BTNH, v_BTNH, ids_BT, interpret=False)
    if kind in ('xla', 'splash'):  # a kernel cannot be split by the compiler; generation, which is, does without it
      return plain_attention(q_BTNH, k_BTNH, v_BTNH, ids_BT)
    return cudnn(q_BTNH, k_BTNH, v_BTNH, ids_BT, on_own_rows())


def rms_norm(x: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) over the last axis, in float32 whatever the dtype of x."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
  """Root-mean-square norm with a learned scale."""

  def __init__(self, width: int, eps: float):
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
    self.eps = eps

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    return (rms_norm(x_BTD, self.eps) * self.scale[...][None, None, :]).astype(x_BTD.dtype)


def project(x_BTC: jax.Array, w_CY: jax.Array) -> jax.Array:
  """x @ w over all tokens as one axis."""
  B, T, _ = x_BTC.shape
  return product(x_BTC.reshape(B * T, -1), w_CY, target_platform()).reshape(B, T, -1)


class Projection(nnx.Module):
  """A linear map without bias, of the last `num_in` axes of its input."""

  def __init__(self, shape: tuple[int, ...], init: initializers.Init, key: jax.Array, num_in: int = 1):
    self.kernel = nnx.Param(init(key, shape))
    self.num_in = num_in

  def __call__(self, x: jax.Array) -> jax.Array:
    kernel, outer = self.kernel[...], self.kernel.shape[self.num_in :]
    y_BTY = project(x.reshape(*x.shape[:2], -1), kernel.reshape(-1, math.prod(outer)))
    return y_BTY.reshape(*x.shape[:2], *outer)


class BiasedProjection(Projection):
  """A projection to heads with an optional bias, zero at the start."""

  def __init__(self, shape: tuple[int, ...], init: initializers.Init, key: jax.Array, biased: bool):
    super().__init__(shape, init, key)
    self.bias = nnx.Param(jnp.zeros(shape[1:], jnp.float32)) if biased else None

  def __call__(self, x: jax.Array) -> jax.Array:
    y = super().__call__(x)
    return y if self.bias is None else y + self.bias[...][None, None]


class Attention(nnx.Module):
  """Multi-head attention with rotary positions and an optional bias on queries and keys."""

  def __init__(self, cfg: ModelConfig, inits: initializers.Inits, key: jax.Array):
    q_key, k_key, v_key, out_key = jax.random.split(key, 4)
    D, N, H = cfg.width, cfg.num_heads, cfg.head_dim
    self.q = BiasedProjection((D, N, H), inits.inner, q_key, cfg.qk_bias)
    self.k = BiasedProjection((D, N, H), inits.inner, k_key, cfg.qk_bias)
    self.v = Projection((D, N, H), inits.inner, v_key)
    self.out = Projection((N, H, D), inits.out, out_key, num_in=2)
    self.cfg = cfg

  def __call__(self, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    cfg = self.cfg
    turn = turn_of(rows.positions_BT, cfg.head_dim, cfg.rope_base) if rows.turn is None else rows.turn
    q_BTNH, k_BTNH = rotate(self.q(x_BTD), turn), rotate(self.k(x_BTD), turn)
    if cfg.qk_norm:
      q_BTNH = rms_norm(q_BTNH, cfg.norm_eps).astype(x_BTD.dtype)
      k_BTNH = rms_norm(k_BTNH, cfg.norm_eps).astype(x_BTD.dtype)
    v_BTNH = self.v(x_BTD)
    return self.out(rows.attend(q_BTNH, k_BTNH, v_BTNH, cfg))


class GatedMLP(nnx.Module):
  """down(silu(gate x) * up x), the Huginn MLP."""

  def __init__(self, cfg: ModelConfig, inits: initializers.Inits, key: jax.Array):
    gate_key, up_key, down_key = jax.random.split(key, 3)
    self.gate = Projection((cfg.width, cfg.mlp_dim), inits.inner, gate_key)
    self.up = Projection((cfg.width, cfg.mlp_dim), inits.inner, up_key)
    self.down = Projection((cfg.mlp_dim, cfg.width), inits.out, down_key)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    h_BTF = jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD)
    return self.down(h_BTF)


class SquaredReluMLP(nnx.Module):
  """down(relu(up x)^2 / 2), Parcae's MLP."""

  def __init__(self, cfg: ModelConfig, inits: initializers.Inits, key: jax.Array):
    up_key, down_key = jax.random.split(key)
    self.up = Projection((cfg.width, cfg.mlp_dim), inits.inner, up_key)
    self.down = Projection((cfg.mlp_dim, cfg.width), inits.out, down_key)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    h_BTF = 0.5 * jnp.square(jax.nn.relu(self.up(x_BTD)))
    return self.down(h_BTF)


MLPS = {'gated_silu': GatedMLP, 'relu_squared': SquaredReluMLP}


class SandwichBlock(nnx.Module):
  """x <- norm_2(x + attn(norm_1 x)); x <- norm_4(x + mlp(norm_3 x)) (2502.05171 section 3.2)."""

  def __init__(self, cfg: ModelConfig, inits: initializers.Inits, key: jax.Array):
    attn_key, mlp_key = jax.random.split(key)
    self.norm_1, self.norm_2 = RMSNorm(cfg.width, cfg.norm_eps), RMSNorm(cfg.width, cfg.norm_eps)
    self.norm_3, self.norm_4 = RMSNorm(cfg.width, cfg.norm_eps), RMSNorm(cfg.width, cfg.norm_eps)
    self.attn = Attention(cfg, inits, attn_key)
    self.mlp = MLPS[cfg.mlp](cfg, inits, mlp_key)

  def __call__(self, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    x_BTD = self.norm_2(x_BTD + self.attn(self.norm_1(x_BTD), rows))
    return self.norm_4(x_BTD + self.mlp(self.norm_3(x_BTD)))


class PreNormBlock(nnx.Module):
  """x <- x + attn(norm_1 x); x <- x + mlp(norm_2 x), the block of Parcae and most decoders."""

  def __init__(self, cfg: ModelConfig, inits: initializers.Inits, key: jax.Array):
    attn_key, mlp_key = jax.random.split(key)
    self.norm_1, self.norm_2 = RMSNorm(cfg.width, cfg.norm_eps), RMSNorm(cfg.width, cfg.norm_eps)
    self.attn = Attention(cfg, inits, attn_key)
    self.mlp = MLPS[cfg.mlp](cfg, inits, mlp_key)

  def __call__(self, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    x_BTD = x_BTD + self.attn(self.norm_1(x_BTD), rows)
    return x_BTD + self.mlp(self.norm_2(x_BTD))


BLOCKS = {'sandwich': SandwichBlock, 'pre_norm': PreNormBlock}
