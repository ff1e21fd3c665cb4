"""Synthetic tasks with a known answer whose difficulty is a number: what thinking longer should help with.

An instance is a list of (text, is_answer) pieces; only answer bytes are predicted. `key` is the part
that decides the answer: a hash of it assigns the instance to train or validation, so no validation key
is ever trained on. Row i of a split is a pure function of (seed, split, i).
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable

import numpy as np

from latent_loop.config import DataConfig
from latent_loop.data.packing import Row, window_to_row
from latent_loop.errors import BadInput
from latent_loop.tokenizer import utf8

_LETTERS = 'abcdefghijklmnopqrstuvwxyz'
_PERMUTATIONS = tuple(itertools.permutations(range(3)))
_SWAPS = tuple(itertools.combinations(range(5), 2))
_MOVES = {'a': '7613240958', 'b': '9637108452', 'c': '7542961308', 'd': '1826095734'}  # letter -> next state of 0 .. 9
_SPLITS = {'train': 0, 'validation': 1}


@dataclasses.dataclass(frozen=True)
class Instance:
  key: str
  pieces: tuple[tuple[str, bool], ...]

  @property
  def text(self) -> str:
    return ''.join(text for text, _ in self.pieces)


def addition(rng: np.random.Generator, difficulty: int) -> Instance:
  """Two numbers of `difficulty` digits; as many digits of the sum, lowest first, as carries run."""
  a, b = (int(''.join(map(str, rng.integers(0, 10, difficulty)))) for _ in range(2))
  answer = f'{(a + b) % 10**difficulty:0{difficulty}}'[::-1]
  pieces = ((f'{a:0{difficulty}}+{b:0{difficulty}}=', False), (answer, True))
  return Instance(f'{difficulty} {min(a, b)}+{max(a, b)}', pieces)


def prefix_sum(rng: np.random.Generator, difficulty: int) -> Instance:
  """The parity of 4 + `difficulty` bits."""
  bits = rng.integers(0, 2, 4 + difficulty)
  question = ''.join(map(str, bits))
  return Instance(question, ((question + '=', False), (str(bits.sum() % 2), True)))


def pointer_chasing(rng: np.random.Generator, difficulty: int) -> Instance:
  """A map on 17 letters, then four questions: where does a letter lead after `difficulty` hops?

  The map is one cycle, since short cycles would bring most letters back early, and its length is odd and
  prime, so that no number of hops splits it. Walking backward is a shorter way above 8 hops.
  """
  count = 17
  order = rng.permutation(count)
  image = np.empty(count, int)
  image[order] = np.roll(order, -1)
  table = ''.join(_LETTERS[i] + _LETTERS[image[i]] for i in rng.permutation(count))
  pieces = [(table, False)]
  for start in rng.permutation(count)[:4]:
    place = start
    for _ in range(difficulty):
      place = image[place]
    pieces += [(f' {difficulty}{_LETTERS[start]}', False), (_LETTERS[place], True)]
  return Instance(''.join(_LETTERS[i] for i in image), tuple(pieces))


def permutation_composition(rng: np.random.Generator, difficulty: int) -> Instance:
  """A word of `difficulty` letters, each a permutation of three things; the answer is their product's letter.

  Products do not commute, so counting letters does not help: the word must be multiplied out.
  """
  word = rng.integers(0, len(_PERMUTATIONS), difficulty).tolist()
  arrangement = (0, 1, 2)
  for i in word:
    arrangement = tuple(arrangement[j] for j in _PERMUTATIONS[i])
  question = ''.join(_LETTERS[i] for i in word)
  return Instance(question, ((question + '=', False), (_LETTERS[_PERMUTATIONS.index(arrangement)], True)))


def automaton(rng: np.random.Generator, difficulty: int) -> Instance:
  """A machine of ten states: where it starts, `difficulty` moves, and where it ends.

  Each letter moves every state in its own way, the same in all instances. Words of moves make every one of the 10!
  rearrangements of the states, so that knowing what words do is no way around walking through them.
  """
  start, moves = str(rng.integers(0, 10)), ''.join(rng.choice(list(_MOVES), difficulty))
  state = start
  for move in moves:
    state = _MOVES[move][int(state)]
  question = f'{start}{moves}='
  return Instance(question, ((question, False), (state, True)))


def shell_game(rng: np.random.Generator, difficulty: int) -> Instance:
  """Five cups: under which the ball is, `difficulty` swaps, and where it is then.

  Each letter swaps two cups. Three of five swaps leave the ball alone, but which ones only the swaps before tell.
  """
  start, swaps = int(rng.integers(0, 5)), rng.integers(0, len(_SWAPS), difficulty).tolist()
  cup = start
  for i in swaps:
    a, b = _SWAPS[i]
    cup = b if cup == a else a if cup == b else cup
  question = f'{start}{"".join(_LETTERS[i] for i in swaps)}='
  return Instance(question, ((question, False), (str(cup), True)))


# name -> (generator, accuracy of an answer byte guessed by one who knows the form of the task and the answers
# before it, but not the question). Pointer chasing: a letter that is neither the start nor already an answer;
# the start is among i answers with chance i / 16.
TASKS: dict[str, tuple[Callable[[np.random.Generator, int], Instance], float]] = {
  'addition': (addition, 1 / 10),
  'prefix_sum': (prefix_sum, 1 / 2),
  'pointer_chasing': (pointer_chasing, sum(1 / 16 + i / 16 / (17 - i) for i in range(4)) / 4),
  'permutation_composition': (permutation_composition, 1 / 6),
  'automaton': (automaton, 1 / 10),
  'shell_game': (shell_game, 1 / 5),
}


class TaskRows:
  """Endless rows of packed instances of one split; random access."""

  def __init__(self, name: str, cfg: DataConfig, seed: int, split: str):
    self._generate, self._name, self._cfg, self._seed, self._split = TASKS[name][0], name, cfg, seed, split

  def __len__(self) -> int:
    return 2**30

  def __getitem__(self, index: int) -> Row:
    """One row: whole instances until one does not fit, then padding."""
    rng = np.random.Generator(np.random.Philox(key=[self._seed, _SPLITS[self._split]], counter=[0, 0, 0, int(index)]))
    size = self._cfg.seq_len + 1
    window, weights, used = np.full(size, utf8.PAD, np.uint16), np.zeros(size, np.float32), 0
    while True:
      tokens, counts = _tokens(self.instance(rng))
      if used + len(tokens) > size:
        break
      window[used : used + len(tokens)], weights[used : used + len(tokens)] = tokens, counts
      used += len(tokens)
    return window_to_row(window, weights)

  def instance(self, rng: np.random.Generator) -> Instance:
    """The next instance of this split from `rng`."""
    for _ in range(10_000):
      difficulty = int(rng.integers(self._cfg.min_difficulty, self._cfg.max_difficulty + 1))
      instance = self._generate(rng, difficulty)
      if split_of(instance, self._cfg.validation_fraction) == self._split:
        return instance
    raise BadInput(
      f'config.data: {self._name} at difficulty {self._cfg.min_difficulty} to {self._cfg.max_difficulty} has no '
      f'{self._split} instance; raise max_difficulty or validation_fraction'
    )


def split_of(instance: Instance, validation_fraction: float) -> str:
  digest = hashlib.blake2b(instance.key.encode(), digest_size=8).digest()
  return 'validation' if int.from_bytes(digest, 'big') < validation_fraction * 2**64 else 'train'


def _tokens(instance: Instance) -> tuple[np.ndarray, np.ndarray]:
  """BOS and the bytes of `instance`, and how much predicting each counts."""
  counts = [0.0]
  for text, is_answer in instance.pieces:
    counts += [float(is_answer)] * len(text)  # the tasks write ASCII: a letter is a byte
  return np.concatenate([[utf8.BOS], utf8.encode(instance.text)]), np.array(counts, np.float32)


class Task:
  """One of TASKS as a data source."""

  vocab_size = utf8.VOCAB_SIZE

  def __init__(self, name: str, cfg: DataConfig, seed: int):
    self._name, self._cfg, self._seed = name, cfg, seed
    # All instances of one difficulty have the same length, and it grows with the difficulty.
    longest = 1 + len(TASKS[name][0](np.random.default_rng(0), cfg.max_difficulty).text)
    if longest > cfg.seq_len + 1:
      raise BadInput(
        f'config.data.seq_len={cfg.seq_len} is too short for a {name} instance of {longest} tokens at max_difficulty='
        f'{cfg.max_difficulty}; raise seq_len to {longest - 1} or lower max_difficulty'
      )
    self.chance_accuracy = TASKS[name][1]
    facts = [name, cfg.seq_len, cfg.min_difficulty, cfg.max_difficulty, cfg.validation_fraction, seed]
    self.fingerprint = hashlib.blake2b(f'{facts}'.encode(), digest_size=16).hexdigest()

  def rows(self, split: str) -> TaskRows:
    return TaskRows(self._name, self._cfg, self._seed, split)

  def prompts(self) -> list[str]:
    """Three validation questions, without the answer to the last piece."""
    rng, rows = np.random.default_rng(self._seed), self.rows('validation')
    return [''.join(text for text, _ in rows.instance(rng).pieces[:-1]) for _ in range(3)]
