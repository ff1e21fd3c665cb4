"""The only place that touches the environment: 8 virtual CPU devices, strict shapes, exact matrix products.

Compiling is most of the time of these tests, so XLA is told to optimize little and to use its older emitter
of fused loops: a quarter of the time, the same mathematics. And what one process has compiled, the others of the same
session (workers, programs under test) find in a folder of this session.
"""

import atexit
import os
import shutil
import tempfile

_FLAGS = (
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
  '--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters',
  '--xla_cpu_collective_call_terminate_timeout_seconds=600',  # 40 s: a busy machine may need longer for eight devices
)

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['HF_HUB_OFFLINE'] = '1'  # what transformers and lm-eval-harness need is here
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *_FLAGS]).strip()
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

if 'PYTEST_XDIST_WORKER' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='compiled')
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax  # noqa: E402
import pytest  # noqa: E402

from latent_loop import compiled  # noqa: E402
from tests.object_store import STORE  # noqa: E402

for name in ('no_proxy', 'NO_PROXY'):  # the servers of the tests are here; pip's may be behind one
  os.environ[name] = ','.join([*filter(None, [os.environ.get(name)]), '127.0.0.1', 'localhost'])
os.environ['TENSORSTORE_GCS_HTTP_URL'] = STORE.address
os.environ['TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS'] = '4'
os.environ['TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES'] = '1'
os.environ['GOOGLE_AUTH_TOKEN_FOR_TESTING'] = 'none'  # nobody's: the stand-in asks for none

compiled.keep(os.environ['JAX_COMPILATION_CACHE_DIR'])  # the programs under test do so too, in the same folder
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_default_matmul_precision', 'highest')

assert jax.device_count() == 8, (
  f'the tests need 8 virtual CPU devices and see {jax.devices()}: something imported and used JAX before conftest.py'
)


@pytest.fixture
def store(monkeypatch):
  """The stand-in for an object store, empty and in good health, and little patience with it."""
  from latent_loop.storage import objects

  monkeypatch.setattr(objects, 'RETRIES', {'max_retries': 2, 'initial_delay': '20ms', 'max_delay': '50ms'})
  objects.bucket_at.cache_clear()
  STORE.start()
  STORE.objects.clear()
  yield STORE
  STORE.heal()
  objects.bucket_at.cache_clear()
