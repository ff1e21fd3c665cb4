"""Prepared data as a source: every token a target once; damage is named; the audit catches broken orders."""

import dataclasses
import hashlib
import itertools
import json
import os
import resource
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from latent_loop import audit, benchmark, benchmark_data, data, dry_run
from latent_loop.config import Config, DataConfig
from latent_loop.data import layout, mixture
from latent_loop.data.mixture import Mixture, Woven, most_off
from latent_loop.data.packing import pieces_to_row
from latent_loop.data.pipeline import Batches, make_order
from latent_loop.errors import BadInput, StoreFault
from latent_loop.prepare import filters, inputs, run
from latent_loop.shards import manifest, records
from latent_loop.shards.stream import Stream
from latent_loop.storage import arrays as storage_arrays
from latent_loop.trust import rollback
from tests.object_store import BUCKET
from tests.test_prepare import request_of, write_corpus

SEQ_LEN, BATCH = 100, 16


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
  """A prepared corpus of several shards."""
  return prepared_as('arrayrecord', tmp_path_factory)


@pytest.fixture(scope='module')
def arrays(tmp_path_factory) -> Path:
  """The same corpus as arrays, of several files each."""
  return prepared_as('zarr3', tmp_path_factory)


def prepared_as(shards: str, tmp_path_factory) -> Path:
  corpus, output = tmp_path_factory.mktemp('corpus'), tmp_path_factory.mktemp('out') / 'out'
  write_corpus(corpus)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(inputs, '_LEAST_UNIT_BYTES', 20_000)
    patch.setattr(run, 'SHARD_BYTES', 30_000)
    patch.setattr(records, 'FILE_RECORDS', 4)
    run.prepare(request_of(corpus, output, format=shards), lambda line: None)
  return output


@pytest.fixture
def copy(folder, tmp_path) -> Path:
  """One to damage."""
  return Path(shutil.copytree(folder, tmp_path / 'copy'))


def config_of(*folders: Path, **values) -> Config:
  cfg = DataConfig(source='prepared', paths=tuple(map(str, folders)), seq_len=SEQ_LEN, **values)
  train = dataclasses.replace(Config().train, batch_size=BATCH, loss_chunk=SEQ_LEN)
  return dataclasses.replace(Config(), data=cfg, train=train)


def seal_again(folder: Path, change) -> None:
  """Writes the manifest as `change` leaves it, with a right seal."""
  body = json.loads((folder / manifest.NAME).read_text())
  change(body)
  manifest.write(folder, {name: value for name, value in body.items() if name not in ('seal', 'format')})


def whole_stream(folder: Path) -> tuple[np.ndarray, np.ndarray]:
  stream = Stream(folder, manifest.read(folder), 'train')
  return stream.read(0, len(stream)), np.concatenate(list(stream.document_ends()))


@pytest.mark.parametrize('seq_len', [7, SEQ_LEN, 5000])
@pytest.mark.parametrize('packing', layout.LAYOUTS)
def test_every_token_but_a_document_s_first_is_a_target_once(folder, packing, seq_len):
  tokens, ends = whole_stream(folder)
  stream = Stream(folder, manifest.read(folder), 'train')
  rows = layout.LAYOUTS[packing](stream, seq_len)
  spans = [rows.spans(i) for i in range(len(rows))]
  assert all(sum(b - a for a, b in row) <= seq_len + 1 for row in spans)
  flat = np.array([span for row in spans for span in row])
  starts = np.concatenate([[0], ends[:-1]])
  assert audit.targets(flat, starts, ends) == (0, 0)
  assert (np.searchsorted(ends, flat[:, 0], side='right') == np.searchsorted(ends, flat[:, 1] - 1, side='right')).all()
  # Seen to fail: a span less, and a span more.
  assert audit.targets(flat[1:], starts, ends)[0] > 0 and audit.targets(np.r_[flat, flat[:1]], starts, ends)[1] > 0


class Endings:
  """A stream of which only the ends of documents are there, shard after shard."""

  def __init__(self, *shards: np.ndarray):
    self._shards, self._ends = shards, np.concatenate(shards)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def document_ends(self):
    yield from self._shards

  def pieces(self, start: int, stop: int) -> layout.Spans:
    inside = self._ends[(self._ends > start) & (self._ends < stop)].tolist()
    return list(itertools.pairwise([start, *inside, stop]))


