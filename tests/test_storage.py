"""Workdirs in an object store: what holds for a folder holds there, and a fault is never taken for absence."""

import itertools
import re

import pytest

from latent_loop import checkpoint, storage, workdir
from latent_loop.checkpoint import inspect, manifest
from latent_loop.checkpoint.folder import Folder
from latent_loop.errors import BadInput, SaveFailed, StoreFault
from latent_loop.metrics import JsonLines, read_lines
from latent_loop.storage import objects
from launch import program
from tests.object_store import BUCKET
from tests.test_checkpoint import newest, save
from tests.tiny import tiny_config

URL = f'gs://{BUCKET}/a/run'


@pytest.fixture(params=['local', 'store'])
def place(request, tmp_path) -> storage.Path:
  """A folder that is not there yet, on this machine or in the store."""
  if request.param == 'local':
    return tmp_path / 'run'
  return storage.path(request.getfixturevalue('store') and URL)


@pytest.fixture
def remote(store) -> storage.Path:
  return storage.path(URL)


# --- files ------------------------------------------------------------------------------------------------


def fill(folder: storage.Path, names: list[str]) -> None:
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    storage.write(folder / name, name)


def test_files_are_written_found_moved_and_removed(place):
  names = ['a', 'b/c', *(f'b/d/{i}' for i in range(19))]  # more than one page of a list
  assert not place.exists()
  fill(place, names)
  assert sorted(storage.files_below(place)) == sorted(names)
  assert {path.name: (path.is_dir(), path.is_file()) for path in place.iterdir()} == {
    'a': (False, True), 'b': (True, False)
  }  # fmt: skip
  storage.move(place / 'b/d', place / 'set_aside/0')
  assert not (place / 'b/d').exists() and (place / 'set_aside/0/18').read_text() == 'b/d/18'
  storage.epath.Path(place / 'set_aside').rmtree()
  (place / 'b/c').unlink()
  assert storage.files_below(place) == ['a'] and not (place / 'set_aside').exists()
  storage.write(place / 'a', b'\xc3\xa9\n')
  assert (place / 'a').read_text() == 'é\n' and (place / 'a').read_bytes() == b'\xc3\xa9\n'


@pytest.mark.parametrize('size', [0, 1, 5])
def test_a_length_is_known_without_reading(place, size):
  place.mkdir(parents=True)
  storage.write(place / 'x', b'?' * size)
  assert [storage.is_longer(place / 'x', n) for n in (0, 1, 4, 5, 2**40)] == [size > n for n in (0, 1, 4, 5, 2**40)]
  with pytest.raises(FileNotFoundError):
    storage.is_longer(place / 'y', 0)


def test_what_is_absent_is_absent(place):
  place.mkdir(parents=True)
  storage.write(place / 'x', 'x')
  (place / 'y').unlink(missing_ok=True)
  assert not (place / 'y').exists() and not (place / 'y').is_dir() and not (place / 'y').is_file()
  for read in ((place / 'y').read_text, (place / 'y').unlink, lambda: list((place / 'y').iterdir())):
    with pytest.raises(FileNotFoundError):
      read()


def test_a_folder_that_a_console_made_is_not_there(store, remote):
  store.objects.update({'a/run/': b'', 'a/run/checkpoints/': b''})
  assert not remote.exists() and storage.files_below(remote) == [] and Folder(remote).steps() == []
  assert end_of(URL) == (0, ''), 'a run can start in it'


ASK = {
  'exists': lambda path: path.exists(),
  'is_dir': lambda path: path.is_dir(),
  'is_file': lambda path: path.is_file(),
  'iterdir': lambda path: list(path.iterdir()),
  'read': lambda path: path.read_text(),
  'is_longer': lambda path: storage.is_longer(path, 1),
  'steps': lambda path: Folder(path).steps(),
  'unfinished': lambda path: Folder(path).unfinished(),
}
FAULTS = ({'changes_left': -1}, {'fail_every': 1})


@pytest.mark.parametrize('faults', FAULTS, ids=str)
@pytest.mark.parametrize('ask', ASK)
def test_a_fault_is_never_taken_for_absence(store, remote, ask, faults):
  with store.faults(**faults), pytest.raises(StoreFault, match=rf'{URL}.*: the store did not read it \(') as caught:
    ASK[ask](remote)
  assert not caught.value.writing


