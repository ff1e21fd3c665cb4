"""A board of slots that never stops: requests come and go between two iterations while the other rows think on.

Continuous depth batching (`continuous.py`) over a batch whose rows change hands. A request is read alone, in the shape
class of its prompt, and its row is laid into the buffers of its slot; everything after that is one program.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from latent_loop.errors import BadInput
from latent_loop.inference.cache import cache_bytes, new_cache
from latent_loop.inference.continuous import Flight, fly, start_tokens, take_off
from latent_loop.inference.decode import Asks, Decoding, begin
from latent_loop.inference.engine import Answer, Engine, Request, answer_of, asks_of, columns_of, parse_cache, round_up
from latent_loop.model import Model, Params
from latent_loop.parallel import memory

MAX_STOPS = 4  # tokens that end a row


class Board:
  """`slots` rows of up to max_total_tokens tokens, prompt and answer, none deeper than max_depth.

  The answers are those that `engine.answer` gives. Not for two threads at once. Raises BadInput when the buffers do
  not fit the memory, before they are made.
  """

  def __init__(self, engine: Engine, slots: int, max_depth: int, max_total_tokens: int):
    if engine.speculate is not None or engine.wavefront is not None:
      raise BadInput('--speculate and --parallel decode a batch together; rows that come and go have to decode alone')
    if max_total_tokens > engine.most_tokens:
      raise BadInput(
        f'--max_total_tokens={max_total_tokens} is too far beyond the rows that the model was trained on; give '
        f'{engine.most_tokens} or less'
      )
    self.engine, self.max_depth, self.max_total_tokens = engine, max_depth, max_total_tokens
    self.requests: list[Request | None] = [None] * slots
    self._slots = parse_cache(engine.cache, max_depth)
    self._window = max(1, slots // 4)  # rows that start their next token together
    self.nbytes = cache_bytes(engine.model.cfg, self._slots, slots, max_total_tokens)
    memory.check_cache(self.nbytes)
    with jax.set_mesh(engine.mesh):
      self._flight, self._asks = self._empty()

  @property
  def free(self) -> list[int]:
    return [slot for slot, request in enumerate(self.requests) if request is None]

  def check(self, request: Request) -> None:
    """Raises BadInput for what this board cannot answer."""
    total, low, high = len(request.tokens) + request.max_new_tokens, min(request.tokens), max(request.tokens)
    vocab_size = self.engine.model.cfg.vocab_size
    for fits, sentence in (
      (
        total <= self.max_total_tokens,
        f'a prompt of {len(request.tokens)} tokens and max_new_tokens={request.max_new_tokens} are more than the '
        f'{self.max_total_tokens} tokens that fit together; shorten one of them',
      ),
      (
        request.depth <= self.max_depth,
        f'depth={request.depth} is above {self.max_depth}; ask for less, or see --max_depth',
      ),
      (len(request.stops) <= MAX_STOPS, f'{len(request.stops)} stop tokens; give {MAX_STOPS} or fewer'),
      (0 <= low and high < vocab_size, f'token ids from {low} to {high}; the model knows 0 to {vocab_size - 1}'),
    ):
      if not fits:
        raise BadInput(sentence)

  def admit(self, slot: int, request: Request) -> Answer:
    """Reads the prompt into a free slot; the answer's first token. Raises BadInput, and then nothing has changed."""
    self.check(request)
    model, params = self.engine.model, self.engine.params
    width = min(round_up(len(request.tokens)), self.max_total_tokens)
    tokens_1T = np.zeros((1, width), np.int32)
    tokens_1T[0, : len(request.tokens)] = request.tokens
    asks = asks_of([request])
    options = {'slots': self._slots, 'places': width, 'new': self.max_total_tokens}
    with jax.set_mesh(self.engine.mesh):
      row = begin(model, params, tokens_1T, np.array([len(request.tokens)], np.int32), asks, **options)
      answer = answer_of(columns_of(row), 0, request)
      if answer.finish is None:
        self._flight, self._asks = _lay(self._flight, self._asks, row, asks, np.int32(slot))
        self._flight = _start(model, params, self._flight, self._asks, np.array([slot], np.int32))
        self.requests[slot] = request
    return answer

  def advance(self, iterations: int) -> dict[int, Answer]:
    """Up to so many applications of the core to all rows; the answers so far by slot. Finished rows are released."""
    engine = self.engine
    with jax.set_mesh(engine.mesh):
      self._flight = fly(
        engine.model,
        engine.params,
        self._flight,
        self._asks,
        np.int32(iterations),
        slots=self._slots,
        window=self._window,
      )
      columns = columns_of(self._flight.decoding)
    taken = [(slot, request) for slot, request in enumerate(self.requests) if request is not None]
    answers = {slot: answer_of(columns, slot, request) for slot, request in taken}
    for slot, answer in answers.items():
      if answer.finish is not None:
        self.requests[slot] = None
    return answers

  def release(self, slot: int) -> None:
    """The row in this slot stops; the others do not notice."""
    self.requests[slot] = None
    with jax.set_mesh(self.engine.mesh):
      self._flight = _stop(self._flight, np.int32(slot))

  def clear(self) -> None:
    """All slots free again, also after a call that failed half-way."""
    self.requests = [None] * len(self.requests)
    with jax.set_mesh(self.engine.mesh):
      self._flight, self._asks = self._empty()

  def _empty(self) -> tuple[Flight, Asks]:
    engine, B = self.engine, len(self.requests)
    asks = asks_of([Request((0,), depth=1)] * B)

    def one_token(params):
      zero_B1, one_B = jnp.zeros((B, 1), jnp.int32), jnp.ones((B,), jnp.int32)
      row = begin(engine.model, params, zero_B1, one_B, asks, slots=self._slots, places=1, new=self.max_total_tokens)
      return take_off(engine.model, params, row, asks)

    shapes = jax.eval_shape(one_token, engine.params)
    flight = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    cache = jax.jit(lambda: new_cache(engine.model.cfg, self._slots, B, self.max_total_tokens))()
    return dataclasses.replace(flight, decoding=dataclasses.replace(flight.decoding, cache=cache)), asks


