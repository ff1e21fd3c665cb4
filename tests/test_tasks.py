"""The synthetic tasks: right answers, disjoint splits, rows that depend on nothing but (seed, split, index)."""

import itertools
import re
from functools import reduce

import numpy as np
import pytest

from latent_loop.config import DataConfig
from latent_loop.data import tasks
from latent_loop.errors import BadInput
from latent_loop.tokenizer import utf8

NAMES = sorted(tasks.TASKS)


def instances(name, difficulty, count=50):
  rng = np.random.default_rng(0)
  return [tasks.TASKS[name][0](rng, difficulty) for _ in range(count)]


def answers(instance):
  return [text for text, is_answer in instance.pieces if is_answer]


def solve_addition(text):
  a, b = re.match(r'(\d+)\+(\d+)=', text).groups()
  return [''.join(str((int(a) + int(b)) // 10**i % 10) for i in range(len(a)))]


def solve_prefix_sum(text):
  return ['01'[text.split('=')[0].count('1') & 1]]


def solve_pointer_chasing(text):
  table, *questions = text.split(' ')
  target = dict(zip(table[::2], table[1::2], strict=True))
  found = []
  for question in questions:
    hops, place = re.match(r'(\d+)(\w)', question).groups()
    for _ in range(int(hops)):
      place = target[place]
    found.append(place)
  return found


def solve_permutation_composition(text):
  """By matrices: a letter's matrix P has P[j, p(j)] = 1, and a word is the product from the right to the left."""
  orders = itertools.permutations(range(3))
  matrices = {letter: np.eye(3, dtype=int)[list(p)] for letter, p in zip('abcdef', orders, strict=True)}
  product = np.eye(3, dtype=int)
  for letter in text.split('=')[0]:
    product = matrices[letter] @ product
  return [next(letter for letter, m in matrices.items() if (m == product).all())]


def solve_automaton(text):
  """All ten machines at once: a move rearranges the row of states in which they are."""
  start, moves = re.match(r'(\d)([abcd]+)=', text).groups()
  ends = np.arange(10)
  for move in moves:
    ends = np.array([7613240958, 9637108452, 7542961308, 1826095734][ord(move) - ord('a')] // 10 ** (9 - ends) % 10)
  return [str(ends[int(start)])]


def solve_shell_game(text):
  """By the row of all cups, each named for where it began."""
  start, swaps = re.match(r'(\d)([a-j]+)=', text).groups()
  row = list('01234')
  pairs = ['01', '02', '03', '04', '12', '13', '14', '23', '24', '34']
  for letter in swaps:
    a, b = map(int, pairs['abcdefghij'.index(letter)])
    row[a], row[b] = row[b], row[a]
  return [str(row.index(start))]


SOLVERS = {
  'addition': solve_addition,
  'prefix_sum': solve_prefix_sum,
  'pointer_chasing': solve_pointer_chasing,
  'permutation_composition': solve_permutation_composition,
  'automaton': solve_automaton,
  'shell_game': solve_shell_game,
}


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('difficulty', [1, 3, 12])
def test_answers_are_right(name, difficulty):
  for instance in instances(name, difficulty):
    assert answers(instance) == SOLVERS[name](instance.text), instance.text


@pytest.mark.parametrize('name', NAMES)
def test_rows_count_answer_bytes_alone(name):
  row = tasks.Task(name, DataConfig(seq_len=256, max_difficulty=4), seed=0).rows('train')[5]
  window = np.append(row['tokens_BT'], row['targets_BT'][-1])
  texts = [utf8.decode(part) for part in np.split(window, np.flatnonzero(window == utf8.BOS))[1:]]
  counted = utf8.decode(row['targets_BT'][row['weights_BT'] == 1])
  assert len(texts) > 1
  assert counted == ''.join(answer for text in texts for answer in SOLVERS[name](text))
  assert set(row['weights_BT']) == {0, 1}


@pytest.mark.parametrize('name', NAMES)
def test_no_validation_key_is_trained_on(name):
  # Few enough keys that both splits meet most of theirs.
  task = tasks.Task(name, DataConfig(max_difficulty=2, validation_fraction=0.2), seed=0)
  rng = np.random.default_rng(0)
  keys = {split: {task.rows(split).instance(rng).key for _ in range(500)} for split in ('train', 'validation')}
  assert len(keys['train']) > 1 and len(keys['validation']) > 1
  assert not keys['train'] & keys['validation']


def test_a_sum_and_its_mirror_image_share_a_key():
  keys = {}
  for instance in instances('addition', 1, count=500):
    a, b = instance.text[0], instance.text[2]
    keys.setdefault(frozenset((a, b)), set()).add(instance.key)
  assert {len(same) for same in keys.values()} == {1}


@pytest.mark.parametrize('name', NAMES)
def test_a_row_depends_on_seed_split_and_index_alone(name):
  cfg = DataConfig(seq_len=128, max_difficulty=4)
  tokens = lambda seed, split, index: tasks.Task(name, cfg, seed).rows(split)[index]['tokens_BT'].tolist()
  rows = tasks.Task(name, cfg, 0).rows('train')
  backward = [rows[i]['tokens_BT'].tolist() for i in (2, 1, 0)]
  assert backward == [tokens(0, 'train', i) for i in (2, 1, 0)]
  others = [tokens(1, 'train', 0), tokens(0, 'validation', 0), tokens(0, 'train', 2**30 - 1), *backward]
  assert len({tuple(row) for row in others}) == len(others)


@pytest.mark.parametrize('name', NAMES)
def test_difficulty_changes_the_question(name):
  easy, hard = instances(name, 1), instances(name, 5)
  if name == 'pointer_chasing':  # the same table, other hops
    assert ' 1' in easy[0].text and ' 5' in hard[0].text
    assert answers(easy[0]) != answers(hard[0])
  else:
    assert {len(i.pieces[0][0]) for i in easy}.isdisjoint(len(i.pieces[0][0]) for i in hard)


def possible(name, start, given):
  """The answer bytes that the form of the task allows after `given` answers."""
  if name == 'pointer_chasing':  # neither the letter asked about nor an answer already given
    return sorted(set('abcdefghijklmnopq') - {start, *given})
  digits = '0123456789'
  allowed = {'addition': digits, 'automaton': digits, 'shell_game': digits[:5], 'prefix_sum': '01'}
  return {**allowed, 'permutation_composition': 'abcdef'}[name]


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('difficulty', [1, 4])
def test_chance_is_what_guessing_by_the_form_alone_reaches(name, difficulty):
  rng, right = np.random.default_rng(1), []
  for instance in instances(name, difficulty, count=2000):
    questions = [text for text, is_answer in instance.pieces if not is_answer][-4:]
    for i, (question, answer) in enumerate(zip(questions, answers(instance), strict=True)):
      allowed = possible(name, question[-1], answers(instance)[:i])
      right += [byte == allowed[rng.integers(len(allowed))] for byte in answer]
  chance = tasks.Task(name, DataConfig(), seed=0).chance_accuracy
  assert np.mean(right) == pytest.approx(chance, abs=4 * np.sqrt(chance / len(right)))


@pytest.mark.parametrize('name', [n for n in NAMES if n != 'pointer_chasing'])
def test_no_answer_is_more_frequent_than_chance(name):
  given = np.array([list(''.join(answers(i))) for i in instances(name, 3, count=3000)])
  chance = tasks.TASKS[name][1]
  for column in given.T:
    most = np.unique(column, return_counts=True)[1].max() / len(column)
    assert most < chance + 4 * np.sqrt(chance / len(column))


def test_the_moves_of_the_automaton_make_every_rearrangement():
  """Any pair of states goes to any other, a power of some word is a cycle of 7, some move is odd: by Jordan, S10."""
  moves = [tuple(map(int, images)) for images in tasks._MOVES.values()]
  assert all(sorted(move) == list(range(10)) for move in moves)
  pairs, fresh = {(0, 1)}, [(0, 1)]
  while fresh:
    a, b = fresh.pop()
    new = {(move[a], move[b]) for move in moves} - pairs
    pairs |= new
    fresh += new
  assert len(pairs) == 90
  words = [tuple(reduce(lambda i, m: m[i], word, i) for i in range(10)) for word in itertools.product(moves, repeat=5)]
  assert any(sorted(cycles(word)) == [1, 2, 7] for word in words)
  assert any(sum(length - 1 for length in cycles(move)) % 2 for move in moves)


def cycles(permutation):
  """The lengths of its cycles."""
  lengths, seen = [], set()
  for i in range(len(permutation)):
    length = 0
    while i not in seen:
      seen.add(i)
      i, length = permutation[i], length + 1
    lengths += [length] if length else []
  return lengths


@pytest.mark.parametrize('name', NAMES)
def test_too_short_rows_are_refused(name):
  with pytest.raises(BadInput, match='config.data.seq_len=8 is too short'):
    tasks.Task(name, DataConfig(seq_len=8, min_difficulty=8, max_difficulty=8), seed=0).rows('train')[0]


def test_a_split_without_instances_is_refused():
  task = tasks.Task('prefix_sum', DataConfig(max_difficulty=1, validation_fraction=1e-9), seed=0)
  with pytest.raises(BadInput, match='no validation instance'):
    task.rows('validation')[0]


@pytest.mark.parametrize('name', NAMES)
def test_prompts_are_validation_questions_without_their_last_answer(name):
  task = tasks.Task(name, DataConfig(max_difficulty=4), seed=0)
  prompts, rows, rng = task.prompts(), task.rows('validation'), np.random.default_rng(0)
  assert len(prompts) == 3
  for prompt in prompts:
    instance = rows.instance(rng)
    assert prompt + answers(instance)[-1] == instance.text