@pytest.mark.parametrize('faults', FAULTS, ids=str)
def test_a_write_that_fails_is_an_error_of_writing(store, remote, faults):
  with store.faults(**faults), pytest.raises(StoreFault, match='did not write it') as caught:
    storage.write(remote / 'x', 'x')
  assert caught.value.writing


def test_requests_that_fail_now_and_then_are_made_again(store, remote):
  with store.faults(fail_every=4):
    fill(remote, [str(i) for i in range(20)])
    assert sorted(map(int, storage.files_below(remote))) == list(range(20))


@pytest.mark.parametrize(
  'url, words',
  [
    ('s3://bucket/run', 'Orbax, which writes the arrays .* gs:// only .*; give gs://BUCKET/FOLDER, or a folder that'),
    ('memory://run', 'ends with it, and no other process sees it; give a local folder, .*/dev/shm/FOLDER'),
    ('GS://bucket/run', 'no store of this kind is known'),
    ('gs://bucket', 'not the URL of a folder in a bucket'),
    ('gs:///run', 'not the URL of a folder in a bucket'),
    ('gs://bucket/a/../b', 'not the URL of a folder in a bucket'),
    ('gs://b/run', 'no bucket can have this name'),
  ],
)
def test_what_is_no_url_of_ours_is_refused_in_words(url, words):
  with pytest.raises(BadInput, match=words):
    storage.path(url)


# --- logs -------------------------------------------------------------------------------------------------


def steps_in(path: storage.Path) -> list[int]:
  return [record['step'] for record in read_lines(path)]


@pytest.mark.parametrize('keep', [0, 1, 3])
def test_lines_go_on_behind_the_step_of_a_resume(place, keep):
  place.mkdir(parents=True)
  for first, last in ((1, 3), (keep + 1, 5)):
    lines = JsonLines(place / 'metrics.jsonl', keep_through=first - 1)
    for step in range(first, last + 1):
      lines.write(step, {})
    lines.sync()
    assert steps_in(place / 'metrics.jsonl') == list(range(1, last + 1))
    lines.close()


def test_lines_reach_the_store_when_it_is_time_and_a_failure_waits_for_a_sync(store, remote, monkeypatch):
  monkeypatch.setattr(storage, '_SECS_BETWEEN_WRITES', 0.0)
  monkeypatch.setattr(storage, '_SHARE_OF_TIME', 1e9)
  lines = JsonLines(remote / 'metrics.jsonl', keep_through=0)
  lines.write(1, {})
  assert steps_in(remote / 'metrics.jsonl') == [1]
  with store.faults(changes_left=0):
    lines.write(2, {})
  assert steps_in(remote / 'metrics.jsonl') == [1]
  lines.write(3, {})
  assert steps_in(remote / 'metrics.jsonl') == [1, 2, 3]
  with store.faults(changes_left=0):
    lines.write(4, {})
    with pytest.raises(SaveFailed, match='metrics.jsonl: cannot be written .*did not write it'):
      lines.sync()


# --- checkpoints ------------------------------------------------------------------------------------------


def test_a_damaged_step_is_named_and_set_aside_and_the_one_before_is_used(store, remote, capsys):
  save(remote, 1, 2, 3)
  bad = 'a/run/checkpoints/3/state/manifest.ocdbt'
  store.objects[bad] = b'?' + store.objects[bad][1:]
  moved = {key: content for key, content in store.objects.items() if '/3/' in key}
  with pytest.raises(BadInput, match='checkpoints/3: damaged: state/manifest.ocdbt is altered'):
    list(inspect.verify(remote, [3]))
  assert newest(remote, fsdp=2)[0] == 2
  assert re.search('3: damaged: state/manifest.ocdbt is altered.*; set aside as ', capsys.readouterr().err)
  there = {key.replace('set_aside/3-0', '3'): content for key, content in store.objects.items() if '/3-0/' in key}
  assert there == moved and Folder(remote).steps() == [1, 2]
  assert '   2 ' in inspect.table(remote)[-2] and 'set aside: ' in inspect.table(remote)[-1]
  save(remote, 3)
  assert newest(remote)[0] == 3


