"""Kernels for particular hardware compute what plain attention does; which one a platform gets, or a sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_loop.errors import BadInput
from latent_loop.kernels.choice import choose_attention
from latent_loop.kernels.plain import plain_attention
from latent_loop.kernels.splash import splash
from latent_loop.model.layers import Rows
from tests.tiny import tiny_config


@pytest.mark.slow
def test_splash_is_plain_attention_with_documents_and_in_reverse():
  """The kernel's own steps, interpreted; heads of 24, which fill no lane."""
  B, T, N, H = 2, 256, 2, 24
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, weight = (jax.random.normal(key, (B, T, N, H)) for key in keys)
  ids = jnp.asarray(np.cumsum(np.random.default_rng(0).random((B, T)) < 0.02, axis=1) + 1)
  rows = Rows(jnp.zeros((B, T), jnp.int32), ids)

  def value_and_grads(attention):
    return jax.value_and_grad(lambda q, k, v: jnp.sum(attention(q, k, v) * weight), (0, 1, 2))(q, k, v)

  got = value_and_grads(lambda q, k, v: splash(q, k, v, ids, interpret=True))
  want = value_and_grads(lambda q, k, v: plain_attention(q, k, v, rows.segment_ids_BT))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  'dtype, length, head_dim, platform, want',
  [
    ('float32', 256, 64, 'cpu', 'xla'),
    ('bfloat16', 256, 64, 'gpu', 'cudnn'),
    ('float32', 256, 64, 'gpu', 'xla'),
    ('bfloat16', 255, 64, 'gpu', 'xla'),
    ('bfloat16', 256, 12, 'gpu', 'xla'),
    ('bfloat16', 256, 160, 'gpu', 'xla'),
    ('bfloat16', 256, 12, 'tpu', 'splash'),
    ('bfloat16', 250, 12, 'tpu', 'xla'),
  ],
)
def test_auto_is_what_the_platform_has(dtype, length, head_dim, platform, want):
  model = tiny_config(**{'model.compute_dtype': dtype, 'model.num_heads': 2, 'model.width': 2 * head_dim}).model
  assert choose_attention(model, length, platform) == want


@pytest.mark.parametrize('kind, platform', [('cudnn', 'cpu'), ('splash', 'gpu'), ('cudnn', 'tpu')])
def test_attention_that_is_not_there_is_a_sentence(kind, platform):
  with pytest.raises(BadInput, match=f"config.model.attention='{kind}' on {platform}"):
    choose_attention(tiny_config(**{'model.attention': kind}).model, 256, platform)


def test_a_long_row_is_attended_to_in_halves_without_a_difference():
  """Also one of an odd length, with documents that end on either side of the middle."""
  T = 131
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(2, T, 2, 8)), jnp.float32) for _ in range(3))
  ids_BT = jnp.asarray(np.stack([np.arange(T) // 50 + 1, np.ones(T)]), jnp.int32)
  rows = Rows(jnp.zeros((2, T), jnp.int32), ids_BT)
  mask = (ids_BT[:, :, None] == ids_BT[:, None, :])[:, None]

  def grads(attention):
    y, pull = jax.vjp(attention, q, k, v)
    return y, pull(jnp.cos(y))

  ours = grads(lambda q, k, v: plain_attention(q, k, v, rows.segment_ids_BT))
  theirs = grads(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def test_gradients_of_plain_attention_in_bfloat16_are_those_of_the_dtype():
  """Also where all keys, and all values, have a part in common, as a bias gives them."""
  q, k, v, dy = (jax.random.normal(key, (2, 256, 2, 32)) for key in jax.random.split(jax.random.key(0), 4))
  k, v = k + 3, v + 2
  pull = lambda dtype: jax.vjp(lambda *qkv: plain_attention(*qkv, None), *(x.astype(dtype) for x in (q, k, v)))[1]
  for got, want in zip(pull(jnp.bfloat16)(dy.astype(jnp.bfloat16)), pull(jnp.float32)(dy), strict=True):
    assert jnp.linalg.norm(got - want) < 0.01 * jnp.linalg.norm(want)