@functools.partial(jax.jit, donate_argnames='flight')
def _lay(flight: Flight, asks: Asks, row: Decoding, row_asks: Asks, slot: jax.Array) -> tuple[Flight, Asks]:
  """The flight with a batch of one in `slot`, and nothing of an earlier row: what is not seen counts 0 times, and 0
  times a value that is not finite would reach every answer after it.
  """

  def into(old, new, axis):
    start = [0] * old.ndim
    start[axis] = slot
    return jax.lax.dynamic_update_slice(old, new, start)

  first = lambda old, new: into(old, new, axis=0)
  alone = lambda old, new: jnp.pad(new, [(0, 0)] * 3 + [(0, old.shape[3] - new.shape[3]), (0, 0)])
  this = flight.decoding
  cache = jax.tree.map(lambda old, new: into(old, alone(old, new), axis=1), this.cache, row.cache)
  rest = jax.tree.map(first, dataclasses.replace(this, cache=None), dataclasses.replace(row, cache=None))
  flight = dataclasses.replace(
    flight, decoding=dataclasses.replace(rest, cache=cache), left_B=flight.left_B.at[slot].set(False)
  )
  return flight, jax.tree.map(first, asks, row_asks)


@functools.partial(jax.jit, static_argnames='model', donate_argnames='flight')
def _start(model: Model, params: Params, flight: Flight, asks: Asks, slot_1: jax.Array) -> Flight:
  return start_tokens(model, params, flight, asks, slot_1)


@functools.partial(jax.jit, donate_argnames='flight')
def _stop(flight: Flight, slot: jax.Array) -> Flight:
  this = flight.decoding
  this = dataclasses.replace(this, running_B=this.running_B.at[slot].set(False))
  return dataclasses.replace(flight, decoding=this, left_B=flight.left_B.at[slot].set(False))
