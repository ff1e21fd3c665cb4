"""Keys and values of the tokens so far: a [slot, batch, head, position, dim] buffer per layer, and one rule for slots.

Prelude and coda have one slot. Iteration t of the core reads and writes slot f(t), which `Slots` says: a slot per
depth, or a few that depths share (2502.05171 section 6.2; the reference's compress-s is a ring). A token that
stopped early fills the slots of the depths it never reached with its last keys and values, so a deeper token sees it
at its last iteration and reads never search.

Place p of the buffer holds position p of the row. Letters: R slots, S places.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from latent_loop.config import ModelConfig
from latent_loop.kernels.plain import masked_attention, scaled
from latent_loop.model.layers import Rows
from latent_loop.parallel.sharding import ROW_AXES, constrain

Layer = tuple[jax.Array, jax.Array]  # keys_RBNSH, values_RBNSH


@dataclasses.dataclass(frozen=True)
class Slots:
  """f(t), the slot of iteration t = 0, 1, ...: t mod count in a ring; else t, the last slot serving all deeper ones."""

  count: int
  ring: bool = False

  def of(self, t: jax.Array) -> jax.Array:
    return t % self.count if self.ring else jnp.minimum(t, self.count - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  prelude: list[Layer]
  core: list[Layer]
  coda: list[Layer]

  @property
  def places(self) -> int:
    return self.core[0][0].shape[3]


def _shapes(cfg: ModelConfig, slots: Slots, batch: int, places: int) -> dict[str, list[tuple[int, ...]]]:
  shape = lambda count: (count, batch, cfg.num_heads, places, cfg.head_dim)
  layers = {'prelude': cfg.num_prelude_layers, 'core': cfg.num_core_layers, 'coda': cfg.num_coda_layers}
  return {part: [shape(slots.count if part == 'core' else 1)] * count for part, count in layers.items()}


def new_cache(cfg: ModelConfig, slots: Slots, batch: int, places: int) -> Cache:
  """Empty buffers; rows are split over the mesh where they divide, heads over its tensor axis."""
  mesh = jax.sharding.get_abstract_mesh()
  ways = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROW_AXES)
  rows = ROW_AXES if batch % ways == 0 else None
  zeros = lambda shape: constrain(jnp.zeros(shape, cfg.compute_dtype), None, rows, 'tensor', None, None)
  parts = _shapes(cfg, slots, batch, places)
  return Cache(**{part: [(zeros(shape), zeros(shape)) for shape in shapes] for part, shapes in parts.items()})


def cache_bytes(cfg: ModelConfig, slots: Slots, batch: int, places: int) -> int:
  """Memory that `new_cache` takes, over all devices."""
  sizes = [math.prod(shape) for shapes in _shapes(cfg, slots, batch, places).values() for shape in shapes]
  return 2 * sum(sizes) * jnp.dtype(cfg.compute_dtype).itemsize


class CachedRows:
  """What attention must know about tokens that follow cached ones; stands where `Rows` stands in training.

  Made inside a traced function for one pass through the blocks of one part, which call `attend` in order; afterwards
  `written` holds their buffers. Models whose blocks are rematerialized cannot run on it.

  slot: scalar, or one per row. positions_BT: of the tokens. writes_BT: whose keys and values are kept.
  fresh: the tokens are each row's first, at positions 0 to T - 1; then the platform's own attention serves.
  rows_B: which rows of the buffers the tokens belong to; None: all, in order.
  """

  def __init__(
    self, layers: list[Layer], slot, positions_BT: jax.Array, writes_BT: jax.Array, fresh: bool, rows_B=None
  ):
    self.positions_BT, self.turn, self.written = positions_BT, None, []
    self._layers, self._slot, self._writes_BT, self._fresh = layers, jnp.asarray(slot), writes_BT, fresh
    self._rows_B = rows_B

  def attend(self, q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Attention over everything up to the token's own position."""
    old = self._layers[len(self.written)]
    keys_RBNSH, values_RBNSH = self._write(old[0], k_BTNH), self._write(old[1], v_BTNH)
    self.written.append((keys_RBNSH, values_RBNSH))
    if self._fresh:
      return Rows(self.positions_BT, None).attend(q_BTNH, k_BTNH, v_BTNH, cfg)
    seen_BTS = jnp.arange(keys_RBNSH.shape[3])[None, None] <= self.positions_BT[..., None]
    part = self._read(keys_RBNSH), self._read(values_RBNSH), seen_BTS[:, None]
    out_BNTH = masked_attention(scaled(q_BTNH).swapaxes(1, 2), [part])
    return out_BNTH.swapaxes(1, 2)

  def _write(self, old_RBNSH: jax.Array, new_BTNH: jax.Array) -> jax.Array:
    B, T, N, H = new_BTNH.shape
    if self._fresh:
      start, size = (self._slot, 0, 0, 0, 0), (1, B, N, T, H)
      kept_RBNTH = jax.lax.dynamic_slice(old_RBNSH, start, size)
      new_RBNTH = jnp.where(self._writes_BT[None, :, None, :, None], new_BTNH.swapaxes(1, 2)[None], kept_RBNTH)
      return jax.lax.dynamic_update_slice(old_RBNSH, new_RBNTH, start)
    # A place behind the last is dropped.
    places_BT = jnp.where(self._writes_BT, self.positions_BT, old_RBNSH.shape[3])
    slot_BT = self._slot if self._slot.ndim == 0 else self._slot[:, None]
    rows_B = jnp.arange(B) if self._rows_B is None else self._rows_B
    return old_RBNSH.at[slot_BT, rows_B[:, None], :, places_BT].set(new_BTNH, mode='drop')

  def _read(self, buffer_RBNSH: jax.Array) -> jax.Array:
    if self._slot.ndim and buffer_RBNSH.shape[0] > 1:
      rows_B = jnp.arange(len(self._slot)) if self._rows_B is None else self._rows_B
      return buffer_RBNSH[self._slot, rows_B]
    slot = self._slot if self._slot.ndim == 0 else 0
    buffer_BNSH = jax.lax.dynamic_index_in_dim(buffer_RBNSH, slot, keepdims=False)
    return buffer_BNSH if self._rows_B is None else buffer_BNSH[self._rows_B]


def fill_deeper(layers: list[Layer], slots: Slots, depth_B: jax.Array, positions_BT: jax.Array, writes_BT: jax.Array):
  """The core's buffers with every slot that these tokens did not reach, in depth_B iterations, holding their last."""
  R = slots.count
  if R == 1:
    return layers
  row_B1 = jnp.arange(len(depth_B))[:, None]
  last_B1 = slots.of(depth_B - 1)[:, None]
  deeper_RB1 = jnp.arange(R)[:, None, None] >= depth_B[None, :, None]

  def fill(buffer_RBNSH):
    places_RBT = jnp.where(deeper_RB1 & writes_BT[None], positions_BT[None], buffer_RBNSH.shape[3])
    last_BTNH = buffer_RBNSH[last_B1, row_B1, :, positions_BT]
    last_RBTNH = jnp.broadcast_to(last_BTNH[None], (R, *last_BTNH.shape))
    return buffer_RBNSH.at[jnp.arange(R)[:, None, None], row_B1[None], :, places_RBT].set(last_RBTNH, mode='drop')

  return [(fill(keys), fill(values)) for keys, values in layers]