def test_the_audit_holds_nothing_for_a_token():
  """Documents of 10^15 tokens: an array of as many bytes is more than an address space."""
  seq_len, said = 10**13, []
  stream = Endings(np.cumsum([10**15, 3]), np.cumsum([10**15, 3, 7 * 10**14, 9 * 10**15])[2:])
  rows = SimpleNamespace(stream=stream, seq_len=seq_len, layout=layout.Concatenated(stream, seq_len))
  assert audit.check_rows('x', rows, said.append) == []
  assert '4 documents, 10,700,000,000,000,003 tokens' in said[0] and 'packing 0, twice 0' in said[0]
  whole, lost, twice = rows.layout.spans, 5, 8  # seen to fail: a row that is lost, one that is there twice
  rows.layout.spans = lambda row: [] if row == lost else whole(row) * (1 + (row == twice))
  assert audit.check_rows('x', rows, said.append) == [
    f'x: {seq_len:,} tokens are never a target, {seq_len:,} more than once'
  ]


@pytest.mark.parametrize('seed', range(20))
def test_the_audit_counts_by_spans_what_a_count_for_every_token_gives(seed):
  rng = np.random.default_rng(seed)
  ends = np.cumsum(rng.integers(1, 9, 12))
  starts, total = np.concatenate([[0], ends[:-1]]), int(ends[-1])
  spans = np.sort(rng.integers(0, total, (15, 2)), axis=1) + [0, 1]  # in no order, over each other and over documents
  times = np.zeros(total, int)
  for a, b in spans:
    times[a + 1 : b] += 1
  wanted = ~np.isin(np.arange(total), starts)
  assert audit.targets(spans, starts, ends) == ((times < wanted).sum(), (times > wanted).sum())


def test_best_fit_holds_few_bytes_for_a_piece_and_its_rows_stay_those_they_were():
  """The digest is that of the version that made an array for every row."""
  ends = np.cumsum(np.random.default_rng(0).lognormal(4, 1.3, 30_000).astype(np.int64) + 1)
  stream = Endings(*np.array_split(ends, 20))
  tracemalloc.start()
  try:
    rows = layout.BestFit(stream, SEQ_LEN)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 60 * len(rows._spans)
  digest = hashlib.sha256(rows._spans.astype('<i8').tobytes() + rows._rows.astype('<i8').tobytes())
  assert digest.hexdigest()[:16] == '200e8c67a839ed34'


def test_best_fit_keeps_whole_what_fits_and_fills_rows(folder):
  _, ends = whole_stream(folder)
  rows = layout.BestFit(Stream(folder, manifest.read(folder), 'train'), 4000)
  spans = {span for i in range(len(rows)) for span in rows.spans(i)}
  short = [(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True) if b - a <= 4001]
  assert short and set(short) <= spans
  assert len(rows) <= 1.2 * ends[-1] / 4001 + 1


@pytest.mark.parametrize('packing', layout.LAYOUTS)
def test_rows_hold_the_tokens_of_their_spans_and_keep_documents_apart(folder, packing):
  rows = data.make_source(config_of(folder, packing=packing)).rows('train')
  tokens, _ = whole_stream(folder)
  for index in range(0, len(rows), 37):
    row, at = rows[index], 0
    for number, (a, b) in enumerate(rows.layout.spans(index)):
      inside = slice(at, min(at + b - a, SEQ_LEN))
      count = inside.stop - inside.start
      assert (row['tokens_BT'][inside] == tokens[a : a + count]).all()
      assert (row['segment_ids_BT'][inside] == number + 1).all()
      assert (row['positions_BT'][inside] == np.arange(count)).all()
      assert row['weights_BT'][at : at + b - a - 1].all()
      assert at + b - a > SEQ_LEN or row['weights_BT'][at + b - a - 1] == 0
      at += b - a
    assert not row['weights_BT'][at:].any() and not row['segment_ids_BT'][at:].any()


def test_pieces_of_a_row_do_not_predict_each_other():
  row = pieces_to_row([np.array([5, 6, 7]), np.array([7, 8])], 6, pad=9)
  assert row['tokens_BT'].tolist() == [5, 6, 7, 7, 8, 9] and row['targets_BT'].tolist() == [6, 7, 7, 8, 9, 9]
  assert row['weights_BT'].tolist() == [1, 1, 0, 1, 0, 0]
  assert row['segment_ids_BT'].tolist() == [1, 1, 1, 2, 2, 0]


