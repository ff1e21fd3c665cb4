"""The only place that touches the environment: 8 virtual CPU devices, strict shapes, exact matrix products."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
# Unoptimized code: the tests' time is compile time.
_FLAGS = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAGS}'.strip()
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_matmul_precision', 'highest')

assert jax.device_count() == 8, (
  f'the tests need 8 virtual CPU devices and see {jax.devices()}: something imported and used JAX before conftest.py'
)
