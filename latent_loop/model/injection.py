"""How the embedded input e enters the core: x = join(s, drive(e)), the same two steps for every kind.

It enters at the start of each iteration, before the core's blocks, so the fixed point depends on the input at every
depth. `drive` is all that does not depend on the state; it is computed once, ahead of the loop over depth.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from latent_loop.config import ModelConfig
from latent_loop.model import initializers
from latent_loop.model.layers import Projection, project

Drive = tuple[jax.Array, ...]


class LinearInjection(Projection):
  """x = A [s; e], the learned adapter of Huginn (2502.05171 section 3.2), state first."""

  def __init__(self, cfg: ModelConfig, inits: initializers.Inits, key: jax.Array):
    super().__init__((2 * cfg.width, cfg.width), inits.inner, key)

  def drive(self, e_BTD: jax.Array) -> Drive:
    kernel, D = self.kernel[...], e_BTD.shape[-1]
    return kernel[:D], project(e_BTD, kernel[D:])

  def join(self, s_BTD: jax.Array, drive: Drive) -> jax.Array:
    w_DD, u_BTD = drive
    return project(s_BTD, w_DD) + u_BTD


class AddInjection(nnx.Module):
  """x = s + e: no parameters, spectral radius one."""

  def __init__(self, cfg: ModelConfig, inits: initializers.Inits, key: jax.Array): ...

  def drive(self, e_BTD: jax.Array) -> Drive:
    return (e_BTD,)

  def join(self, s_BTD: jax.Array, drive: Drive) -> jax.Array:
    return s_BTD + drive[0]


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

  def drive(self, e_BTD: jax.Array) -> Drive:
    dt_D = jax.nn.softplus(self.dt_bias[...])
    decay_D = jnp.exp(-dt_D * jnp.exp(self.log_a[...]))
    eb_BTD = project(e_BTD, self.b[...].astype(e_BTD.dtype))
    return decay_D, dt_D[None, None, :] * eb_BTD

  def join(self, s_BTD: jax.Array, drive: Drive) -> jax.Array:
    decay_D, u_BTD = drive
    return (decay_D[None, None, :] * s_BTD + u_BTD).astype(s_BTD.dtype)


INJECTIONS = {'linear': LinearInjection, 'add': AddInjection, 'diagonal': DiagonalInjection}