class Numbers:
  """An endless stream of (source, 0, 1, 2, ...)."""

  def __init__(self, source):
    self.source = source

  def __getitem__(self, index):
    return self.source, index


_NO_CHANGE = ()


@pytest.mark.parametrize(
  'weights,changes',
  [
    ((0.7, 0.3), _NO_CHANGE),
    ((0.5, 0.2, 0.3), _NO_CHANGE),
    ((3.0, 1.0, 0.001, 7.0), _NO_CHANGE),
    ((1.0, 0.0, 0.0), ((1000, (0.2, 0.1, 0.7)), (1003, (0.0, 1.0, 0.0)), (4000, (5.0, 0.0, 1.0)))),
    (tuple(1 / i for i in range(40, 0, -1)), ((2500, tuple(float(i) for i in range(40))),)),
  ],
)
def test_shares_are_exact_in_every_phase_and_each_stream_is_read_in_its_order(weights, changes):
  woven = Woven([Numbers(i) for i in range(len(weights))], weights, changes)
  places = [woven[i] for i in range(5000)]
  for source in range(len(weights)):
    mine = [index for s, index in places if s == source]
    assert mine == list(range(len(mine)))
  for (begin, now), (end, _) in itertools.pairwise([(0, weights), *changes, (5000, ())]):
    for source, most in enumerate(most_off(now)):
      counts = np.cumsum([s == source for s, _ in places[begin:end]])
      assert np.abs(counts - now[source] / sum(now) * np.arange(1, end - begin + 1)).max() <= most + 1e-6
      assert most <= 2 or len(now) > 3
  assert woven[4321] == places[4321]


def test_an_order_with_constant_weights_stays_the_one_it_was():
  """The row of some thousand places, as the version before weights could change gave it."""
  before = {(0.7, 0.3): 'b308666219bd9ed0', (0.5, 0.2, 0.3): 'ceb739a4070990be', (): '023b172ebbda4ff8'}
  for weights, digest in before.items():
    order = make_order(Mixture([range(101 + 37 * i) for i in range(len(weights) or 3)], weights), 5)
    ids = np.array([order[i] for i in range(1200)], '<i8')
    assert hashlib.sha256(ids.tobytes()).hexdigest()[:16] == digest


def test_weights_that_change_are_shown_replayed_and_the_same_for_every_host(folder, copy, monkeypatch):
  changes = ((0.25, 0.3, 0.7), (0.8, 0.0, 1.0))
  config = config_of(folder, copy, weights=(1.0, 0.0), weight_changes=changes)
  config = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=100))
  shown = dry_run.describe(config)
  assert f'from step 0         100.00% {folder}, 0.00% {copy}' in shown
  assert f'from step 25        30.00% {folder}, 70.00% {copy}' in shown and 'from step 80        0.00%' in shown
  said = []
  assert audit.audit(config, [1, 2, 8], 2, None, said.append) == []
  lines = [line for line in said if line.startswith('mixture')]
  assert [line.split(',')[0] for line in lines] == [f'mixture from step {step}' for step in (0, 25, 80)]
  assert '1.0000 of 1.0000' in lines[0] and '0.3000 of 0.3000' in lines[1] and '0.0000 of 0.0000' in lines[2]
  rows = data.make_source(config).rows('train')
  read = BATCH * (0.7 * 55 + 20) / len(rows.parts[1])
  assert f'({read:.2f} epochs' in lines[2], 'epochs are counted over the phases'
  steps = config.data.changes_of(100)
  assert steps == [(25, (0.3, 0.7)), (80, (0.0, 1.0))]
  whole, half = (Batches(rows, 0, BATCH, mine, changes=steps) for mine in (None, range(8, 16)))
  for step in (81, 24, 25, 3):
    assert half.row_ids(step) == whole.row_ids(step)[8:] and half.hash(step) == whole.hash(step)
    assert step >= 25 or whole.row_ids(step) == Batches(rows, 0, BATCH).row_ids(step)
  monkeypatch.setattr(mixture, '_shares', lambda weights, shares=mixture._shares: shares(weights[::-1]))
  assert 'source 0, from step 25 on' in '\n'.join(audit.audit(config, [1], 2, None, said.append))


