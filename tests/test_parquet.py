"""Parquet files of ready token ids: trained on as they are; each row once in an epoch; faults by file and row."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from latent_loop import audit, data, exit_codes, loop
from latent_loop.config import Config, DataConfig
from latent_loop.data import row_groups, windows
from latent_loop.data.pipeline import Batches
from latent_loop.data.windows import Windows
from latent_loop.errors import BadInput
from latent_loop.metrics import read_lines
from tests.tiny import V, tiny_config

SEQ_LEN, BATCH, BOS = 12, 8, 3


def write(path: Path, rows: list, kind: pyarrow.DataType | None = None, group: int = 7, **options) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  table = pyarrow.table({'input_ids': pyarrow.array(rows, kind or pyarrow.list_(pyarrow.int32())), 'other': rows})
  parquet.write_table(table, path, row_group_size=group, **options)
  return path


def random_rows(count: int, seed: int = 0, row_tokens: int = SEQ_LEN + 1) -> list[list[int]]:
  return np.random.default_rng(seed).integers(0, V, (count, row_tokens)).tolist()


def config_of(*paths: Path, **values) -> Config:
  cfg = DataConfig(source='parquet', paths=tuple(map(str, paths)), seq_len=SEQ_LEN, **values)
  config = tiny_config(**{'train.loss_chunk': 6, 'train.batch_size': BATCH, 'data.seq_len': SEQ_LEN})
  return dataclasses.replace(config, data=cfg)


def rows_of(*paths: Path, split: str = 'train', **values):
  return data.make_source(config_of(*paths, **values)).rows(split)


@pytest.fixture
def folder(tmp_path) -> Path:
  """train/ and val/ of several files and row groups, every row another."""
  rows = random_rows(100)
  write(tmp_path / 'huginn' / 'train' / '0001.parquet', rows[:30])
  write(tmp_path / 'huginn' / 'train' / '0002.parquet', rows[30:80], pyarrow.list_(pyarrow.uint16()))
  write(tmp_path / 'huginn' / 'val' / '0001.parquet', rows[80:], pyarrow.large_list(pyarrow.int64()))
  return tmp_path / 'huginn'


def test_every_row_is_a_row_of_training_shifted_by_one(folder):
  for split, expected in (('train', random_rows(100)[:80]), ('validation', random_rows(100)[80:])):
    rows = rows_of(folder, split=split)
    got = [rows[i] for i in range(len(rows))]
    assert [row['tokens_BT'].tolist() for row in got] == [row[:-1] for row in expected]
    assert [row['targets_BT'].tolist() for row in got] == [row[1:] for row in expected]
    assert all(row['weights_BT'].all() and (row['segment_ids_BT'] == 1).all() for row in got)
    assert got[0]['positions_BT'].tolist() == list(range(SEQ_LEN))


@pytest.mark.parametrize('names', [['a.b'], ['a', 'a.b'], ['a.b', 'a']])
def test_a_column_may_have_a_dot_in_its_name(names, tmp_path):
  columns = {name: random_rows(20, seed) for seed, name in enumerate(names)}
  parquet.write_table(pyarrow.table(columns), tmp_path / 'x.parquet')
  for name, expected in columns.items():
    rows = rows_of(tmp_path / 'x.parquet', column=name)
    assert [rows[i]['tokens_BT'].tolist() for i in range(len(rows))] == [row[:-1] for row in expected[: len(rows)]]


def test_documents_are_kept_apart_where_the_id_that_begins_them_is_given(tmp_path):
  path = write(tmp_path / 'a.parquet', [[1, 2, BOS, 4, 5, 6, 7, BOS, 9, 10, 11, 12, 13]] * 4)
  row = rows_of(path, bos=BOS)[0]
  assert row['segment_ids_BT'].tolist() == [1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]
  assert row['weights_BT'].tolist() == [1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1]
  assert row['positions_BT'].tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_without_folders_for_splits_the_last_rows_are_held_out(tmp_path):
  rows = random_rows(50)
  write(tmp_path / 'a.parquet', rows[:20])
  write(tmp_path / 'b.parquet', rows[20:])
  for path in (tmp_path, tmp_path / '*.parquet'):
    train, validation = (rows_of(path, split=split, validation_fraction=0.1) for split in ('train', 'validation'))
    got = [one[i]['tokens_BT'].tolist() for one in (train, validation) for i in range(len(one))]
    assert (len(train), len(validation)) == (45, 5) and got == [row[:-1] for row in rows]


def test_beside_a_folder_train_nothing_else_is_trained_on(tmp_path):
  """A test set, and a validation set that has not come yet."""
  rows = random_rows(60)
  for folder, part in (('train', rows[:40]), ('test', rows[40:])):
    (tmp_path / folder).mkdir()
    write(tmp_path / folder / 'a.parquet', part)
  (tmp_path / 'val').mkdir()
  train, validation = (rows_of(tmp_path, split=split, validation_fraction=0.1) for split in ('train', 'validation'))
  got = [one[i]['tokens_BT'].tolist() for one in (train, validation) for i in range(len(one))]
  assert (len(train), len(validation)) == (36, 4) and got == [row[:-1] for row in rows[:40]]


def test_files_beside_a_validation_folder_are_those_to_train_on(tmp_path):
  rows = random_rows(30)
  (tmp_path / 'val').mkdir()
  write(tmp_path / 'a.parquet', rows[:20])
  write(tmp_path / 'val' / 'b.parquet', rows[20:])
  train, validation = (rows_of(tmp_path, split=split) for split in ('train', 'validation'))
  assert (len(train), len(validation)) == (20, 10) and train[0]['tokens_BT'].tolist() == rows[0][:-1]


@pytest.mark.slow
def test_two_steps_of_training_without_preparation(folder, tmp_path, capsys):
  config = config_of(folder, folder / 'train' / '0001.parquet', weights=(0.75, 0.25))
  few = {'num_batches': 1, 'every_steps': 2}
  config = dataclasses.replace(
    config,
    train=dataclasses.replace(config.train, num_steps=2),
    eval=dataclasses.replace(config.eval, **few),
    log=dataclasses.replace(config.log, every_steps=1),
  )
  assert loop.run(config, tmp_path / 'run') == exit_codes.DONE
  steps = read_lines(tmp_path / 'run' / 'metrics.jsonl')
  assert [step['step'] for step in steps] == [1, 2] and all(np.isfinite(step['loss']) for step in steps)
  assert not (tmp_path / 'run' / 'samples.txt').exists(), 'ids without a tokenizer are no text'
  assert loop.run(config, tmp_path / 'run') == exit_codes.DONE and 'already finished' in capsys.readouterr().out
  assert audit.audit(config, [1, 2, 4], 2, tmp_path / 'run', lambda line: None) == []
  with pytest.raises(BadInput, match='config.data.tokenizer=.*give the path'):
    data.make_tokenizer(config.data)


def test_one_host_and_two_read_the_same_batches(folder):
  rows = rows_of(folder)
  whole, parts = Batches(rows, 5, BATCH), [Batches(rows_of(folder), 5, BATCH, mine) for mine in (range(4), range(4, 8))]
  many = Batches(rows_of(folder), 5, BATCH, threads=5)
  for step in (9, 2):
    assert many.batch(step).hash() == whole.batch(step).hash()
    pieces = [part.batch(step).tokens_BT for part in parts]
    assert (whole.batch(step).tokens_BT == np.concatenate(pieces)).all()


def test_the_audit_replays_parquet_and_sees_a_row_that_is_left_out(folder, monkeypatch):
  said = []
  assert audit.audit(config_of(folder), [1, 4], 2, None, said.append) == []
  assert '80 rows in 13 row groups' in said[0] and sum('every row once in each epoch' in line for line in said) == 3
  monkeypatch.setattr(Windows, '_rows_of', lambda self, epoch, window: np.zeros(self._rows, np.int64))
  assert 'never read' in audit.audit(config_of(folder), [1], 1, None, said.append)[0]


@pytest.mark.parametrize('window', [1, 25, 4096])
def test_windows_give_every_row_once_in_an_epoch_and_another_order_in_the_next(window, monkeypatch):
  monkeypatch.setattr(windows, '_WINDOW_ROWS', window)
  blocks = [range(3, 20), range(20, 21), range(21, 60), range(60, 71)]
  order = Windows(blocks, seed=4)
  epochs = [[order[68 * epoch + i] for i in range(68)] for epoch in range(3)]
  assert all(sorted(epoch) == list(range(3, 71)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
  assert [Windows(blocks, 4)[i] for i in (100, 5, 67)] == [epochs[1][32], epochs[0][5], epochs[0][67]]
  assert [Windows(blocks, 5)[i] for i in range(68)] != epochs[0]
  switches = sum(any((a in b) != (c in b) for b in blocks) for a, c in zip(epochs[0], epochs[0][1:], strict=False))
  assert switches == 3 if window == 1 else switches > 3


def test_what_is_kept_in_memory_is_bounded_and_a_window_reads_a_group_once(folder, monkeypatch):
  read, inner = [], row_groups.RowGroups._read
  monkeypatch.setattr(row_groups.RowGroups, '_read', lambda self, group: read.append(group) or inner(self, group))
  rows = rows_of(folder)
  for i in range(80):
    rows[i]
  assert len(read) == 13
  monkeypatch.setattr(row_groups, '_KEPT_BYTES', 2 * 7 * (SEQ_LEN + 1) * 2)
  again = rows_of(folder)
  for i in (0, 7, 14, 0):
    again[i]
  assert len(read) == 17, 'two groups are kept, the first was not one of them'


BAD = {
  'another column': ({'column': 'ids'}, None, r"x.parquet: no column 'ids' \(it has: input_ids, other\)"),
  'no lists': ({}, pyarrow.table({'input_ids': [1, 2]}), "x.parquet: column 'input_ids' is int64, not lists of token"),
  'text': ({}, pyarrow.table({'input_ids': [['a']]}), 'is list<.*string>, not lists of token ids'),
  'a short row': ({}, [*random_rows(9), [5] * 9], 'x.parquet, row 9: it has 9 token ids, .*seq_len=12 needs 13'),
  'short and long': ({}, [*random_rows(2), [5] * 12, [5] * 14], 'x.parquet, row 2: it has 12 token ids'),
  'no row': ({}, [*random_rows(8), None], 'x.parquet, row 8: it has 0 token ids'),
  'an id too large': ({}, [*random_rows(10), [5] * 6 + [V] + [0] * 6], f'row 10: token 6 is {V}, and ids run'),
  'a negative id': ({}, [*random_rows(1), [-2] * 13], 'x.parquet, row 1: token 0 is -2'),
  'an id that is null': ({}, [*random_rows(1), [None] * 13], 'x.parquet, row 1: token 0 is -1'),
  'no rows': ({}, [], 'x.parquet: no row for its train split'),
  'one row': ({}, random_rows(1), 'x.parquet: no row for its train split'),
}  # fmt: skip


@pytest.mark.parametrize('statistics', [True, False])
@pytest.mark.parametrize('name', BAD)
def test_bad_rows_are_named_by_file_and_row(name, statistics, tmp_path):
  """Before training where the footer tells, else when they are read."""
  values, content, sentence = BAD[name]
  path = tmp_path / 'x.parquet'
  if isinstance(content, pyarrow.Table):
    parquet.write_table(content, path)
  else:
    write(path, random_rows(3) if content is None else content, write_statistics=statistics)
  with pytest.raises(BadInput, match=sentence):
    source = data.make_source(config_of(path, **values))
    assert not statistics or 'short and long' in name, 'the footer told'
    for split in ('train', 'validation'):
      rows = source.rows(split)
      [rows[i] for i in range(len(rows))]


def test_a_file_that_is_cut_or_no_parquet_or_missing_is_named(folder, tmp_path):
  path = folder / 'train' / '0002.parquet'
  raw = path.read_bytes()
  for content in (raw[:-9], b'', b'PAR1 and more PAR1'):
    path.write_bytes(content)
    with pytest.raises(BadInput, match='0002.parquet: not a whole parquet file'):
      rows_of(folder)
  for nothing in (tmp_path / 'none', tmp_path / '*.arrow'):
    with pytest.raises(BadInput, match=f'{re.escape(str(nothing))}: no parquet file'):
      rows_of(nothing)


def test_a_flipped_bit_is_named_where_pages_have_checksums(tmp_path):
  rows = random_rows(40)
  path = write(
    tmp_path / 'x.parquet', rows, group=40, write_page_checksum=True, compression='none', use_dictionary=False
  )
  raw = bytearray(path.read_bytes())
  raw[raw.find(np.array(rows[20][:2], np.int32).tobytes())] ^= 1
  path.write_bytes(raw)
  with pytest.raises(BadInput, match='x.parquet, row group 0, after row .*cannot be read'):
    rows_of(path)[0]


def test_other_rows_or_keys_are_another_fingerprint_and_a_moved_folder_is_not(folder, tmp_path):
  source = lambda path, **values: data.make_source(config_of(path, **values)).fingerprint
  before = source(folder)
  assert source(folder, bos=BOS) != before
  folder = folder.rename(tmp_path / 'moved')
  assert source(folder) == before
  write(folder / 'train' / '0001.parquet', random_rows(30, seed=1))
  assert source(folder) != before
