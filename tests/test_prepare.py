"""Preparation: documents once or counted as dropped; the same bytes whatever happened; faults by file and record."""

import concurrent.futures
import dataclasses
import gzip
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from latent_loop import tokenizer
from latent_loop.errors import BadInput
from latent_loop.prepare import filters, inputs, merge, reading, run, units, vocabulary
from latent_loop.shards import manifest, records
from latent_loop.shards.stream import Stream
from tests.reading_path import ROOT

WORDS = 'the loop runs again until its state no longer moves and then reads out an answer naïvely'.split()


def text_of(rng: random.Random) -> str:
  return ' '.join(rng.choice(WORDS) + str(rng.randrange(100)) for _ in range(rng.randrange(8, 400)))


def write_corpus(folder: Path, scale: int = 1) -> set[str]:
  """Files of every kind under `folder`, some documents twice; returns the texts."""
  rng, texts = random.Random(0), set()

  def some(count: int) -> list[str]:
    new = [text_of(rng) for _ in range(count * scale)]
    texts.update(new)
    return new

  (folder / 'deep' / 'er').mkdir(parents=True)
  for number, text in enumerate(some(7)):
    (folder / 'deep' / 'er' / f'{number}{(".txt", ".md", ".py")[number % 3]}').write_text(text, encoding='utf-8')
  lines = [json.dumps({'id': 3, 'text': text}) + '\n' for text in some(41)]
  (folder / 'a.jsonl').write_text(''.join(lines[:5] + ['\n'] + lines), encoding='utf-8')
  with gzip.open(folder / 'b.jsonl.gz', 'wt', encoding='utf-8') as file:
    file.writelines(json.dumps({'text': text}) + '\n' for text in [*some(9), *sorted(texts)[:3]])
  with pyarrow.output_stream(folder / 'c.jsonl.zst', compression='zstd') as stream:
    stream.write(''.join(json.dumps({'text': text}) + '\n' for text in some(13)).encode())
  table = pyarrow.table({'n': range(23 * scale), 'text': some(23)})
  pyarrow.parquet.write_table(table, folder / 'd.parquet', row_group_size=6)
  (folder / 'short.txt').write_text('few')
  (folder / 'image.png').write_bytes(b'\x89PNG')
  return texts


def request_of(corpus: Path, output: Path, **values) -> run.Request:
  patterns = [f'{corpus}/**/*.{ending}' for ending in ('txt', 'md', 'py', 'jsonl*', 'parquet', 'png')][:5]
  values = {'patterns': patterns, 'tokenizer': 'bytes', 'text_key': 'text', 'invalid_utf8': 'error',
            'validation_fraction': 0.2, 'limits': filters.Limits(), 'processes': 1, **values}  # fmt: skip
  return run.Request(output=output, **values)


@pytest.fixture(scope='module', autouse=True)
def small_pieces():
  """Units, records and shards so small that a little text makes many."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(inputs, '_LEAST_UNIT_BYTES', 6_000)
    patch.setattr(run, 'SHARD_BYTES', 30_000)
    patch.setattr(records, 'FILE_RECORDS', 4)
    yield


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('corpus')
  write_corpus(folder)
  return folder


@pytest.fixture(scope='module')
def prepared(corpus, tmp_path_factory) -> Path:
  output = tmp_path_factory.mktemp('prepared') / 'out'
  run.prepare(request_of(corpus, output), lambda line: None)
  return output


@pytest.fixture(scope='module')
def arrays(corpus, tmp_path_factory) -> Path:
  output = tmp_path_factory.mktemp('arrays') / 'out'
  run.prepare(request_of(corpus, output, format='zarr3'), lambda line: None)
  return output


_PROGRAM = """
import json, sys
from pathlib import Path
from latent_loop.prepare import filters, inputs, run