def test_a_change_of_weights_is_another_fingerprint(folder, copy):
  of = lambda **values: data.make_source(config_of(folder, copy, weights=(1.0, 1.0), **values)).fingerprint
  assert of() == of(weight_changes=()) != of(weight_changes=((0.5, 1.0, 2.0),))


def test_the_audit_passes_for_1_2_4_8_hosts_and_over_a_resume_and_reports_the_mixture(folder, copy):
  alone, mixed = config_of(folder), config_of(folder, copy, weights=(0.75, 0.25), packing='best_fit')
  for config in (alone, mixed):
    config, said = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=500)), []
    assert audit.audit(config, [1, 2, 4, 8], 2, None, said.append) == []
    text = '\n'.join(said)
    assert text.count('every row once in each epoch') == 5 and 'targets lost to packing 0, twice 0' in text
  assert '0.7500 of 0.7500' in text and '2 host(s) from step' in text


def test_threads_that_read_at_once_change_no_batch(folder):
  rows = data.make_source(config_of(folder, packing='best_fit')).rows('train')
  one, many = Batches(rows, 3, BATCH), Batches(rows, 3, BATCH, threads=7)
  assert all(one.batch(step).hash() == many.batch(step).hash() for step in range(5))


def test_the_benchmark_counts_a_request_for_every_record_and_compares_with_the_step(folder, monkeypatch):
  monkeypatch.setattr(benchmark_data, '_SECS', 0.02)
  monkeypatch.setattr(benchmark, 'train', lambda *args: [{'mode': 'train', 'tokens_per_second': 100.0}])
  disk, far, step = benchmark_data.batches(config_of(folder), [2.0], benchmark.Effort(1, 2))
  assert disk['rows'] > 0 and step['loader_over_step'] == disk['tokens_per_second'] / 100
  assert far['read_milliseconds'] == 2 and far['batch_milliseconds'] > 2 * BATCH, 'a request for each row at least'
  rows = benchmark_data.FarAway(data.make_source(config_of(folder)).rows('train'), 0.0)
  rows[0], rows[records.RECORD_TOKENS // SEQ_LEN]  # the second crosses into another record
  assert rows.requests >= 3
  with pytest.raises(BadInput, match='--read_millis: only prepared data'):
    list(benchmark_data.batches(Config(), [2.0], benchmark.Effort(1, 1)))


def test_the_benchmark_of_preparation_counts_what_was_prepared():
  (line,) = benchmark_data.prepare([1], 'bytes', 1, lambda text: None)
  assert 1 <= line['megabytes'] < 1.01 and 20 < line['peak_mib_of_a_process'] < 200
  assert line['tokens_per_second_per_core'] >= 0.95 * 1e6 * line['megabytes_per_second_per_core']


class ShuffledByRank(Batches):
  """As two PyTorch systems did: each rank shuffles the list with a seed of its own, then takes its stride."""

  def __init__(self, rows, seed, batch_size, mine, host):
    super().__init__(rows, seed + host, batch_size, mine)


def test_data_without_an_index_is_no_case_for_the_audit():
  with pytest.raises(BadInput, match='has an index to replay; give a config or a run with such data'):
    audit.audit(Config(), [1], 1, None, print)


def test_the_audit_catches_a_shuffle_per_rank_before_striding(folder):
  rows, hosts = data.make_source(config_of(folder)).rows('train'), 8
  num_steps = audit.steps_for(rows, BATCH, 1)
  broken = lambda host, mine: ShuffledByRank(rows, 0, BATCH, mine, host)
  ids, faults = audit.replay(broken, BATCH, num_steps, [audit.Start(0, hosts)])
  (fault,) = faults + audit.check_order(rows, ids, 1)
  missing = 1 - len(np.unique(ids[: len(rows)])) / len(rows)
  assert abs(missing - (1 - 1 / hosts) ** hosts) < 0.06, 'what systems.md 1.8 counted'
  assert 'never read' in fault and f'({missing:.1%})' in fault


def test_the_audit_catches_a_resume_at_another_step_and_rows_that_nobody_feeds(folder):
  rows = data.make_source(config_of(folder)).rows('train')
  num_steps = audit.steps_for(rows, BATCH, 1)

  class Late(Batches):
    def row_ids(self, step):
      return super().row_ids(step + (step >= num_steps // 2))

  ids, _ = audit.replay(lambda host, mine: Late(rows, 0, BATCH, mine), BATCH, num_steps, [audit.Start(0, 2)])
  assert f'{BATCH} (' in audit.check_order(rows, ids, 1)[0]
  _, faults = audit.replay(lambda host, mine: Batches(rows, 0, BATCH, mine), BATCH, 3, [audit.Start(1, 1)])
  assert faults == [f'{BATCH} places of the stream are fed by no host']


def test_the_audit_compares_with_what_a_run_recorded(folder, tmp_path):
  config = config_of(folder)
  batches = Batches(data.make_source(config).rows('train'), config.seed, BATCH)
  lines = [json.dumps({'step': step, 'batch_hash': batches.hash(step - 1)}) for step in (1, 2, 3)]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines))
  assert audit.audit(config, [1], 1, tmp_path, lambda line: None) == []
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines).replace('"step": 2', '"step": 5'))
  assert 'step 5' in audit.audit(config, [1], 1, tmp_path, lambda line: None)[0]


