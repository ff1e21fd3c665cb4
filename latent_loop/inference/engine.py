"""Requests in, answers out: what a person or a server calls. Rows of one batch may ask for different things.

Shapes are rounded up to powers of two, so one compiled program serves every prompt, depth and rule of a class.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from latent_loop.config.rules import LARGEST, count_of
from latent_loop.errors import BadInput
from latent_loop.inference import exits as rules
from latent_loop.inference.cache import Slots, cache_bytes
from latent_loop.inference.continuous import fly, take_off
from latent_loop.inference.decode import NO_TOKEN, Asks, Decoding, begin, go_on
from latent_loop.inference.exits import Exits
from latent_loop.inference.sampling import Sampling
from latent_loop.inference.speculate import Draft, Speculation, leap
from latent_loop.inference.wavefront import Front, Wavefront, line_up, roll
from latent_loop.model import Model, Params, build
from latent_loop.parallel import memory

_SMALLEST = 16  # columns of a shape class, at least
_TINIEST, _MOST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))  # what devices hold
State = Decoding | Speculation | Front


def _require(condition: bool, sentence: str) -> None:
  if not condition:
    raise BadInput(sentence)


@dataclasses.dataclass(frozen=True)
class ExitRule:
  """When a token stops thinking; checks start at min_depth and come every `every` iterations. See exits.CRITERIA."""

  kind: str = 'none'
  threshold: float | None = None  # None: that of the paper or the reference
  min_depth: int = 1
  every: int = 1

  def __post_init__(self):
    known = ', '.join(rules.CRITERIA)
    _require(self.kind in rules.CRITERIA, f'--exit={self.kind!r}: no such criterion; choose one of {known}')
    rule = f'--exit={self.kind}:{self.value:g}'
    _require(math.isfinite(self.value) and self.value >= 0, f'{rule}: a threshold is a number from 0 up, such as 5e-4')
    for name in ('min_depth', 'every'):
      number = vars(self)[name]
      _require(1 <= number <= LARGEST, f'{rule}: {name}={number} is out of range; give a number from 1 to {LARGEST}')

  @property
  def value(self) -> float:
    return rules.THRESHOLDS[self.kind] if self.threshold is None else self.threshold

  @classmethod
  def parse(cls, text: str) -> 'ExitRule':
    """'kl', 'kl:5e-4', 'latent-diff:0.03:4:2' (kind:threshold:min_depth:every); raises BadInput."""
    kind, *numbers = text.split(':')
    try:
      if len(numbers) > 3:
        raise ValueError('it has more than four parts')
      threshold = float(numbers[0]) if numbers and numbers[0] else None
      counts = [int(number) for number in numbers[1:]]
    except ValueError as error:
      raise BadInput(f'--exit={text}: {error}; the rule is KIND[:THRESHOLD[:MIN_DEPTH[:EVERY]]]') from error
    return cls(kind, threshold, *counts)


def parse_cache(text: str, max_depth: int) -> Slots:
  """The slots that 'full' (the same as 'latest'), 'ring:M' or 'first:M' mean for depths up to max_depth.

  Raises BadInput.
  """
  kind, _, number = text.partition(':')
  if kind in ('full', 'latest') and not number:
    return Slots(max_depth)
  held = count_of(number) or 0
  if kind in ('ring', 'first') and 1 <= held <= LARGEST:
    count = held if kind == 'ring' else held + 1
    return Slots(min(count, max_depth), ring=kind == 'ring' and count < max_depth)
  raise BadInput(f'--cache={text}: no such cache; use full, latest, ring:M or first:M with M from 1, such as ring:1')


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt and what is asked of it; raises BadInput for what cannot be.

  tokens: the prompt. depth: iterations per token at most. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and
  repetition_penalty 1 are off. stops: tokens that end the answer. state_scale: of the initial state, 0 for zero.
  """

  tokens: tuple[int, ...]
  depth: int
  max_new_tokens: int = 128
  exit: ExitRule = ExitRule()
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  seed: int = 0
  stops: tuple[int, ...] = ()
  warm_start: bool = False
  state_scale: float = 1.0

  def __post_init__(self):
    _require(bool(self.tokens), '--prompt: it has no tokens; give at least one')
    for name, low in (('depth', 1), ('max_new_tokens', 1), ('seed', 0), ('top_k', 0)):
      value = vars(self)[name]
      _require(low <= value <= LARGEST, f'--{name}={value} is out of range; give a number from {low} to {LARGEST}')
    for name, low, high, hint in (
      ('temperature', 0, _MOST, '0 is greedy, 0.7 is usual'),
      ('top_p', 0, 1, '1 keeps every token, 0.95 is usual'),
      ('min_p', 0, 1, '0 keeps every token, 0.05 is usual'),
      ('state_scale', 0, _MOST, '1 is what training used'),
      ('repetition_penalty', _TINIEST, _MOST, '1 is none'),
    ):
      value = vars(self)[name]
      _require(low <= value <= high, f'--{name}={value}: not a number from {low:g} to {high:g}; {hint}')


