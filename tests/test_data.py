"""Data: batch(step) is a pure function, the same global order for any number of hosts."""

import dataclasses

import numpy as np
import pytest

from latent_loop import data
from latent_loop.config import Config, DataConfig
from latent_loop.data import embedded_text, packing
from latent_loop.data.pipeline import Batches
from latent_loop.errors import BadInput
from latent_loop.tokenizer import utf8


def config_of(**values) -> Config:
  return dataclasses.replace(Config(), data=dataclasses.replace(Config().data, **values))


@pytest.fixture(scope='module')
def text():
  return data.make_source(config_of(seq_len=64))


def test_tokenizer_round_trips():
  for sample in ('plain', 'naïve 😀\n\ttab', ''):
    assert utf8.decode(utf8.encode(sample)) == sample
  assert utf8.decode([utf8.BOS, 104, 105, utf8.EOS, utf8.PAD]) == 'hi'


def test_window_resets_at_documents():
  window = np.array([7, 8, utf8.EOS, utf8.BOS, 5, utf8.EOS, utf8.PAD, utf8.PAD])
  row = packing.window_to_row(window)
  assert row['segment_ids_BT'].tolist() == [1, 1, 1, 2, 2, 2, 0]
  assert row['positions_BT'][:6].tolist() == [0, 1, 2, 0, 1, 2]
  # The end of a document is predicted; the start of the next one and padding are not.
  assert row['weights_BT'].tolist() == [1, 1, 0, 1, 1, 0, 0]
  assert row['targets_BT'].tolist() == window[1:].tolist()


def test_documents_together_are_one_that_predicts_what_they_did(text):
  """As the references train: places count on, nothing is hidden; padding stays padding, borders are no targets."""
  window = np.array([7, utf8.EOS, utf8.BOS, 5, utf8.EOS, utf8.PAD, utf8.PAD])
  apart, row = packing.window_to_row(window), packing.joined(packing.window_to_row(window))
  assert row['positions_BT'].tolist() == [0, 1, 2, 3, 4, 5]
  assert row['segment_ids_BT'].tolist() == [1, 1, 1, 1, 1, 0]
  assert all((row[name] == apart[name]).all() for name in ('tokens_BT', 'targets_BT', 'weights_BT'))
  one, other = (Batches(text.rows('train'), 3, 4, together=together) for together in (False, True))
  assert (one.batch(2).tokens_BT == other.batch(2).tokens_BT).all() and one.order_hash() == other.order_hash()
  border = next(i for i in range(1000) if one.batch(i).segment_ids_BT.max() > 1)
  assert (other.batch(border).segment_ids_BT == 1).all()


def test_a_row_is_one_document_only_where_the_config_says_so():
  assert DataConfig(documents='together').one_document and not DataConfig().one_document
  assert not DataConfig(source='addition').one_document  # many instances in a row
  assert DataConfig(source='parquet', paths=('x',)).one_document
  assert not DataConfig(source='parquet', paths=('x',), bos=1).one_document
  with pytest.raises(BadInput, match="instances of addition are problems of their own; use 'apart'"):
    DataConfig(source='addition', documents='together')


def test_what_changes_no_row_changes_no_fingerprint_of_the_data():
  """A run goes on with other read_threads, and after the config has got a new field."""
  for source in ('embedded_text', 'addition'):
    one, other, longer = (
      data.make_source(
        dataclasses.replace(Config(), data=DataConfig(source=source, seq_len=length, read_threads=threads))
      )
      for length, threads in ((64, 1), (64, 2), (128, 1))
    )
    assert one.fingerprint == other.fingerprint != longer.fingerprint


def test_every_token_of_an_epoch_is_a_target_once(text):
  rows = text.rows('validation')
  windows = np.concatenate([rows[i]['tokens_BT'] for i in range(len(rows))])
  assert (windows == rows._tokens[: len(windows)]).all()
  batches = Batches(rows, seed=3, batch_size=4)
  seen = [int(i) for i in _row_ids([rows[batches._order[i]] for i in range(len(rows))], rows, len(rows))]
  assert sorted(seen) == list(range(len(rows)))


def _row_ids(shuffled, rows, count):
  """Which row each shuffled place holds, found by content."""
  index = {}
  for i in range(len(rows)):
    index.setdefault(rows[i]['tokens_BT'].tobytes(), []).append(i)
  for i in range(count):
    yield index[shuffled[i]['tokens_BT'].tobytes()].pop()


def test_batches_are_a_pure_function_of_seed_and_step(text):
  a, b = (Batches(text.rows('train'), seed=1, batch_size=4) for _ in range(2))
  hashes = [a.batch(step).hash() for step in range(5)]
  assert [b.batch(step).hash() for step in reversed(range(5))] == hashes[::-1]
  assert Batches(text.rows('train'), seed=2, batch_size=4).batch(0).hash() != hashes[0]
  assert len(set(hashes)) == 5


def test_a_batch_hash_is_that_of_the_global_batch_on_every_host(text):
  of = lambda seed, mine: Batches(text.rows('train'), seed, 8, mine)
  hashes = [of(0, range(8)).hash(step) for step in range(4)]
  assert len(set(hashes)) == 4 and [of(0, [5]).hash(step) for step in range(4)] == hashes
  assert of(1, range(8)).hash(0) != hashes[0]


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_see_the_same_global_order(text, hosts):
  whole = Batches(text.rows('train'), 0, 8).batch(3).tokens_BT
  shares = [range(host, 8, hosts) for host in range(hosts)]  # any split will do, this one interleaves
  for mine in shares:
    assert (Batches(text.rows('train'), 0, 8, mine).batch(3).tokens_BT == whole[mine]).all()


def test_train_and_validation_files_are_disjoint(text):
  train, validation = text._documents['train'], text._documents['validation']
  assert len(train) > len(validation) > 10
  names = [name for name, _ in embedded_text.read_documents()]
  assert len(names) == len(set(names)) == len(train) + len(validation)
  assert any(name.startswith('topic:') for name in names)
  assert not any('site-packages' in name or '/test/' in name for name in names)


def test_the_fingerprint_follows_the_data(text):
  assert data.make_source(config_of(seq_len=64)).fingerprint == text.fingerprint
  assert data.make_source(config_of(seq_len=128)).fingerprint != text.fingerprint
  assert data.make_source(config_of(source='addition')).fingerprint != text.fingerprint


def test_a_library_without_files_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(embedded_text.sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)})
  with pytest.raises(BadInput, match='no .py files'):
    data.make_source(Config())


def test_a_row_longer_than_the_data_is_refused(text):
  with pytest.raises(BadInput, match='less than one row'):
    data.make_source(config_of(seq_len=2**28)).rows('train')


def test_an_unknown_source_and_a_small_vocabulary_are_refused():
  with pytest.raises(BadInput, match='choose one of embedded_text'):
    data.make_source(config_of(source='nope'))
  small = dataclasses.replace(Config(), model=dataclasses.replace(Config().model, vocab_size=200))
  with pytest.raises(BadInput, match='vocab_size=200 is smaller'):
    data.make_source(small)