inputs._LEAST_UNIT_BYTES, run.SHARD_BYTES, values = json.loads(sys.argv[1])
values['limits'], values['output'] = filters.Limits(**values['limits']), Path(values['output'])
print('begun', flush=True)
run.prepare(run.Request(**values), lambda line: None)
"""


def command_of(request: run.Request, unit_bytes: int, shard_bytes: int, python: str = sys.executable) -> list[str]:
  """A preparation as a process of its own; it says 'begun' once all is imported."""
  values = {**dataclasses.asdict(request), 'output': str(request.output)}
  return [python, '-c', _PROGRAM, json.dumps([unit_bytes, shard_bytes, values])]


def documents_of(folder: Path, split: str) -> list[str]:
  of = manifest.read(folder)
  stream = Stream(folder, of, split)
  ends = np.concatenate(list(stream.document_ends()))
  tokens = [stream.read(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
  assert all(one[0] == tokenizer.Bytes.bos and one[-1] == tokenizer.Bytes.eos for one in tokens)
  return [tokenizer.Bytes().decode(one) for one in tokens]


def bytes_of(folder: Path) -> dict[str, bytes]:
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_every_text_of_every_format_is_kept_once(corpus, prepared, tmp_path):
  texts = write_corpus(tmp_path / 'again')
  train, validation = documents_of(prepared, 'train'), documents_of(prepared, 'validation')
  assert sorted(train + validation) == sorted(texts)
  assert 0 < len(validation) < len(train)
  assert len(manifest.read(prepared).of('train')) > 1, 'the corpus is too small to make several shards'


def test_documents_are_in_the_order_of_their_digests(prepared):
  for split in manifest.SPLITS:
    digests = [filters.digest(text.encode()) for text in documents_of(prepared, split)]
    assert digests == sorted(digests) and len(set(digests)) == len(digests)


def test_what_is_read_is_kept_or_counted_as_dropped(corpus, prepared):
  of = manifest.read(prepared)
  sources = of.about['sources']
  dropped = sum(n for source in sources for name, n in source.items() if name.startswith('dropped'))
  assert sum(source['documents'] for source in sources) == dropped + sum(shard.documents for shard in of.shards)
  assert [source['dropped: too short'] for source in sources if 'dropped: too short' in source] == [1]
  assert sum(source.get('dropped: duplicate', 0) for source in sources) == 8
  assert any('8 duplicate' in line or '5 duplicate' in line for line in run.summary(of))


def test_an_index_says_where_a_document_came_from(prepared):
  of, folder = manifest.read(prepared), prepared
  files = [json.loads(line) for line in (folder / manifest.FILES).read_text().splitlines()]
  shard = of.of('train')[0]
  index = np.load(folder / f'{shard.name}.index.npy')
  text = documents_of(folder, 'train')[0]
  file, place = files[int(index[records.FILE, 0])]['path'], int(index[records.PLACE, 0])
  if file.endswith('.jsonl'):
    found = json.loads(Path(file).read_bytes()[place:].split(b'\n')[0])['text']
  elif file.endswith('.parquet'):
    found = pyarrow.parquet.read_table(file)['text'][place].as_py()
  else:
    found = text  # packed or whole files have no place to look at
  assert found == text


@pytest.mark.parametrize('seed', range(3))
def test_lines_cut_anywhere_are_read_once(corpus, seed):
  path = corpus / 'a.jsonl'
  size = path.stat().st_size
  file = inputs.File(0, str(path), 'lines', 0, size, '')
  cuts = sorted(random.Random(seed).sample(range(1, size), 60))
  parts = [inputs.Part(file, a, b, b - a) for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
  whole = list(reading.documents(inputs.Part(file, 0, size, size), 'text', 2**20))
  assert [d for part in parts for d in reading.documents(part, 'text', 2**20)] == whole and len(whole) == 46


def test_a_part_inside_a_long_line_ends_where_it_ends(tmp_path):
  """Reading the rest of a line of 20 GB in each of its parts, whole, would take the memory and the day."""

  class File(io.BytesIO):
    def readline(self, size=-1):
      line = super().readline(size)
      sizes.append(len(line))
      return line

  content, sizes = b'x' * 100_000 + b'\n{"text": "b c"}\n', []
  file = inputs.File(0, str(tmp_path / 'x.jsonl'), 'lines', 0, len(content), '')
  parts = [inputs.Part(file, a, min(a + 9000, len(content)), 9000) for a in range(9000, len(content), 9000)]
  found = [d for part in parts for d in reading._lines(File(content), part, 'text', 100)]
  assert [(d.text, d.place) for d in found] == [(b'b c', 100_001)]
  assert sum(sizes) < 2 * len(content) and max(sizes) < 9000


def test_links_are_followed_once_and_one_to_nowhere_is_no_file(tmp_path):
  text = 'words enough for a document, and a few more'
  (tmp_path / 'in/deep').mkdir(parents=True)
  (tmp_path / 'elsewhere').mkdir()
  (tmp_path / 'in/deep/a.txt').write_text(f'{text} a')
  (tmp_path / 'elsewhere/b.txt').write_text(f'{text} b')
  (tmp_path / 'in/link').symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'in/deep/back').symlink_to(tmp_path / 'in')
  (tmp_path / 'in/nowhere.txt').symlink_to(tmp_path / 'nothing')
  files, others = inputs.find([str(tmp_path / 'in')])
  assert [os.path.relpath(file.path, tmp_path / 'in') for file in files] == ['deep/a.txt', 'link/b.txt'] and not others


def test_a_name_that_looks_like_a_glob_is_the_file_of_that_name(tmp_path):
  for name in ('w[1].txt', 'w1.txt'):
    (tmp_path / name).write_text('')
  assert [file.path for file in inputs.find([f'{tmp_path}/w[1].txt'])[0]] == [f'{tmp_path}/w[1].txt']


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  scandir = os.scandir

  def closed(path):
    if str(path).endswith('secret'):
      raise PermissionError(13, 'Permission denied', path)
    return scandir(path)

  (tmp_path / 'secret').mkdir()
  monkeypatch.setattr(os, 'scandir', closed)
  with pytest.raises(BadInput, match=r'secret: cannot be read \(Permission denied\); change its rights'):
    inputs.find([str(tmp_path)])


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch):
  path = tmp_path / 'a.jsonl'
  lines = [json.dumps({'text': f'a document of {i} words and enough letters to be kept'}) + '\n' for i in range(40)]
  path.write_text(''.join(lines))
  find = inputs.find

  def then_rewritten(patterns):
    found = find(patterns)
    path.write_text(''.join(lines[:3]))
    return found

  monkeypatch.setattr(run.inputs, 'find', then_rewritten)
  with pytest.raises(BadInput, match='a.jsonl: changed while it was read; wait until nobody writes it'):
    prepare(tmp_path, path)


def test_two_that_do_one_unit_at_once_leave_one_whole_mark(tmp_path):
  counts = {'files': {'0': {'documents': 3}}}
  write = lambda: [units.write_mark(tmp_path, 'key', tmp_path, [], counts) for _ in range(150)]
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    for one in [pool.submit(write) for _ in range(3)]:
      one.result()
  assert units.mark_of(tmp_path, 'key')['files'] == counts['files']
  assert os.listdir(tmp_path) == ['key.json']


def test_a_line_too_long_is_passed_over_and_counted(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text(json.dumps({'text': 'a' * 9000}) + '\n' + json.dumps({'text': 'b c'}) + '\n')
  file = inputs.File(0, str(path), 'lines', 0, path.stat().st_size, '')
  found = list(reading.documents(inputs.Part(file, 0, file.num_bytes, file.num_bytes), 'text', 1000))
  assert [(d.text, d.place) for d in found] == [(None, 0), (b'b c', 9013)]


@pytest.mark.parametrize(
  'text,reason',
  [('word ' * 3, 'too short'), ('word ' * 900, 'too long'), ('0123 456 ' * 30, 'few letters'),
   ('word \0 \1' * 30, 'control characters'), ('ein Wort, naïve 词 ' * 9, None)],
)  # fmt: skip
def test_the_reason_to_drop(text, reason):
  assert filters.reason_to_drop(text.encode(), filters.Limits(32, 4000)) == reason


def test_documents_that_differ_in_white_space_are_one():
  assert filters.digest(b'a b\n c') == filters.digest(b' a  b c\r\n') != filters.digest(b'ab c')


class Killed(BaseException):
  """As a SIGKILL: nothing of the preparation handles it."""


@pytest.mark.parametrize('shards', ['arrayrecord', 'zarr3'])
def test_killed_at_any_point_it_ends_in_the_same_bytes(corpus, prepared, arrays, tmp_path, monkeypatch, shards):
  """The n-th start dies when it gives its n-th file a name, until one ends before it comes to that."""
  calls, kills, rename = [], 0, records.os.replace

  def replace(source, target):
    calls.append(target)
    if len(calls) > kills:
      raise Killed
    rename(source, target)

  monkeypatch.setattr(records.os, 'replace', replace)
  # A killed process does not clean up; the next one does.
  monkeypatch.setattr(Path, 'unlink', lambda self, missing_ok=False: missing_ok or os.unlink(self))
  while kills < 100:
    calls.clear()
    try:
      run.prepare(request_of(corpus, tmp_path / 'out', format=shards), lambda line: None)
      break
    except Killed:
      kills += 1
  monkeypatch.undo()
  expected = bytes_of({'arrayrecord': prepared, 'zarr3': arrays}[shards])
  assert 8 < kills < 100 and bytes_of(tmp_path / 'out') == expected
  assert shards == 'arrayrecord' or 'train-00000.zarr/c/1' in expected, 'an array of several files'


def test_a_unit_that_is_done_is_not_done_again_unless_it_is_damaged(corpus, tmp_path, monkeypatch):
  done = []
  write = units._write_segment
  monkeypatch.setattr(units, '_write_segment', lambda *args: done.append(1) or write(*args))
  monkeypatch.setattr(run, '_finish', lambda *args: (_ for _ in ()).throw(Killed))
  request = request_of(corpus, tmp_path / 'out')
  counts = []
  for damage in (False, False, True):
    if damage:
      path = next((tmp_path / 'out' / run.WORK).glob('*.tokens'))
      path.write_bytes(path.read_bytes()[:-1])
    done.clear()
    with pytest.raises(Killed):
      run.prepare(request, lambda line: None)
    counts.append(len(done))
  assert counts[0] > 10 and counts[1] == 0 and counts[2] == 2  # one segment, and the look for a next one


def test_a_full_disk_is_a_sentence_and_what_is_done_is_kept(corpus, prepared, tmp_path):
  output, limits = tmp_path / 'out', resource.getrlimit(resource.RLIMIT_FSIZE)
  for num_bytes in (9_000, 30_000):  # too little for a unit; enough for units, too little for a shard
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
      with pytest.raises(BadInput, match='cannot be written.*File too large.*what is done is kept'):
        run.prepare(request_of(corpus, output), lambda line: None)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert list((output / run.WORK).glob('*.json'))
  run.prepare(request_of(corpus, output), lambda line: None)
  assert bytes_of(output) == bytes_of(prepared)


def test_several_processes_write_the_same_bytes(corpus, prepared, tmp_path):
  run.prepare(request_of(corpus, tmp_path / 'out', processes=2), lambda line: None)
  assert bytes_of(tmp_path / 'out') == bytes_of(prepared)


def test_a_finished_folder_is_verified_and_left_alone(corpus, prepared):
  before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
  (prepared / run.WORK).mkdir()  # as a kill between the manifest and the end leaves it
  run.prepare(request_of(corpus, prepared), lambda line: None)
  assert before == {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
  with pytest.raises(BadInput, match='other inputs or settings'):
    run.prepare(request_of(corpus, prepared, validation_fraction=0.3), lambda line: None)


def test_two_preparations_of_one_folder_do_not_mix(corpus, tmp_path):
  with run._own(tmp_path / 'out'), pytest.raises(BadInput, match='another process prepares'):
    run.prepare(request_of(corpus, tmp_path / 'out'), lambda line: None)


IDS_64 = pyarrow.array([[2**63] * 9], pyarrow.list_(pyarrow.uint64()))
BAD = {
  'not UTF-8': ('x.txt', b'caf\xe9 ' * 20, r'x.txt, the whole file: not UTF-8 text \(byte 3'),
  'a line not UTF-8': ('x.jsonl', b'{"text": "a"}\n{"text": "' + b'\xe9a ' * 20 + b'"}\n', 'at byte 14: not UTF-8'),
  'half a surrogate pair': ('x.jsonl', rb'{"text": "\ud800 and more words to read, and more"}', 'byte 0: not UTF-8'),
  'not JSON': ('x.jsonl', b'{"text": "a"}\n{"text": \n', 'x.jsonl, the line at byte 14: not JSON'),
  'another key': ('x.jsonl', b'{"body": "a"}\n', r"no key 'text' \(it has: body\)"),
  'not text': ('x.jsonl', b'{"text": 5}\n', "'text' is int, not text"),
  'cut .gz': ('x.jsonl.gz', gzip.compress(b'{"text": "a"}\n' * 50)[:-9], 'x.jsonl.gz: cannot be read to its end'),
  'cut .zst': ('x.jsonl.zst', None, 'x.jsonl.zst: cannot be read to its end'),
  'no parquet': ('x.parquet', b'PAR1 and so on', 'x.parquet: not a whole parquet file'),
  'wrong column': ('x.parquet', {'body': ['a']}, r"x.parquet: no column 'text' \(it has: body\)"),
  'column not text': ('x.parquet', {'text': [['a', 'b']]}, "column 'text' is list<.*>, neither text nor lists of tok"),
  'an id too large': ('x.parquet', {'text': [[5] * 9, [*[5] * 9, 264]]}, 'row 1: token 9 is 264, and the ids'),
  'a negative id': ('x.parquet', {'text': [[-3] * 9]}, 'x.parquet, row 0: token 0 is -3'),
  'an id of 64 bits': ('x.parquet', {'text': IDS_64}, 'x.parquet, row 0: token 0'),
  'an id that is null': ('x.parquet', {'text': [[1] * 8 + [None]]}, 'x.parquet, row 0: token 8 is -1'),
  'no arrow': ('x.arrow', b'ARROW1 and so on', 'x.arrow: not a whole Arrow stream, after row -1'),
  'an empty arrow': ('x.arrow', b'', 'x.arrow: not a whole Arrow stream'),
  'row not UTF-8': ('x.parquet', {'text': [b'a' * 40, b'\xff' * 40]}, 'x.parquet, row 1: not UTF-8'),
  'no text at all': ('x.txt', bytes(range(256)) * 9, 'x.txt, the whole file: not UTF-8'),
  'empty': ('x.txt', b'', r'--input=.*x.txt: no document was kept; 1 too short; .* --min_bytes=32 to --max_bytes='),
  'no file': ('x.png', b'', r'no file to read \(1 with other endings: .png\)'),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_named_by_file_and_record(name, tmp_path):
  file, content, sentence = BAD[name]
  path = tmp_path / 'in' / file
  path.parent.mkdir()
  if isinstance(content, dict):
    pyarrow.parquet.write_table(pyarrow.table(content), path)
  elif content is None:
    path.write_bytes(pyarrow.compress(b'{"text": "a"}\n' * 500, 'zstd', asbytes=True)[:-4])
  else:
    path.write_bytes(content)
  with pytest.raises(BadInput, match=sentence):
    run.prepare(request_of(path, tmp_path / 'out', patterns=[str(path)]), lambda line: None)


def save_to_disk(folder: Path, files: list[list[dict]], **kinds: pyarrow.DataType) -> Path:
  """A folder as Hugging Face's `datasets` saves one: each file is a list of record batches, columns by name."""
  folder.mkdir(parents=True)
  names = [f'data-{i:05}-of-{len(files):05}.arrow' for i in range(len(files))]
  for name, batches in zip(names, files, strict=True):
    tables = [pyarrow.table({key: pyarrow.array(v, kinds.get(key)) for key, v in one.items()}) for one in batches]
    with pyarrow.ipc.new_stream(str(folder / name), tables[0].schema) as stream:
      for table in tables:
        stream.write_table(table)
  state = {'_data_files': [{'filename': name} for name in names], '_fingerprint': '5', '_split': 'train'}
  (folder / 'state.json').write_text(json.dumps(state))
  (folder / 'dataset_info.json').write_text('{"features": {}}')
  return folder


