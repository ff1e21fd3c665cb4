"""Conversations as data: what the assistant says is learned, what others say is not; asking has the same form."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_loop import audit, data, exit_codes, loop, tokenizer
from latent_loop.batch import Batch
from latent_loop.config import Config, DataConfig
from latent_loop.data.chat import Stream
from latent_loop.data.packing import stack
from latent_loop.data.pipeline import Batches
from latent_loop.errors import BadInput
from latent_loop.model import build
from latent_loop.step import chunked_loss, rows_of
from latent_loop.tokenizer import bpe, messages
from tests.tiny import random_params, tiny_config

SEQ_LEN, BATCH = 60, 8
CODE = tokenizer.Bytes()


def turn(role: str, content: str) -> dict[str, str]:
  return {'role': role, 'content': content}


TALK = [turn('system', 'be brief'), turn('user', ' hi '), turn('assistant', 'HELLO'), turn('user', 'bye'),
        turn('assistant', 'SO LONG')]  # fmt: skip


def write(folder: Path, count: int = 60) -> Path:
  """Conversations of several lengths; the assistant alone speaks in capitals."""
  rng, lines = np.random.default_rng(0), []
  words = lambda: ' '.join('loop state depth reads again'.split()[i] for i in rng.integers(0, 5, rng.integers(1, 9)))
  for number in range(count):
    turns = [turn('user', f'{number} {words()}'), turn('assistant', words().upper())]
    lines.append(json.dumps({'messages': turns * int(rng.integers(1, 4))}) + '\n')
  folder.mkdir(exist_ok=True)
  (folder / 'a.jsonl').write_text(''.join(lines[:20] + ['\n']))
  (folder / 'b.jsonl').write_text(''.join(lines[20:]))
  return folder


def config_of(*paths: Path, **values) -> Config:
  config = tiny_config(
    **{'model.vocab_size': 264, 'train.loss_chunk': 20, 'train.batch_size': BATCH, 'data.seq_len': SEQ_LEN}
  )
  cfg = {'packing': 'best_fit', 'validation_fraction': 0.2, **values}
  return dataclasses.replace(
    config, data=DataConfig(source='chat', paths=tuple(map(str, paths)), seq_len=SEQ_LEN, **cfg)
  )


@pytest.fixture
def folder(tmp_path) -> Path:
  return write(tmp_path / 'chats')


@pytest.fixture(scope='module')
def template(tmp_path_factory) -> tokenizer.Tokenizer:
  """A tokenizer with tokens for a chat."""
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
  bpe.train(iter(['hello and so long, be brief, hi, bye'] * 9), 300, path)
  return tokenizer.load(str(path))


def test_only_what_the_assistant_says_and_the_end_of_it_is_learned():
  tokens, said = messages.conversation_of(CODE, TALK)
  assert tokens[0] == CODE.bos and tokens[-1] == CODE.eos and said[-1]
  assert CODE.decode(tokens) == 'system: be brief\nuser: hi\nassistant: HELLO\nuser: bye\nassistant: SO LONG\n'
  assert CODE.decode(tokens[said]) == ' HELLO\nuser: SO LONG\n', "the next speaker's name ends an answer"
  _, said = messages.conversation_of(CODE, TALK[:2])
  assert not said.any()


def test_the_template_is_the_paper_s_and_its_mask_that_of_the_jinja_marks(template):
  tokens, said = messages.conversation_of(template, TALK[1:3])
  (hi,), (hello,), (user,), (huginn,), (gap,) = (
    template.encode([t]) for t in ('hi', 'HELLO', 'user', 'Huginn', '\n\n')
  )
  begin, end, over = template.chat
  expected = [
    [template.bos, begin],
    user,
    [end],
    gap,
    hi,
    [over, begin],
    huginn,
    [end],
    gap,
    hello,
    [over, template.eos],
  ]
  assert tokens.tolist() == np.concatenate(expected).tolist()
  assert tokens[said].tolist() == [*hello, over]
  assert template.ends == (template.eos, over) and CODE.ends == (CODE.eos,) and CODE.chat is None


def test_what_is_trained_on_begins_with_what_is_asked(template):
  for code in (CODE, template):
    tokens, said = messages.conversation_of(code, TALK)
    asked = messages.prompt_of(code, TALK[:4])
    assert tuple(tokens[: len(asked)]) == asked
    assert said[len(asked)] and not said[len(asked) - 1], 'the answer begins where the prompt ends'


@pytest.mark.parametrize('packing', ['best_fit', 'concat'])
def test_rows_hold_every_conversation_and_weigh_the_assistant_alone(folder, packing):
  source = data.make_source(config_of(folder, packing=packing))
  learned, expected = [], []
  for split in ('train', 'validation'):
    rows = source.rows(split)
    for row in (rows[i] for i in range(len(rows))):
      assert set(row['weights_BT']) <= {0.0, 1.0}
      learned.append(row['targets_BT'][row['weights_BT'] > 0])
  for line in (folder / 'a.jsonl').read_text().splitlines() + (folder / 'b.jsonl').read_text().splitlines():
    if line:
      tokens, said = messages.conversation_of(CODE, json.loads(line)['messages'])
      expected.append(tokens[said])
  # As targets, once each, all that the assistant says; what users say is never one: they write digits.
  assert np.array_equal(np.sort(np.concatenate(learned)), np.sort(np.concatenate(expected)))
  assert not set(np.concatenate(learned)) & set(b'0123456789')


@pytest.mark.parametrize('packing', ['best_fit', 'concat'])
def test_a_row_without_an_answer_is_left_out_so_that_no_batch_is_without_a_target(tmp_path, packing):
  """A question of many rows and an answer of one, again and again: a batch of one row had no loss most of the time."""
  talk = lambda i: [turn('user', f'{i} ' + 'why ' * 90), turn('assistant', 'SO')]
  lines = [json.dumps({'messages': talk(i)}) + '\n' for i in range(40)]
  (tmp_path / 'x.jsonl').write_text(''.join(lines))
  rows, said = data.make_source(config_of(tmp_path, packing=packing)).rows('train'), []
  assert len(rows) < len(rows.layout) / 3
  assert all(rows[i]['weights_BT'].any() for i in range(len(rows)))
  targets = sum(rows[i]['weights_BT'].sum() for i in range(len(rows)))
  assert targets == rows.stream.read(0, len(rows.stream))[1].sum(), 'no answer is lost with them'
  assert audit.check_rows('x', rows, said.append) == []
  assert f'{len(rows.layout) - len(rows)} rows in which it says nothing are left out' in said[1]
  lost = rows.used.pop()  # seen to fail: a row with an answer is left out too
  gone = rows.stream.num_targets(rows.layout.spans(lost))
  assert audit.check_rows('x', rows, said.append) == [f'x: {gone} tokens that the assistant says are in no row']


def test_a_row_is_cut_where_conversations_begin_without_a_look_at_all_of_them():
  stream = Stream([(np.zeros(n, np.int32), np.ones(n, bool)) for n in (3, 1, 4, 2)])
  for start, stop in itertools.combinations(range(11), 2):
    assert stream.pieces(start, stop) == list(
      itertools.pairwise([start, *(e for e in (3, 4, 8) if start < e < stop), stop])
    )

  class Unscanned(np.ndarray):
    """Ends of which no elementwise comparison is made."""

    def __array_ufunc__(self, *args, **kwargs):
      raise AssertionError('every end was looked at')

  stream._ends = stream._ends.view(Unscanned)
  assert stream.pieces(2, 9) == [(2, 3), (3, 4), (4, 8), (8, 9)]


def test_the_loss_does_not_know_what_the_user_should_have_said(folder):
  config = config_of(folder)
  rows = data.make_source(config).rows('train')
  batch = stack([rows[i] for i in range(3)])
  model = build(config.model, config.depth)
  params = jax.tree.map(jnp.asarray, random_params(model))

  @jax.jit
  def loss(batch: Batch):
    s_BTD = jnp.full((3, SEQ_LEN, config.model.width), 0.3)
    y_BTD = model.forward(params, s_BTD, batch.tokens_BT, rows_of(batch), 1, 2, None)
    return chunked_loss(model, params, y_BTD, batch, config.train).value()

  ignored = batch.weights_BT == 0
  changed = lambda where: dataclasses.replace(batch, targets_BT=np.where(where, 65, batch.targets_BT))
  assert ignored.any() and loss(changed(ignored)) == loss(batch) != loss(changed(~ignored))


def test_the_audit_proves_conversations_and_threads_and_hosts_change_nothing(folder):
  config, said = config_of(folder, folder / 'a.jsonl', weights=(0.7, 0.3)), []
  assert audit.audit(config, [1, 2], 2, None, said.append) == []
  assert sum('targets lost to packing 0, twice 0' in line for line in said) == 2
  rows = data.make_source(config).rows('train')
  parts = [Batches(rows, 1, BATCH, mine, threads=3).batch(4).tokens_BT for mine in (range(4), range(4, 8))]
  assert (Batches(rows, 1, BATCH).batch(4).tokens_BT == np.concatenate(parts)).all()


@pytest.mark.slow
def test_a_run_on_conversations_needs_a_config_only(folder, tmp_path):
  config = config_of(folder)
  config = dataclasses.replace(
    config,
    train=dataclasses.replace(config.train, num_steps=2),
    eval=dataclasses.replace(config.eval, num_batches=1, sample_tokens=3),
  )
  assert loop.run(config, tmp_path / 'run') == exit_codes.DONE
  assert 'assistant:' in (tmp_path / 'run' / 'samples.txt').read_text()


def test_prompts_are_conversations_up_to_the_first_answer(folder, template, tmp_path):
  prompts = data.make_source(config_of(folder)).prompts()
  assert len(prompts) == 3 and all(p.startswith('user: ') and p.endswith('\nassistant:') for p in prompts)
  path = tmp_path / 'tokenizer.json'
  bpe.train(iter(['hello and so long, be brief, hi, bye'] * 9), 300, path)
  config = config_of(folder, tokenizer=str(path))
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300))
  assert data.make_source(config).prompts() == []
  assert data.make_source(config).fingerprint != data.make_source(config_of(folder)).fingerprint


BAD = {
  'not JSON': ('{"messages": ', 'line 2: not JSON'),
  'not UTF-8': (b'\xff'.decode('latin1'), 'line 2: not JSON'),
  'no messages': ('{"text": "a"}', "line 2: no list 'messages'"),
  'empty': ('{"messages": []}', "line 2: no list 'messages', or an empty one"),
  'another role': ('{"messages": [{"role": "tool", "content": "a"}]}', 'line 2, message 0: .*one of system, user'),
  'no text': ('{"messages": [{"role": "user", "content": ["a"]}]}', 'line 2, message 0: .*a content that is text'),
  'half a pair': (r'{"messages": [{"role": "user", "content": "\ud800"}]}', 'line 2, message 0: half a surrogate'),
  'no answer': ('{"messages": [{"role": "user", "content": "a"}]}', 'line 2: the assistant says nothing'),
  'nothing': (None, 'no conversation in its'),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD)
def test_what_is_no_conversation_is_named_by_file_and_line(name, tmp_path):
  line, sentence = BAD[name]
  good = json.dumps({'messages': TALK}) + '\n'
  (tmp_path / 'x.jsonl').write_bytes(b'' if line is None else good.encode() + line.encode('latin1') + b'\n')
  with pytest.raises(BadInput, match=f'{"x.jsonl, " if line else ""}{sentence}'):
    data.make_source(config_of(tmp_path / 'x.jsonl' if line else tmp_path))
  with pytest.raises(BadInput, match='no .jsonl file'):
    data.make_source(config_of(tmp_path / 'none'))
