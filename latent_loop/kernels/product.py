"""A matrix product whose backward pass is as fast as its forward pass on a CPU too."""

import functools

import jax


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_XC: jax.Array, w_CY: jax.Array, platform: str) -> jax.Array:
  """x @ w, for a program that runs on `platform` ('cpu', 'gpu' or 'tpu').

  The weight's gradient contracts the first axes of two matrices, which XLA does at half its speed on a CPU
  (experiments/LOG.md).
  """
  return x_XC @ w_CY


def _forward(x_XC: jax.Array, w_CY: jax.Array, platform: str) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return x_XC @ w_CY, (x_XC, w_CY)


def _backward(platform: str, kept: tuple[jax.Array, jax.Array], dy_XY: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_XC, w_CY = kept
  x_CX = x_XC.T
  if platform == 'cpu':
    x_CX = jax.lax.optimization_barrier(x_CX)  # transposed on its own: the compiler would fold it into the product
  return dy_XY @ w_CY.T, x_CX @ dy_XY


product.defvjp(_forward, _backward)