@pytest.fixture
def saved(tmp_path) -> tuple[Path, list[str]]:
  """A saved dataset of three files, of several record batches each, and its texts."""
  rng = random.Random(5)
  texts = [text_of(rng) for _ in range(80)] + [f'a text of a few words, {i}, and no more' for i in range(10)]
  of = lambda i: {'id': list(range(10)), 'text': texts[10 * i : 10 * i + 10]}
  kinds = {'text': pyarrow.large_string()}
  return save_to_disk(tmp_path / 'saved', [[of(0), of(1)], [of(2)], [of(i) for i in range(3, 9)]], **kinds), texts


def prepare(tmp_path: Path, pattern: Path | str, **values) -> manifest.Manifest:
  request = request_of(tmp_path, tmp_path / 'out', patterns=[str(pattern)], **values)
  return run.prepare(request, lambda line: None)


def test_a_folder_of_save_to_disk_is_read_and_its_rows_are_where_the_index_says(saved, tmp_path, monkeypatch):
  monkeypatch.setattr(reading, '_ROWS_AT_ONCE', 4)
  folder, texts = saved
  of = prepare(tmp_path, folder)
  assert sorted(documents_of(tmp_path / 'out', 'train') + documents_of(tmp_path / 'out', 'validation')) == sorted(texts)
  files, _ = inputs.find([str(folder)])
  parts = [(part.file.number, part.start, part.stop) for unit in inputs.units(files) for part in unit]
  assert len(parts) > 4 and (2, 5, 6) in parts, 'a file is cut into parts, the last one small'
  assert of.about['sources'][0]['documents'] == 90 and 'dropped: duplicate' not in of.about['sources'][0]
  index = np.concatenate([np.load(tmp_path / 'out' / f'{shard.name}.index.npy') for shard in of.of('train')], axis=1)
  found = {texts[(0, 20, 30)[file] + row] for file, row in zip(index[records.FILE], index[records.PLACE], strict=True)}
  assert found == set(documents_of(tmp_path / 'out', 'train'))


