"""How the embedded input e enters the core: one signature (s_BTD, e_BTD) -> x_BTD for every kind.

It is applied at the start of each iteration, before the core's blocks, so the fixed point depends on
the input at every depth.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from latent_loop.config import ModelConfig
from latent_loop.model import initializers
from latent_loop.model.layers import Projection


class LinearInjection(Projection):
  """x = A [s; e], the learned adapter of Huginn (2502.05171 section 3.2), state first."""

  def __init__(self, cfg: ModelConfig, inits: initializers.Inits, key: jax.Array):
    super().__init__((2 * cfg.width, cfg.width), inits.inner, key)

  def __call__(self, s_BTD: jax.Array, e_BTD: jax.Array) -> jax.Array:
    return super().__call__(jnp.concatenate([s_BTD, e_BTD], axis=-1))


class AddInjection(nnx.Module):
  """x = s + e: no parameters, spectral radius one."""

  def __init__(self, cfg: ModelConfig, inits: initializers.Inits, key: jax.Array):
    pass

  def __call__(self, s_BTD: jax.Array, e_BTD: jax.Array) -> jax.Array:
    return s_BTD + e_BTD


class DiagonalInjection(nnx.Module):
  """x = exp(-dt A) s + dt (e B), a discretized stable diagonal system (Parcae, 2604.12946 section 3).

  A = exp(log_a) and dt = softplus(dt_bias) are per channel, so every decay lies in (0, 1); it starts at
  sqrt(1/5). B starts as the identity.
  """

  def __init__(self, cfg: ModelConfig, inits: initializers.Inits, key: jax.Array):
    dt = -math.log(math.sqrt(1 / 5))
    self.log_a = nnx.Param(jnp.zeros((cfg.width,), jnp.float32))
    self.dt_bias = nnx.Param(jnp.full((cfg.width,), math.log(math.expm1(dt)), jnp.float32))
    self.b = nnx.Param(jnp.eye(cfg.width, dtype=jnp.float32))

  def __call__(self, s_BTD: jax.Array, e_BTD: jax.Array) -> jax.Array:
    dt_D = jax.nn.softplus(self.dt_bias[...])
    decay_D = jnp.exp(-dt_D * jnp.exp(self.log_a[...]))
    eb_BTD = jnp.einsum('BTC,CD->BTD', e_BTD, self.b[...].astype(e_BTD.dtype))
    x_BTD = decay_D[None, None, :] * s_BTD + dt_D[None, None, :] * eb_BTD
    return x_BTD.astype(s_BTD.dtype)


INJECTIONS = {'linear': LinearInjection, 'add': AddInjection, 'diagonal': DiagonalInjection}