def test_the_audit_names_what_a_roll_back_skipped(folder, tmp_path):
  config, said = config_of(folder), []
  batches = Batches(data.make_source(config).rows('train'), config.seed, BATCH)
  lines = [json.dumps({'step': step, 'batch_hash': batches.hash(batch)}) for step, batch in ((1, 0), (2, 4), (3, 5))]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines))
  rollback.write(tmp_path, [rollback.Rollback(1, 4, 'a NaN')])
  assert audit.audit(config, [1], 1, tmp_path, said.append) == []
  assert any('batches 1 to 3 of the stream were skipped by a roll-back to step 1 (a NaN)' in line for line in said)


def test_the_audit_refuses_what_it_cannot_replay(folder):
  with pytest.raises(BadInput, match='only data of config.data.paths'):
    audit.audit(Config(), [1], 1, None, print)
  with pytest.raises(BadInput, match='--hosts=3 does not divide'):
    audit.audit(config_of(folder), [3], 1, None, print)


def test_a_moved_folder_keeps_its_fingerprint_and_another_content_does_not(folder, copy):
  source = lambda *folders, **values: data.make_source(config_of(*folders, **values))
  assert source(copy).fingerprint == source(folder).fingerprint != source(folder, packing='best_fit').fingerprint
  seal_again(copy, lambda body: body.update(key='another'))
  assert source(copy).fingerprint != source(folder).fingerprint


def test_a_vocabulary_that_is_too_small_for_the_model_is_refused(folder):
  config = config_of(folder)
  small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=200))
  with pytest.raises(BadInput, match='vocab_size=200 is smaller than the 264'):
    data.make_source(small)


def read_all(folder: Path) -> None:
  rows = data.make_source(config_of(folder)).rows('train')
  for i in range(len(rows)):
    rows[i]


@pytest.mark.parametrize('ending', ['.arrayrecord', '.index.npy'])
@pytest.mark.parametrize('damage', ['missing', 'truncated', 'other size'])
def test_a_shard_that_is_missing_or_cut_is_named_before_training(copy, ending, damage):
  path = copy / f'train-00001{ending}'
  raw = path.read_bytes()
  path.write_bytes(raw[:-5] if damage == 'truncated' else raw + b'more')
  if damage == 'missing':
    path.unlink()
  with pytest.raises(BadInput, match=f'train-00001{ending}: (missing|it has)'):
    data.make_source(config_of(copy))


@pytest.mark.parametrize('seed', range(12))
def test_no_flipped_bit_of_a_shard_is_read_as_a_token(folder, copy, seed):
  """A bit of padding may be free to flip; then all tokens are still right."""
  rng = np.random.default_rng(seed)
  path = copy / ('train-00000.arrayrecord' if seed % 4 else 'train-00000.index.npy')
  raw = bytearray(path.read_bytes())
  raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
  path.write_bytes(raw)
  try:
    read_all(copy)
  except BadInput as error:
    assert path.name in str(error) and ('record' in str(error) or 'npy' in path.name)
  else:
    assert (whole_stream(copy)[0] == whole_stream(folder)[0]).all()


