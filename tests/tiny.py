"""What the tests share: a config of tiny, pairwise different sizes, packed random batches, requests, comparisons."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from latent_loop.batch import Batch
from latent_loop.config import Config, MeshConfig
from latent_loop.inference.engine import Answer, Engine, Request
from latent_loop.model import Model, build
from latent_loop.model.layers import Rows
from latent_loop.parallel import mesh as meshes
from latent_loop.parallel import sharding
from latent_loop.sealing import seal, view
from latent_loop.step import TrainState
from latent_loop.trust import guards

# Pairwise different, and divisible by what the meshes of the tests need.
B, T, D, N, H, F, V, K = 8, 10, 48, 4, 12, 40, 68, 3  # K: backprop_depth

_SIZES = {
  'model.vocab_size': V,
  'model.width': D,
  'model.num_heads': N,
  'model.mlp_dim': F,
  'model.num_core_layers': 1,
  'depth.mean': 6,
  'depth.backprop_depth': K,
  'data.seq_len': T,
  'train.batch_size': B,
  'train.num_steps': 20,
  'train.loss_chunk': 5,
}


def tiny_config(**overrides: Any) -> Config:
  """A sealed config; overrides by dotted path: tiny_config(**{'model.remat': 'none'})."""
  config = view(Config())
  config.update_from_flattened_dict({**_SIZES, **overrides})
  return seal(config)


def tiny_model(**overrides: Any) -> Model:
  config = tiny_config(**overrides)
  return build(config.model, config.depth)


def random_params(model: Model, seed: int = 0) -> dict[str, Any]:
  """Parameters of the usual sizes in which no bias is zero and no scale is one; made without compiling `init`."""
  rng = np.random.default_rng(seed)

  def one(keypath, shape):
    noise = rng.standard_normal(shape.shape)
    kernel = sharding.path_of(keypath).endswith(('/kernel', '/embedding', '/b'))
    return np.float32(0.15 * noise if kernel else 0.1 * noise + sharding.path_of(keypath).endswith('/scale'))

  return jax.tree_util.tree_map_with_path(one, jax.eval_shape(model.init, jax.random.key(0)))


def start_state(config: Config, model: Model, optimizer: optax.GradientTransformation, seed: int = 0) -> TrainState:
  """A train state at step 0 around random_params, on the host."""
  params = random_params(model, seed)
  ema = jax.tree.map(np.copy, params) if config.optim.ema_decay else None
  return jax.device_get(TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, guards.Skips.none()))


def random_batch(seed: int = 0, rows: int = B, seq_len: int = T, vocab_size: int = V, pad: int = 0) -> Batch:
  """Rows of packed documents of random lengths; every second row ends in padding of token `pad`."""
  rng = np.random.default_rng(seed)
  stream = rng.integers(0, vocab_size, (rows, seq_len + 1))
  starts = rng.random((rows, seq_len)) < 0.3
  starts[:, 0] = True
  segments = np.cumsum(starts, axis=1)
  index = np.arange(seq_len)[None]
  positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
  real = index < np.where(np.arange(rows) % 2, seq_len - 2, seq_len)[:, None]
  same = np.c_[segments[:, 1:] == segments[:, :-1], np.ones(rows, bool)] & np.c_[real[:, 1:], real[:, -1:]]
  weights = same * rng.choice([0.5, 1.0], same.shape)
  return Batch(
    tokens_BT=np.where(real, stream[:, :-1], pad).astype(np.int32),
    targets_BT=np.where(same, stream[:, 1:], pad).astype(np.int32),
    weights_BT=weights.astype(np.float32),
    positions_BT=positions.astype(np.int32),
    segment_ids_BT=np.where(real, segments, 0).astype(np.int32),
  )


def rows_of(batch: Batch) -> Rows:
  return Rows(jnp.asarray(batch.positions_BT), jnp.asarray(batch.segment_ids_BT))


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
  """A mesh on the first data * fsdp * tensor devices."""
  return meshes.make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def leaves_by_path(tree: Any) -> dict[str, np.ndarray]:
  """Path -> array on the host; keys of random numbers have no place here."""
  return {sharding.path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def worst_relative(got: Any, want: Any) -> tuple[float, str]:
  """(largest |got - want| / |want| over the arrays of two trees, in the 2-norm, the path of that array)."""
  got, want = leaves_by_path(got), leaves_by_path(want)
  assert got.keys() == want.keys()
  error = lambda name: np.linalg.norm(got[name] - want[name]) / max(np.linalg.norm(want[name]), 1e-30)
  return max((float(error(name)), name) for name in want)


def assert_same_bits(got: Any, want: Any) -> None:
  """Every array of two trees has the same bytes; names the first that differs."""
  got, want = leaves_by_path(got), leaves_by_path(want)
  assert got.keys() == want.keys()
  for name in want:
    assert got[name].tobytes() == want[name].tobytes(), f'{name} differs'


def ragged_requests(
  engine: Engine, temperature: tuple[float, float] = (0.0, 0.0)
) -> tuple[list[Request], list[Answer]]:
  """Eight requests of token ids below 5 that differ in all they can, some of which stop early, and their answers.

  temperature: of the first four and of the others.
  """
  prompts = [(3, 1, 4), (1,), (0, 4, 2, 1, 0), (3, 0), (2, 3, 1, 3), (3, 2), (3, 1, 4, 1), (2, 0, 4)]
  depths, limits = (6, 1, 4, 3, 6, 2, 5, 6), (9, 9, 2, 1, 5, 9, 9, 8)
  requests = [
    Request(p, depth, limit, seed=i, repetition_penalty=1.0 + 0.2 * (i % 2), temperature=temperature[i // 4])
    for i, (p, depth, limit) in enumerate(zip(prompts, depths, limits, strict=True))
  ]
  answers = engine.answer(requests)
  stops = [(answers[i].tokens[-2],) if i in (0, 5, 7) else () for i in range(8)]
  requests = [dataclasses.replace(r, stops=s) for r, s in zip(requests, stops, strict=True)]
  return requests, engine.answer(requests)


def assert_same_answers(got: list[Answer], want: list[Answer]) -> None:
  """But for how they were found."""
  for a, b in zip(got, want, strict=True):
    assert (a.tokens, a.depths, a.finish) == (b.tokens, b.depths, b.finish)
    np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=0, atol=1e-5)