@dataclasses.dataclass(frozen=True)
class Answer:
  """tokens: a stop token included. log_probs: of the model, before any sampling rule. depths: iterations per token;
  those of a front may exceed what was asked, which counts at its head only.

  finish: 'stop', 'length', or None while more may come. drafts, accepted: tokens drafted, and those of them that full
  depth accepted, where the engine speculates. steps: of a wavefront.
  """

  tokens: list[int]
  log_probs: list[float]
  depths: list[int]
  finish: str | None
  drafts: int = 0
  accepted: int = 0
  steps: int = 0


def asks_of(requests: list[Request]) -> Asks:
  number = lambda name: jnp.array([vars(r)[name] for r in requests], jnp.float32)
  whole = lambda name: jnp.array([vars(r)[name] for r in requests], jnp.int32)
  exit_of = lambda name, dtype: jnp.array([vars(r.exit)[name] for r in requests], dtype)
  exits = Exits(
    kind_B=jnp.array([rules.CRITERIA.index(r.exit.kind) for r in requests], jnp.int32),
    threshold_B=jnp.array([r.exit.value for r in requests], jnp.float32),
    min_depth_B=exit_of('min_depth', jnp.int32),
    every_B=exit_of('every', jnp.int32),
    max_depth_B=whole('depth'),
  )
  sampling = Sampling(
    number('temperature'),
    whole('top_k'),
    number('top_p'),
    number('min_p'),
    number('repetition_penalty'),
    whole('seed'),
  )
  most = round_up(max(len(r.stops) for r in requests), 4)
  stops_BK = [[*r.stops, *[NO_TOKEN] * (most - len(r.stops))] for r in requests]
  warm_B = jnp.array([r.warm_start for r in requests], bool)
  return Asks(exits, sampling, whole('max_new_tokens'), jnp.array(stops_BK, jnp.int32), warm_B, number('state_scale'))


def round_up(number: int, smallest: int = _SMALLEST) -> int:
  """The next power of two."""
  return max(smallest, 1 << (number - 1).bit_length() if number > 1 else 1)


