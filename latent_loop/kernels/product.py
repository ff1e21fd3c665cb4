"""A matrix product that is as fast on a CPU for few rows, and in its backward pass, as it is for many."""

import functools

import jax

_FEW = 8  # rows up to which a CPU is faster going over them one by one: a product of many packs its matrix first


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_XC: jax.Array, w_CY: jax.Array, platform: str) -> jax.Array:
  """x @ w, for a program that runs on `platform` ('cpu', 'gpu' or 'tpu').

  Two forms in which XLA is slow on a CPU are avoided (experiments/LOG.md): few rows, as in decoding, and the weight's
  gradient, which contracts the first axes of two matrices.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if platform == 'cpu' and 1 < x_XC.shape[0] <= _FEW and (mesh.empty or mesh.size == 1):
    return jax.lax.map(lambda x_C: x_C @ w_CY, x_XC)
  return x_XC @ w_CY


def _forward(x_XC: jax.Array, w_CY: jax.Array, platform: str) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return product(x_XC, w_CY, platform), (x_XC, w_CY)


def _backward(platform: str, kept: tuple[jax.Array, jax.Array], dy_XY: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_XC, w_CY = kept
  x_CX = x_XC.T
  if platform == 'cpu':
    x_CX = jax.lax.optimization_barrier(x_CX)  # transposed on its own: the compiler would fold it into the product
  return dy_XY @ w_CY.T, x_CX @ dy_XY


product.defvjp(_forward, _backward)