def test_of_a_dataset_of_several_splits_one_is_named(saved, tmp_path):
  both = tmp_path / 'both'
  for split in ('train', 'test'):
    shutil.copytree(saved[0], both / split)
  (both / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  with pytest.raises(BadInput, match='both: a dataset of the splits train, test; name each .*--input=.*both/train'):
    inputs.find([str(both)])
  assert [file.path for file in inputs.find([str(both / 'test')])[0]] == sorted(
    map(str, (both / 'test').glob('*.arrow'))
  )
  (both / 'dataset_dict.json').write_text('{"splits": ["train"]}')
  assert len(inputs.find([str(both)])[0]) == 3


@pytest.mark.parametrize('cut', [3, 8, 9, 500])
def test_a_saved_dataset_that_was_cut_is_named(saved, tmp_path, cut):
  """8 bytes are the mark of the end alone: without it, all that is left is a stream of fewer batches."""
  path = saved[0] / 'data-00002-of-00003.arrow'
  path.write_bytes(path.read_bytes()[:-cut])
  with pytest.raises(BadInput, match=r'data-00002-of-00003.arrow: not a whole Arrow stream, after row (59|49) \('):
    prepare(tmp_path, saved[0])


def test_a_saved_dataset_with_a_missing_file_another_column_or_a_damaged_description_is_named(saved, tmp_path):
  with pytest.raises(BadInput, match=r"data-00000-of-00003.arrow: no column 'body' \(it has: id, text\)"):
    prepare(tmp_path, saved[0], text_key='body')
  with pytest.raises(BadInput, match="data-00000-of-00003.arrow: column 'id' is int64, neither text nor lists"):
    prepare(tmp_path, saved[0], text_key='id')
  (saved[0] / 'data-00001-of-00003.arrow').unlink()
  with pytest.raises(BadInput, match='data-00001-of-00003.arrow: missing, and state.json beside it names it'):
    prepare(tmp_path, saved[0])
  (saved[0] / 'state.json').write_text('{"_data_files": [3')
  with pytest.raises(BadInput, match='state.json: cannot be read'):
    prepare(tmp_path, saved[0])


@pytest.mark.parametrize('kind', ['arrow', 'parquet'])
def test_ready_token_ids_become_documents_as_they_are(kind, tmp_path):
  """Framed where they are not, each once, the short ones counted."""
  code, rng = tokenizer.Bytes(), np.random.default_rng(0)
  rows = [*(rng.integers(0, 256, n).tolist() for n in (40, 9, 300, 8, 2000)), [9] * 8, [32] * 8]
  framed = [[code.bos, *row, code.eos] for row in rows]
  column = [rows[0], framed[1], framed[2][:-1], rows[3], rows[4], rows[0], [1] * 7, None, *rows[5:]]
  if kind == 'arrow':
    batches, ids = [{'ids': column[:5]}, {'ids': column[5:]}], pyarrow.list_(pyarrow.int32())
    path = save_to_disk(tmp_path / 'in', [batches], ids=ids)
  else:
    path, ids = tmp_path / 'in.parquet', pyarrow.array(column, pyarrow.large_list(pyarrow.uint16()))
    pyarrow.parquet.write_table(pyarrow.table({'ids': ids}), path)
  of = prepare(tmp_path, path, text_key='ids', validation_fraction=0.0)
  (source,) = of.about['sources']
  assert (source['documents'], source['dropped: duplicate'], source['dropped: too short']) == (10, 1, 2)
  stream = Stream(tmp_path / 'out', of, 'train')
  ends = np.concatenate(list(stream.document_ends())).tolist()
  found = [stream.read(a, b).tolist() for a, b in zip([0, *ends], ends, strict=False)]
  assert sorted(found) == sorted(framed) and source['kept bytes'] == 4 * (40 + 11 + 301 + 8 + 2000 + 16)
  with pytest.raises(BadInput, match="column 'ids' holds token ids; name one of text"):
    vocabulary.train([str(path)], 300, tmp_path / 't.json', 'ids', 2**20, lambda line: None)


def test_documents_that_are_not_utf8_are_dropped_and_counted_when_asked(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'caf\xe9 ' * 20)
  (tmp_path / 'b.txt').write_bytes(b'coffee ' * 20)
  found = run.prepare(request_of(tmp_path, tmp_path / 'out', patterns=[str(tmp_path)], invalid_utf8='drop'), print)
  assert found.about['sources'][0]['dropped: not UTF-8'] == 1
  assert (
    (tmp_path / 'out' / manifest.FILES)
    .read_text()
    .splitlines()[0]
    .endswith('"dropped: not UTF-8": 1, "kept bytes": 0}')
  )


def test_sizes_of_little_and_a_missing_validation_are_said(tmp_path):
  (tmp_path / 'a.txt').write_text('coffee ' * 20)
  found = run.prepare(request_of(tmp_path, tmp_path / 'out', patterns=[f'{tmp_path}'], validation_fraction=0), print)
  first, *_, last = run.summary(found)
  assert '1 files, 140 bytes, 140 bytes kept' in first
  assert last.startswith('warning: --validation_fraction=0 held no document out')


def test_arrays_are_other_files_than_records_in_another_folder(corpus, prepared, arrays):
  one, other = manifest.read(prepared), manifest.read(arrays)
  plain = lambda of: [(s.name, s.documents, s.tokens, s.records, s.files['.index.npy']) for s in of.shards]
  assert plain(one) == plain(other) and one.key != other.key
  assert all(set(s.files) >= {'.zarr/zarr.json', '.zarr/c/0'} and '.arrayrecord' not in s.files for s in other.shards)
  with pytest.raises(BadInput, match='other inputs or settings'):
    run.prepare(request_of(corpus, prepared, format='zarr3'), lambda line: None)


@pytest.mark.parametrize('file', ['train-00001.arrayrecord', 'train-00001.zarr/c/0', 'train-00001.zarr/zarr.json'])
@pytest.mark.parametrize('damage', ['missing', 'truncated', 'flipped'])
def test_a_damaged_shard_of_a_finished_folder_is_named(corpus, prepared, arrays, tmp_path, file, damage):
  shutil.copytree(arrays if 'zarr' in file else prepared, tmp_path / 'out')
  path = tmp_path / 'out' / file
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 16
  path.write_bytes(raw[:-5] if damage == 'truncated' else raw)
  if damage == 'missing':
    path.unlink()
  with pytest.raises(BadInput, match=f'{file}: (missing|truncated or altered)'):
    run.prepare(request_of(corpus, tmp_path / 'out', format='zarr3' if 'zarr' in file else 'arrayrecord'), print)


def test_a_trained_tokenizer_round_trips_and_isolates_digits_and_punctuation(corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(vocabulary, '_HELD_OUT', 4)  # of one in 50 this little corpus would have none
  path, said = tmp_path / 'tok' / 'tokenizer.json', []
  vocabulary.train([str(corpus)], 307, path, 'text', 2**20, said.append)
  code = tokenizer.load(str(path))
  assert code.vocab_size == 307 and (code.bos, code.eos, code.pad) == (271, 272, 276)  # special tokens at the top
  for text in ('naïve 😀\n\ttab', 'the loop7 12,5 <|end_text|>', ''):
    (tokens,) = code.encode([text])
    assert code.decode(tokens) == text and (tokens < 271).all(), 'special tokens in a text are text'
  pieces = [code.decode([t]) for t in code.encode(['again12, again'])[0]]
  assert {'1', '2', ','} <= set(pieces)
  assert 'bytes per token on ' in said[-1] and 'each text back as it was' in said[-1]
  template = json.loads(path.with_name('tokenizer_config.json').read_text())['chat_template']
  assert '<|begin_header|>' in template and 'Huginn' in template
  with pytest.raises(BadInput, match='the text has pairs for'):
    vocabulary.train([str(corpus / 'deep' / 'er' / '0.txt')], 60_000, path, 'text', 2**20, said.append)


def test_a_tokenizer_is_refused_ahead_of_its_training_and_measured_only_where_text_was_held_out(tmp_path):
  (tmp_path / 'a.txt').write_text(''.join(f'{word} and ' for word in ('one', 'other', 'another')) * 9)
  train = lambda size, output: vocabulary.train([f'{tmp_path}'], size, tmp_path / output, 'text', 2**20, said.append)
  said = []
  for size, output, words in [
    (-1, 't.json', '--vocab_size=-1: .* give more'),
    (300, 'a.txt/t.json', '--output=.*a.txt/t.json cannot be written'),
    (300, '.', 'is a folder; give the path of a file'),
  ]:
    with pytest.raises(BadInput, match=words):
      train(size, output)
  assert not said
  train(293, 't.json')
  assert '100% of 270 bytes in 1 files' in said[0] and 'no text was held out' in said[1] and 'back' not in said[1]


@pytest.mark.parametrize('text', [None, '{"model": 3}', '[' * 100_000, *({'model': model} for model in (
  {}, {'type': 'Rhyme'}, {'type': 'BPE', 'vocab': {}, 'merges': []}, {'type': 'Unigram', 'vocab': [], 'unk_id': 3},
))], ids=range(7))  # fmt: skip
def test_what_is_no_tokenizer_is_refused(tmp_path, text):
  if text is not None:
    whole = {'added_tokens': [], 'pre_tokenizer': None}
    (tmp_path / 't.json').write_text(text if isinstance(text, str) else json.dumps(text | whole))
  with pytest.raises(BadInput, match='--tokenizer=.*t.json: .*; give bytes or a tokenizer.json'):
    tokenizer.load(str(tmp_path / 't.json'))


def sentencepiece(path, decoder) -> tokenizer.Tokenizer:
  """A tokenizer.json in SentencePiece's layout, where a word brings the space before it."""
  words = ['<s>', '</s>', '\u2581', 'a', '\u2581cat', '\u2581The', 's']
  model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='</s>')
  made = tokenizers.Tokenizer(model)
  made.decoder = decoder
  made.add_special_tokens(words[:2])
  made.save(str(path))
  return tokenizer.load(str(path))


@pytest.mark.parametrize(
  'decoder',
  [tokenizers.decoders.Metaspace(), tokenizers.decoders.Sequence([
    tokenizers.decoders.Replace('\u2581', ' '), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
    tokenizers.decoders.Strip(' ', 1, 0)])],
  ids=['metaspace', 'strip'],
)  # fmt: skip
def test_what_continues_a_text_keeps_the_space_that_it_begins_with(tmp_path, decoder):
  code = sentencepiece(tmp_path / 't.json', decoder)
  assert code.decode([code.bos, 5, 4, 6]) == 'The cats', 'the beginning of a text has none'
  assert code.decode([4, 6, 4]) == ' cats cat' and code.decode([6]) == 's' and code.decode([]) == ''


def test_half_a_surrogate_pair_is_no_text(tmp_path):
  code = sentencepiece(tmp_path / 't.json', tokenizers.decoders.Metaspace())
  with pytest.raises(UnicodeEncodeError):
    code.encode(['a', 'b\ud800'])


@pytest.mark.slow
def test_killed_at_ten_random_moments_of_its_work_it_ends_in_the_same_bytes(tmp_path):
  """A start that ends before it is killed is no kill: it is compared, removed, and another begins."""
  write_corpus(tmp_path / 'in', scale=50)
  request = request_of(tmp_path / 'in', tmp_path / 'killed', processes=2)

  def start(request: run.Request) -> subprocess.Popen:
    command = command_of(request, unit_bytes=150_000, shard_bytes=400_000)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'begun\n'
    return process

  whole = start(dataclasses.replace(request, output=tmp_path / 'whole'))
  began = time.monotonic()
  assert whole.wait() == 0
  secs, expected = time.monotonic() - began, bytes_of(tmp_path / 'whole')
  assert len(expected) > 20, 'too few shards for a kill to come between'
  moments, kills, left = random.Random(0), 0, []
  for _ in range(40):
    process = start(request)
    time.sleep(moments.uniform(0.2, 0.9) * secs)
    process.kill()
    process.wait()
    if (request.output / manifest.NAME).exists():
      shutil.rmtree(request.output)
      secs *= 0.8  # the machine has become faster
    else:
      kills += 1
      left.append(len(list((request.output / run.WORK).glob('*.json'))))
    if kills == 10:
      break
  assert kills == 10 and max(left) > 5, f'{kills} kills came while there was work; parts done after each: {left}'
  assert start(request).wait() == 0
  assert bytes_of(request.output) == expected


def test_ranges_of_digests_cover_all_and_do_not_overlap():
  for count in (1, 3, 7):
    bounds = [merge.Range(i, count, (), '<u2', 0.1, 'arrayrecord').bounds for i in range(count)]
    assert bounds[0][0] == 0 and bounds[-1][1] == 2**64 - 1
    assert all(a[1] + 1 == b[0] for a, b in zip(bounds, bounds[1:], strict=False))