class Engine:
  """A model ready to answer, on the devices of `mesh`."""

  def __init__(
    self,
    model: Model,
    params: Params,
    mesh: Mesh,
    cache: str = 'full',
    speculate: Draft | None = None,
    wavefront: Wavefront | None = None,
    most_tokens: int = LARGEST,
    most_depth: int = LARGEST,
  ):
    """cache: 'full', 'latest', 'ring:M' or 'first:M'; raises BadInput.

    speculate, wavefront: how `answer` and `stream` decode, instead of token by token. most_tokens: of a prompt and
    its answer. most_depth: of a token.
    """
    _require(
      speculate is None or wavefront is None, '--speculate and --parallel are two ways to decode; leave one of them out'
    )
    parse_cache(cache, 1)
    # Rematerialization serves a backward pass only, and blocks under it cannot hand out their buffers.
    self.model = build(dataclasses.replace(model.cfg, remat='none'), model.depth)
    self.mesh, self.cache, self.most_tokens, self.most_depth = mesh, cache, most_tokens, most_depth
    self.speculate, self.wavefront = speculate, wavefront
    with jax.set_mesh(mesh):
      self.params = jax.jit(model.cast)(params)

  def answer(self, requests: list[Request]) -> list[Answer]:
    """All answers, once the last is done."""
    *_, last = self.stream(requests, every=LARGEST)
    return last

  def stream(self, requests: list[Request], every: int = 1) -> Iterator[list[Answer]]:
    """The answers so far, after the first token and then after every `every` more.

    With `speculate` or `wavefront`, after as many drafts or steps, which may add several tokens or none.
    """
    asks, slots = asks_of(requests), self._class_of(requests)[0]
    with jax.set_mesh(self.mesh):
      this, go = self._way(self._begin(requests, asks), asks, slots, np.int32(every))
      yield _answers(this, requests)
      while np.any(jax.device_get(_decoding_of(this).running_B)):
        this = go(this)
        yield _answers(this, requests)

  def _way(self, decoding: Decoding, asks: Asks, slots: Slots, turns: np.int32) -> tuple[State, Callable]:
    """(the rows as this engine's way of decoding needs them, what takes them further)."""
    model, params = self.model, self.params
    if self.speculate is not None:
      draft = self.speculate
      go = lambda this: leap(
        model, params, this, asks, np.int32(draft.iterations), turns, slots=slots, lookahead=draft.lookahead
      )
      return Speculation.of(decoding), go
    if self.wavefront is not None:
      front = line_up(model, decoding, asks, width=self.wavefront.width)
      return front, lambda this: roll(model, params, this, asks, self.wavefront.numbers, turns)
    return decoding, lambda this: go_on(model, params, this, asks, turns, slots=slots)

  def answer_flying(self, requests: list[Request], window: int) -> list[Answer]:
    """The same answers by continuous depth batching; `window` rows at a time start their next token.

    Raises BadInput where the engine decodes in another way.
    """
    _require(
      self.speculate is None and self.wavefront is None,
      '--speculate and --parallel go through a batch in step, and rows at different depths do not; choose one of them',
    )
    asks, slots = asks_of(requests), self._class_of(requests)[0]
    window = min(window, len(requests))
    with jax.set_mesh(self.mesh):
      flight = take_off(self.model, self.params, self._begin(requests, asks), asks)
      flight = fly(self.model, self.params, flight, asks, np.int32(LARGEST), slots=slots, window=window)
      return _answers(flight.decoding, requests)

  def _begin(self, requests: list[Request], asks: Asks) -> Decoding:
    slots, width, new = self._class_of(requests)
    tokens_BT = np.zeros((len(requests), width), np.int32)
    for row, request in zip(tokens_BT, requests, strict=True):
      row[: len(request.tokens)] = request.tokens
    lengths_B = np.array([len(r.tokens) for r in requests], np.int32)
    return begin(self.model, self.params, tokens_BT, lengths_B, asks, slots=slots, places=width + new, new=new)

  def bytes_of(self, requests: list[Request]) -> int:
    """Memory of the cache that answering these together takes."""
    slots, width, new = self._class_of(requests)
    return cache_bytes(self.model.cfg, slots, len(requests), width + new)

  def _class_of(self, requests: list[Request]) -> tuple[Slots, int, int]:
    """(slots, columns for prompts, columns for new tokens); raises BadInput for what this engine cannot answer."""
    _require(bool(requests), '--prompt: no prompt given; give at least one')
    for request in requests:
      low, high, vocab_size = min(request.tokens), max(request.tokens), self.model.cfg.vocab_size
      _require(
        0 <= low and high < vocab_size,
        f'a prompt has token ids from {low} to {high}; the model knows 0 to {vocab_size - 1}, use its own tokenizer',
      )
    slots = parse_cache(self.cache, max(r.depth for r in requests))
    self._check_way(requests, slots)
    for r in requests:
      _require(
        r.depth <= self.most_depth,
        f'--depth={r.depth} is above {self.most_depth}, too far beyond the depths that the model was trained at; '
        'ask for less',
      )
      _require(
        len(r.tokens) + r.max_new_tokens <= self.most_tokens,
        f'a prompt of {len(r.tokens)} tokens and --max_new_tokens={r.max_new_tokens} are more than {self.most_tokens} '
        'together, too far beyond the rows that the model was trained on; shorten one of them',
      )
    width, new = round_up(max(len(r.tokens) for r in requests)), round_up(max(r.max_new_tokens for r in requests))
    memory.check_cache(cache_bytes(self.model.cfg, slots, len(requests), width + new))
    return slots, width, new

  def _check_way(self, requests: list[Request], slots: Slots) -> None:
    """Raises BadInput for what does not go together with this engine's way of decoding."""
    way = '--speculate' if self.speculate is not None else '--parallel' if self.wavefront is not None else None
    if way is None:
      return
    _require(
      all(r.exit.kind == 'none' and not r.warm_start for r in requests),
      f'{way} has its own rule for how long a token thinks and where it starts; leave out --exit and --warm_start',
    )
    depth = max(r.depth for r in requests)
    _require(
      self.speculate is None or slots.count == depth,
      f'--speculate with --cache={self.cache}: a draft is exact only where each iteration has its own slot; use '
      '--cache=full',
    )
    _require(
      self.wavefront is None or slots.count == 1,
      f'--parallel with --cache={self.cache}: positions of a front differ in their iterations and have to share one '
      'slot; use --cache=ring:1',
    )


def _decoding_of(state: State) -> Decoding:
  return state if isinstance(state, Decoding) else state.decoding


def columns_of(decoding: Decoding) -> dict[str, np.ndarray]:
  """What an answer is made of, on the host."""
  names = ('count_B', 'running_B', 'tokens_BM', 'log_p_BM', 'depth_BM')
  return jax.device_get({name: vars(decoding)[name] for name in names})


def answer_of(columns: dict[str, np.ndarray], b: int, request: Request, **counts: int) -> Answer:
  """The answer so far of row b."""
  count = columns['count_B'][b]
  tokens, log_probs, depths = (columns[name][b, :count].tolist() for name in ('tokens_BM', 'log_p_BM', 'depth_BM'))
  finish = 'stop' if tokens[-1] in request.stops else 'length'
  return Answer(tokens, log_probs, depths, None if columns['running_B'][b] else finish, **counts)


def _answers(state: State, requests: list[Request]) -> list[Answer]:
  decoding = _decoding_of(state)
  counts = {} if state is decoding else jax.device_get(state.counts)
  columns = columns_of(decoding)
  ours = lambda b: {name: int(count_B[b]) for name, count_B in counts.items()}
  return [answer_of(columns, b, request, **ours(b)) for b, request in enumerate(requests)]