def test_a_kill_while_a_step_is_set_aside_leaves_it_whole_or_set_aside(store, remote):
  """Whatever the change of the store that it fell before; the next start ends what was begun."""
  fill(remote / 'checkpoints', [f'{step}/{name}' for step in (2, 3) for name in ('x', 'state/y', manifest.NAME)])
  before, ended = dict(store.objects), False
  for changes in itertools.count():
    store.objects.clear()
    store.objects.update(before)
    folder = Folder(remote)
    with store.faults(changes_left=changes):
      try:
        folder.set_aside(3)
        ended = True
      except StoreFault:
        pass
    assert 3 not in folder.steps() or before.items() <= store.objects.items(), changes
    folder.clean_up()
    names = {key.replace('set_aside/3-0', '3') for key in store.objects}
    assert names == set(before), 'nothing is lost, no mark is left'
    assert folder.steps() == ([2, 3] if changes == 0 else [2]), changes
    if ended:
      break
  assert changes == 8, 'a mark, three copies, three deletions, the mark again'


@pytest.mark.parametrize('changes', [0, 1, 4, 8, 12])
def test_a_kill_inside_a_save_costs_that_step_alone(store, remote, changes):
  save(remote, 1)
  with store.faults(changes_left=changes), pytest.raises(SaveFailed, match='checkpoints/2: this checkpoint could not'):
    save(remote, 2)
  whole = 'a/run/checkpoints/2/manifest.jsonl' in store.objects
  assert newest(remote)[0] == 1 + whole
  assert {key.split('/')[3] for key in store.objects} == ({'1', '2'} if whole else {'1'}), 'nothing else is left'
  assert whole == (changes == 12), 'the last change but one'
  save(remote, 3)
  assert newest(remote)[0] == 3


@pytest.mark.parametrize('faults', [{'changes_left': -1}, {'fail_every': 1}], ids=str)
def test_a_store_that_fails_while_it_is_read_damages_no_step(store, remote, monkeypatch, faults):
  save(remote, 1, 2)
  before = dict(store.objects)
  load = checkpoint.ocp.load

  def load_from_a_store_that_fails(*args):
    with store.faults(**faults):
      return load(*args)

  monkeypatch.setattr(checkpoint.ocp, 'load', load_from_a_store_that_fails)
  with pytest.raises(StoreFault, match='checkpoints/2: the store did not read it'):
    newest(remote)
  monkeypatch.undo()
  assert store.objects == before and newest(remote)[0] == 2


# --- how a start ends -------------------------------------------------------------------------------------


def end_of(url: str) -> tuple[int, str]:
  """(exit code, sentence) of a program that opens a workdir."""
  return program._guard(lambda: workdir.open_workdir(storage.path(url), tiny_config()) or 0)


@pytest.mark.parametrize(
  'url, faults, words',
  [
    ('gs://no-such-bucket/run', {}, 'no-such-bucket/run cannot be used: .*The specified bucket does not exist'),
    (
      URL,
      {'changes_left': 0},
      'did not write it .PERMISSION_DENIED: no permission.; give a folder that can be written',
    ),
    (URL, {'fail_every': 1}, 'All 2 retry attempts failed: try again'),
    (URL, {'unlisted': True}, 'credentials need the right to list objects too'),
  ],
)
def test_a_store_that_cannot_be_used_is_code_2_and_a_sentence(store, url, faults, words):
  with store.faults(**faults):
    code, sentence = end_of(url)
  assert code == 2 and re.search(words, sentence), sentence


@pytest.mark.slow
def test_a_silent_store_ends_a_start_with_code_2_and_a_save_with_13(store, remote, monkeypatch):
  monkeypatch.setitem(objects.RETRIES, 'max_retries', 0)
  objects.bucket_at.cache_clear()
  assert end_of(URL) == (0, '')
  for start, wanted in ((lambda: end_of(URL), 2), (lambda: program._guard(lambda: save(remote, 1)), 13)):
    with store.faults(silent=True):
      code, sentence = start()
    assert code == wanted and 'Operation too slow' in sentence