@pytest.mark.parametrize('packing', layout.LAYOUTS)
def test_arrays_give_the_batches_that_records_give(folder, arrays, packing):
  one, other = (data.make_source(config_of(place, packing=packing)) for place in (folder, arrays))
  rows, same = one.rows('train'), other.rows('train')
  assert len(rows) == len(same) and one.prompts() == other.prompts()
  for i in range(len(rows)):
    assert all(value.tobytes() == same[i][key].tobytes() for key, value in rows[i].items())
  whole, half = Batches(rows, 3, BATCH), Batches(same, 3, BATCH, range(8), threads=4)
  for step in (7, 0):
    assert half.hash(step) == whole.hash(step)
    assert half.batch(step).tokens_BT.tobytes() == whole.batch(step).tokens_BT[:8].tobytes()
  assert audit.audit(config_of(arrays, packing=packing), [1, 4], 1, None, lambda line: None) == []


def test_a_row_of_an_array_is_a_small_part_of_its_file(arrays, tmp_path):
  """All that it does not need may be damaged."""
  copy = Path(shutil.copytree(arrays, tmp_path / 'copy'))
  path, size = (
    copy / 'train-00000.zarr' / 'c' / '0',
    2 * records.RECORD_TOKENS + 4,
  )  # two bytes for a token, and the CRC
  raw = path.read_bytes()
  path.write_bytes(raw[:size] + bytes(size) + raw[2 * size :])
  rows = data.make_source(config_of(copy)).rows('train')
  rows[0]
  with pytest.raises(BadInput, match='train-00000.zarr, record 1: cannot be read .*DATA_LOSS'):
    rows[records.RECORD_TOKENS // SEQ_LEN + 1]


def test_arrays_are_read_from_an_object_store_by_small_ranges(arrays, store):
  """As a copy of the folder leaves them there; faults are named as on a disk."""
  files = [path for path in arrays.rglob('*') if path.is_file()]
  store.objects |= {f'data/x/{path.relative_to(arrays).as_posix()}': path.read_bytes() for path in files}
  there = dataclasses.replace(config_of(arrays).data, paths=(f'gs://{BUCKET}/data/x',))
  there = dataclasses.replace(config_of(arrays), data=there)
  one, other = data.make_source(config_of(arrays)), data.make_source(there)
  assert one.fingerprint == other.fingerprint and one.prompts() == other.prompts()
  rows, same = one.rows('train'), other.rows('train')
  for i in (0, 5, len(rows) - 1):
    assert all(value.tobytes() == same[i][key].tobytes() for key, value in rows[i].items())
  again = data.make_source(there).rows('train')
  storage_arrays._context.cache_clear()  # with the patience of this test
  with store.faults(fail_every=1), pytest.raises(StoreFault, match='the store did not read it'):
    again[0]
  again[0]
  name = 'data/x/train-00001.zarr/c/0'
  store.objects[name] = store.objects[name][:-1]
  with pytest.raises(BadInput, match='gs://bucket/data/x/train-00001.zarr/c/0: it has not the'):
    data.make_source(there)
  del store.objects[name]
  with pytest.raises(BadInput, match='gs://bucket/data/x/train-00001.zarr/c/0: missing'):
    data.make_source(there)


def test_a_whole_record_of_zeros_is_no_missing_one(tmp_path):
  tokens = np.repeat([5, 0, 7], records.RECORD_TOKENS).astype('<u2')
  records.write_array(tmp_path / 'x.zarr', [tokens[:9], tokens[9:]], tokens.dtype, len(tokens))
  reader = records.Reader(tmp_path / 'x.zarr', tokens.dtype, len(tokens), 264)
  assert (reader.read(3, len(tokens)) == tokens[3:]).all()


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('file', ['c/0', 'zarr.json'])
def test_no_flipped_bit_of_an_array_is_read_as_a_token(arrays, tmp_path, file, seed):
  copy, rng = Path(shutil.copytree(arrays, tmp_path / 'copy')), np.random.default_rng(seed)
  path = copy / 'train-00000.zarr' / file
  raw = bytearray(path.read_bytes())
  raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
  path.write_bytes(raw)
  with pytest.raises(BadInput, match=r'train-00000.zarr(, record \d+: cannot be read|/zarr.json: cannot be used)'):
    read_all(copy)


@pytest.mark.parametrize('file', ['c/1', 'zarr.json'])
def test_a_missing_file_of_an_array_is_named_before_training_and_in_it(arrays, tmp_path, file):
  copy = Path(shutil.copytree(arrays, tmp_path / 'copy'))
  rows = data.make_source(config_of(copy)).rows('train')
  (copy / 'train-00000.zarr' / file).unlink()
  with pytest.raises(BadInput, match=f'train-00000.zarr/{file}: missing'):
    data.make_source(config_of(copy))
  with pytest.raises(BadInput, match='train-00000.zarr(, record 4: .*NOT_FOUND|/zarr.json: cannot be used)'):
    [rows[i] for i in range(len(rows))]


def test_shards_stay_within_the_files_that_a_process_may_open(folder, monkeypatch):
  """A reader that is closed is opened again; an index keeps no file open."""
  used, limit = lambda: len(os.listdir('/proc/self/fd')), resource.getrlimit(resource.RLIMIT_NOFILE)
  monkeypatch.setattr(resource, 'getrlimit', lambda kind: (16, limit[1]))
  found = manifest.read(folder)
  stream, before = Stream(folder, found, 'train'), used()
  assert len(found.of('train')) > 3
  ends = np.concatenate([*stream.document_ends()])
  assert used() == before
  tokens = [stream.read(a, b) for a, b in zip([0, *ends], ends, strict=False)]
  assert used() <= before + 2
  monkeypatch.setattr(resource, 'getrlimit', lambda kind: (resource.RLIM_INFINITY, limit[1]))
  many = Stream(folder, found, 'train')
  assert np.array_equal(np.concatenate(tokens), many.read(0, len(many)))


def test_a_token_past_the_vocabulary_is_named_by_file_and_record(copy):
  path, shard = copy / 'train-00001.arrayrecord', manifest.read(copy).of('train')[1]
  tokens = Stream(copy, manifest.read(copy), 'train').read(0, shard.tokens) * 0
  tokens[records.RECORD_TOKENS + 3] = 264
  records.write_tokens(path, [tokens])
  with pytest.raises(BadInput, match='train-00001.arrayrecord, record 1: .*token 2051 is 264, and the vocabulary ends'):
    read_all(copy)


def test_a_manifest_that_was_altered_or_is_missing_is_named(copy):
  path = copy / manifest.NAME
  path.write_text(path.read_text().replace('"vocab_size": 264', '"vocab_size": 265'))
  with pytest.raises(BadInput, match='manifest.json: truncated or altered'):
    data.make_source(config_of(copy))
  path.unlink()
  with pytest.raises(BadInput, match=f'holds no prepared data; .*prepare_data --input=TEXTS --output={copy} makes it'):
    data.make_source(config_of(copy))


def test_another_tokenizer_than_the_manifest_s_is_refused(folder, copy):
  pytest.importorskip('tokenizers')
  from latent_loop.tokenizer import bpe

  bpe.train(iter(['a few words of text, again and again'] * 9), 300, copy / manifest.TOKENIZER)
  facts = manifest.facts(copy / manifest.TOKENIZER)
  seal_again(copy, lambda body: body.update(tokenizer='0' * 64, other_files={manifest.TOKENIZER: facts}))
  with pytest.raises(BadInput, match='tokenizer.json: not the tokenizer of the manifest'):
    data.make_source(config_of(copy))
  with pytest.raises(BadInput, match='prepared with another tokenizer than'):
    data.make_source(config_of(folder, copy))


def test_an_empty_validation_split_is_named(tmp_path):
  (tmp_path / 'a.txt').write_text('some words of text ' * 40)
  request = request_of(tmp_path, tmp_path / 'out', patterns=[str(tmp_path / 'a.txt')], limits=filters.Limits())
  run.prepare(dataclasses.replace(request, validation_fraction=0.0), lambda line: None)
  with pytest.raises(BadInput, match='no document in its validation split'):
    data.make_source(config_of(tmp_path / 'out')).rows('validation')


def test_paths_and_weights_must_fit():
  for values, sentence in (
    ({'paths': ()}, 'does not fit source'),
    ({'weights': (1.0, 2.0)}, 'for each of the 1 paths'),
  ):
    with pytest.raises(BadInput, match=sentence):
      DataConfig(**{'source': 'prepared', 'paths': ('x',), **values})
