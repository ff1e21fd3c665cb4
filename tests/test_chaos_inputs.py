"""Bad input ends with a sentence; launch.chaos inputs sees it when it does not."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from latent_loop import trained, workdir
from latent_loop.chaos import accidents, drawn, inputs
from latent_loop.chaos.drawn import Edit, Input
from latent_loop.chaos.forks import Ended, Programs
from latent_loop.config import Config
from latent_loop.errors import BadInput
from latent_loop.interop import files, from_hf
from latent_loop.metrics import JsonLines, read_lines
from latent_loop.parallel import memory
from latent_loop.report import depth_report
from latent_loop.sealing import from_json, seal, to_json, view
from latent_loop.trust import alarms
from launch import program
from tests.tiny import tiny_config

DEEP = '[' * 100_000
LONG = '9' * 5000  # Python refuses to read or write it

# --- a test for every defect that the inputs found -----------------------------------------------------------


@pytest.mark.parametrize(
  'text', [DEEP, f'{{"seed": {LONG}}}', to_json(Config()).replace('"seed": 0', f'"seed": {LONG}')]
)
def test_json_that_python_cannot_read_is_no_config(text):
  with pytest.raises(BadInput, match='run/config.json: not a sealed config'):
    from_json(text, 'run/config.json')


@pytest.mark.parametrize(
  'text', [DEEP, f'{{"n_embd": {LONG}}}', '{"n_embd": 1' + 30 * '0' + '}'], ids=['deep', 'long', 'large']
)
def test_json_that_python_cannot_read_is_no_model(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(BadInput, match='config.json: not a readable JSON file'):
    files.read_json(tmp_path / 'config.json')


@pytest.mark.parametrize(
  'key, value, words',
  [
    ('seed', 10**5000, r'config.seed=2\*\*16609...: it has more than 64 bits'),
    ('mesh.tensor', 10**5000, r'config.mesh.tensor=2\*\*16609...: it has more than 64 bits'),
    ('train.num_steps', 2**31, 'config.train.num_steps=2147483648 must lie between 1 and 2147483647'),
    ('name', 'a\udcff', 'not text that UTF-8 can write'),
    ('name', 7 * 'x' * 100 + '\ud800', r"'x+\.\.\.: not text"),
    ('model.block', ['sandwich'], 'config.model.block=.*not known'),
    ('depth.curriculum', view(Config()).depth, 'config.depth.curriculum=[^\n]*: not known'),
    ('model.num_core_layers', 10**6, 'num_core_layers=1000000 must lie between 0 and 1024'),
    ('depth.mean', 2**30, 'config.depth.mean=1073741824 is above'),
    ('depth.sigma', 1e200, 'config.depth.sigma=1e.200 must lie in'),
    ('data.max_difficulty', 10**9, 'max_difficulty=1000000000 is above 1000'),
    ('eval.sample_tokens', 10**9, 'sample_tokens=1000000000 must lie between'),
  ],
  ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_values_that_no_program_can_take_are_refused_by_the_config(key, value, words):
  values = view(Config())
  with values.ignore_type():
    values.update_from_flattened_dict({key: value})
  with pytest.raises(BadInput, match=words):
    seal(values)


@pytest.mark.parametrize('data', [b'{', b'[]', b'{}', b'{"packages": 3}', DEEP.encode(), b'\xff', None], ids=range(7))
def test_a_broken_versions_json_does_not_stop_a_run(tmp_path, data):
  path = tmp_path / 'versions.json'
  path.mkdir() if data is None else path.write_bytes(data)
  (tmp_path / 'config.json').write_text(to_json(tiny_config()))
  assert workdir.update_config(tmp_path, tiny_config()) == []


JUNK = [b'\xff\xfe', b'[1]', b'{"loss": 1.0}', b'{"step": "x"}', DEEP.encode(), b'3', b'']


def test_lines_that_are_no_records_are_passed_over_and_stay(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  record = lambda step: json.dumps({'step': step}).encode()
  path.write_bytes(b'\n'.join([record(1), *JUNK, record(2), record(3), b'{"step": 4, "lo']))
  assert [line['step'] for line in read_lines(path)] == [1, 2, 3]
  JsonLines(path, keep_through=2).close()
  assert path.read_bytes() == b'\n'.join([record(1), *JUNK, record(2), b'']), 'step 3 is done again, line 4 is half'


def test_a_folder_in_place_of_a_log_is_a_sentence(tmp_path):
  (tmp_path / 'metrics.jsonl').mkdir()
  for use in (read_lines, lambda path: JsonLines(path, 0)):
    with pytest.raises(BadInput, match='metrics.jsonl: cannot be read or written'):
      use(tmp_path / 'metrics.jsonl')


GOOD_EVALUATION = {
  'step': 2, 'mean_depth': 2, 'loss_by_depth': {'1': 2.0, '2': None},
  'residual_by_depth': {'1': 1.0, '2': 0.5, '8': 0.1}, 'token_correlation_by_depth': {'1': 0.1, '2': 0.2},
}  # fmt: skip


@pytest.mark.parametrize(
  'change',
  [{'mean_depth': '2'}, {'mean_depth': 3}, {'loss_by_depth': None}, {'residual_by_depth': {'1': 1.0, '2': 'x'}}],
)
def test_alarms_read_no_broken_evaluation(change):
  assert alarms.readable(GOOD_EVALUATION)
  assert not alarms.readable({**GOOD_EVALUATION, **change})


def test_a_report_is_drawn_over_broken_and_skipped_steps():
  by_depth = {'1': 2.0, '2': 1.0}
  numbers = {'mean_depth': 2, 'chance_accuracy': None, 'loss_by_depth': by_depth, 'residual_by_depth': by_depth}
  curve = [{'step': 1, 'loss': 1.0, 'n': 1, 'k': 1}, {'step': 2, 'loss': None, 'n': 2, 'k': 1}, {'step': 3}]
  curve += [{'step': 4, 'loss': 'x', 'n': 1, 'k': 1}, {'step': 5, 'loss': 1.0, 'n': 10**30, 'k': 1}]
  figure = depth_report._draw(numbers, curve)
  assert list(figure.axes[2].lines[0].get_xdata()) == [1, 2, 5]


def test_what_is_larger_than_the_memory_is_refused_before_it_is_allocated(monkeypatch):
  small = tiny_config()
  memory.check_batch(small)
  with pytest.raises(BadInput, match='config.train.batch_size=1073741824.* a batch takes .* GiB'):
    memory.check_batch(dataclasses.replace(small, train=dataclasses.replace(small.train, batch_size=2**30)))

  class Whole:
    def shard_shape(self, shape):
      return shape

  arrays = {'a': np.empty((3, 5), np.float32), 'b': np.empty((7,), np.int8)}
  specs = {'a': Whole(), 'b': Whole()}
  monkeypatch.setattr(memory, '_device_bytes', lambda: 67)
  memory.check_state(arrays, specs)
  monkeypatch.setattr(memory, '_device_bytes', lambda: 66)
  with pytest.raises(BadInput, match='parameters and optimizer take'):
    memory.check_state(arrays, specs)


def test_paths_that_no_file_can_have_are_a_sentence():
  with pytest.raises(BadInput, match='--workdir=xxx.*no file can be there .File name too long'):
    program.workdir_of('x' * 300)


def test_so_many_devices_for_a_layer_as_there_are_not():
  load = program.loader('run', None, 3)
  with pytest.raises(BadInput, match='--tensor=3: .* the 8 here'):
    load()


def test_a_model_that_came_without_its_tokenizer_is_a_sentence(monkeypatch):
  found = SimpleNamespace(config=tiny_config())
  monkeypatch.setattr(trained, 'load', lambda place, tensor: found)
  monkeypatch.setattr(from_hf, 'load', lambda place, tensor: found)
  with pytest.raises(BadInput, match='^run: .* 68 are known; put its own tokenizer.json in the --hf folder'):
    program.loader('run', None, 1)()
  with pytest.raises(BadInput, match='^folder: .* put its own tokenizer.json there'):
    program.loader(None, 'folder', 1)()
  found.config = tiny_config(**{'model.vocab_size': 264})
  assert program.loader('run', None, 1)()[1].vocab_size == 264


def test_a_sentence_is_one_line_whatever_is_in_it():
  def main():
    raise BadInput('--workdir=a\nb\x1b[0m\udcff\u00e9: no')

  assert program._guard(main) == (2, r'error: --workdir=a\nb\x1b[0m\udcff' + '\u00e9: no')


@pytest.mark.parametrize('value', ['\u00b2:3', f'1:{LONG}', '3:1', ':', '1:2:3'], ids=range(5))
def test_a_range_of_steps_that_is_none(value):
  with pytest.raises(BadInput, match='not a range of steps'):
    program.step_range(value)


@pytest.mark.parametrize(
  'error, code', [(MemoryError(), 2), (RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes'), 2),
                  (RuntimeError('RESOURCE_EXHAUSTED: too many requests'), 1), (KeyError('x'), 1)]
)  # fmt: skip
def test_out_of_memory_is_a_sentence_and_a_bug_is_a_traceback(error, code):
  def main():
    raise error

  got, said = program._guard(main)
  assert got == code and ('Traceback' in said) == (code == 1)
  assert code == 1 or said.startswith('error: out of memory (') and 'ask for less' in said


# --- the trial ----------------------------------------------------------------------------------------------

_PLANTED = {
  'traceback': 'from latent_loop import dry_run\ndry_run.describe = lambda config: 1 / 0\n',
  'hang': 'import time\ntime.sleep(600)\n',
  'lost file': 'import pathlib\npathlib.Path("prompts.txt").write_text("")\n',
  'exit code': 'import os\nos.abort()\n',
  'no sentence': 'import os\nos._exit(2)\n',
  'unclear sentence': 'import os, sys\nprint("error: bad input", file=sys.stderr, flush=True)\nos._exit(2)\n',
}


@pytest.mark.slow
def test_planted_faults_are_found(tmp_path, monkeypatch):
  """And a program that only moves a file has none."""
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  harmless = 'import pathlib\npathlib.Path("prompts.txt").rename("moved.txt")\n'
  with Programs(tmp_path) as programs:
    inputs.make_pristine(tmp_path / 'pristine', programs, set())
    for fault, code in {**_PLANTED, None: harmless}.items():
      edits = Edit(drawn.EXPERIMENT, 'append', 0, code), Edit(drawn.PROMPTS, 'append', 0, 'x')
      one = Input('experiment', 'train', (f'--config={drawn.EXPERIMENT}', '--dry_run'), edits)
      trials = inputs.Trials(tmp_path / 'pristine', limit_secs=2 if fault == 'hang' else 60)
      found = {said.partition(':')[0] for said in trials.run(one, programs).faults}
      assert fault in found if fault else not found, (fault, found)


@pytest.mark.slow
def test_twenty_inputs_end_as_they_should(tmp_path, monkeypatch):
  """Those of launch.chaos inputs that need no trained run, which would take its time."""
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  everything = list(enumerate(drawn.draw(60, 1)))
  todo = [(i, one) for i, one in everything if not inputs.names_used([one]) & {drawn.RUN, drawn.STOPPED}]
  cheap = [(i, one) for i, one in todo if '--time_limit' not in str(one.args)][:19]
  good = Input('experiment', 'train', (f'--config={drawn.EXPERIMENT}', '--dry_run'), ())  # 19 may well all be bad
  outcomes = list(inputs.run_all([*cheap, (len(everything), good)], tmp_path))
  assert [outcome.faults for _, _, outcome in outcomes if outcome.faults] == []
  assert len(outcomes) == 20 and {outcome.ended.code for _, _, outcome in outcomes} >= {0, 2}


# --- what is drawn ------------------------------------------------------------------------------------------


def test_inputs_are_drawn_alike_by_seed_and_each_kind_has_its_share():
  first = drawn.draw(20, 7)
  assert first == drawn.draw(20, 7) != drawn.draw(20, 8)
  assert {one.kind for one in first} == set(drawn.KINDS) and 20 <= len(first) < 20 + len(drawn.KINDS)


def test_a_sentence_is_clear_that_names_the_flag_or_the_path_that_it_gives():
  one = Input('flag', 'evaluate', ('depths', '--workdir=golden'))
  said = lambda sentence: inputs.faults(one, Ended(2, '', f'error: {sentence}\n', 1.0, 0))
  assert said('golden/config.json: not a sealed config') == said('--workdir is no folder') == []
  assert [fault.partition(':')[0] for fault in said('something is wrong')] == ['unclear sentence']


def test_an_input_gets_the_files_that_it_names():
  one = Input('x', 'train', ('--dry_run', '--workdir=stopped'), (Edit('golden/config.json', 'flip', 0, ''),))
  assert inputs.names_used([one]) == {drawn.STOPPED, drawn.GOLDEN}


def test_every_key_of_the_config_is_drawn_from():
  names = {key for key, _ in drawn.keys()}
  assert {'model.width', 'guard.max_loss', 'optim.no_decay', 'name', 'mesh'} <= names


@pytest.mark.parametrize('kind', sorted(accidents.BY_NAME))
def test_an_accident_changes_the_file(tmp_path, kind):
  header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
  safetensors = kind in {'lie_about_the_length', 'replace_the_header', 'edit_the_header'}
  content = len(header).to_bytes(8, 'little') + header + bytes(12) if safetensors else b'{"a": 1, "b": [2, 3]}'
  path = tmp_path / ('x.safetensors' if safetensors else 'x.json')
  path.write_bytes(content)
  assert accidents.BY_NAME[kind](path, inputs.random.Random(3), '7')
  assert not path.is_file() or path.read_bytes() != content
