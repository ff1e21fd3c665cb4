"""The benchmark: keys of its lines, what its twin is asked for, flags that are refused."""

import dataclasses
import json
import math
import os
import sys
from unittest import mock

import jax
import numpy as np
import pytest

from latent_loop import benchmark, benchmark_depth, benchmark_trust
from latent_loop.checkpoint import inspect
from latent_loop.errors import BadInput
from latent_loop.model import build, cost
from latent_loop.twin import Twin
from launch import bench, xla_flags
from tests.tiny import B, T, tiny_config

SPEED = {'tokens_per_second', 'seconds_median', 'spread', 'flops_per_second', 'fraction_of_matmul', 'memory_bytes'}
SPEED |= {'compile_seconds', 'compile_count'}
TINY = {'model.num_prelude_layers': 0, 'model.num_coda_layers': 0, 'model.remat': 'none'}


@pytest.fixture
def machine(monkeypatch):
  """No search for the best matrix product."""
  monkeypatch.setattr(benchmark, 'best_matmul', lambda dtype: 1e12)


@pytest.fixture
def twin(tmp_path):
  """A twin that repeats what it is asked for, at 2 tokens a second."""
  path = tmp_path / 'twin.py'
  path.write_text('import json, sys\nprint(json.dumps({"tokens_per_second": 2.0, "asked": sys.argv[1:]}))\n')
  return Twin(path, tmp_path.__class__(sys.executable), threads=1, repeats=2)


@pytest.mark.slow
def test_training_lines_have_the_keys_of_the_contract_and_the_depths_asked_for(machine, twin):
  config = tiny_config(**TINY)
  lines = list(benchmark.train(config, [(0, 2), (3, 2)], benchmark.Effort(1, 2, twin)))
  assert [line['mode'] for line in lines] == ['machine', 'train', 'train', 'train', 'train', 'fit']
  ours = [line for line in lines if 'spread' in line]
  assert [(line['n'], line['k']) for line in ours] == [(0, 2), (3, 2)]
  for line in ours:
    assert line.keys() >= SPEED
    assert line['tokens_per_second'] == B * T / line['seconds_median']
    assert line['ratio'] == line['tokens_per_second'] / 2
    model = build(config.model, config.depth)
    assert line['flops_per_second'] * line['seconds_median'] == pytest.approx(
      B * T * cost.count(model, T).train(line['n'], 2)
    )
    assert line['compile_count'] == 1
  assert all(math.isfinite(lines[-1][key]) for key in ('a_seconds', 'b_seconds', 'core_seconds', 'b_over_core'))
  json.dumps(lines)


@pytest.mark.slow
def test_decoding_lines_have_the_keys_of_the_contract(machine):
  lines = list(benchmark.decode(tiny_config(**TINY), [1, 3], benchmark.Prompts(4, 2, 3), benchmark.Effort(1, 2)))
  assert [(line['mode'], line.get('depth')) for line in lines] == [('machine', None), ('decode', 1), ('decode', 3)]
  for line in lines[1:]:
    assert line.keys() >= SPEED - {'memory_bytes'} | {'cache_bytes', 'first_token_seconds'} and line['cache'] == 'full'
    assert line['tokens_per_second'] == 3 * 2 / line['seconds_median']
  json.dumps(lines)


@pytest.mark.slow
def test_trust_is_measured_on_the_step_that_trains_and_its_saves_are_whole(machine, tmp_path):
  config = tiny_config(**TINY)
  with mock.patch.object(benchmark_trust, 'train_point', wraps=benchmark.train_point) as made:
    _, guard, sums, saves = benchmark_trust.trust(config, (0, 2), tmp_path, benchmark.Effort(1, 2))
  assert (guard['mode'], sums['mode'], saves['mode']) == ('guards', 'checksums', 'saves') and made.call_count == 3
  assert guard['pairs'] == len(guard['seconds']) == 2 and sums['share_of_step'] > 0
  assert -1 < guard['share_interval'][0] <= guard['share_of_step'] <= guard['share_interval'][1]
  state = made.call_args.args[2][0]
  arrays = [leaf for leaf in jax.tree.leaves(state) if leaf is not None]
  assert sums['state_bytes'] == sum(leaf.nbytes for leaf in arrays) > 8 * 4
  assert len(saves['call_seconds']) == len(saves['step_behind_seconds']) == 2 and saves['stall_seconds_median'] > 0
  assert saves['allowed_seconds'] == max(saves['step_seconds_median'], 0.05)
  assert [': good' in line for line in inspect.verify(tmp_path, [])] == [True]
  json.dumps([guard, sums, saves])


@pytest.mark.slow
def test_depth_costs_bytes_between_devices_only_where_weights_are_gathered_again(machine, monkeypatch):
  monkeypatch.setattr(benchmark_depth, 'stream_bytes_per_second', lambda: 1e12)
  config = tiny_config(**TINY)
  lines = list(benchmark_depth.depth_cost(config, [(0, 2), (3, 2)], benchmark.Effort(1, 2)))
  assert [(line['mode'], line.get('n')) for line in lines] == [('machine', None), ('depth', 0), ('depth', 3)]
  first, last = (line['sent_bytes'] for line in lines[1:])
  assert first['gather_once'] == last['gather_once'] > 0
  assert 0 < first['gather_per_iteration'] < last['gather_per_iteration']
  counted = cost.count(build(config.model, config.depth), T)
  for line in lines[1:]:
    assert line['sent_devices'] == jax.device_count() and line['measured_temporary_bytes'] >= 0
    n = line['n']
    flops = counted.computed(n, 2, config.loss_chunks)
    by_flops = B * T * flops / 1e12  # best_matmul is 1e12, too
    assert line['predicted_seconds'] >= by_flops * (1 - 1e-6)
  assert lines[1]['predicted_seconds'] < lines[2]['predicted_seconds']
  json.dumps(lines)
  with pytest.raises(BadInput, match='batch_size=6: not a multiple of the 8 devices'):
    next(benchmark_depth.depth_cost(tiny_config(**TINY, **{'train.batch_size': 6}), [(0, 2)], benchmark.Effort(1, 1)))


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_the_memory_of_a_call_is_what_it_holds_at_once():
  mib = 2**20
  hold = lambda count: np.ones(count * mib, np.uint8).sum()
  assert 60 * mib < benchmark_depth.raised_bytes(lambda: hold(64)) < 90 * mib
  assert 60 * mib < benchmark_depth.raised_bytes(lambda: hold(32) + hold(64)) < 90 * mib
  assert benchmark_depth.raised_bytes(lambda: hold(1)) < 30 * mib


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
  rng = np.random.default_rng(0)
  assert benchmark_trust.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
  assert benchmark_trust.interval([float(i) for i in range(10)]) == (1.0, 8.0), 'the ranks of a table of the sign test'
  draws = np.exp(rng.standard_normal((2000, 25)))  # of median 1
  found = [benchmark_trust.interval(list(row)) for row in draws]
  assert 0.945 < np.mean([low <= 1 <= high for low, high in found]) < 0.975


def test_the_twin_is_asked_for_the_sizes_of_the_config(twin):
  config = tiny_config(**{'model.num_core_layers': 3})
  asked = twin.measure(config, 'train', {'n': 8, 'k': 4}, on_gpu=True, extra=('--batch', '5'))['asked']
  model = config.model
  given = dict(zip(asked[1::2], asked[2::2], strict=False))
  assert asked[0] == 'train' and given['--depths'] == '8,4' and asked[-1] == '--compile'
  assert asked[asked.index('--layers') :][:4] == ['--layers', '1', '3', '1']
  text = ' '.join(asked)
  for part in (f'--width {model.width}', f'--heads {model.num_heads}', f'--mlp {model.mlp_dim}', '--batch 5',
               f'--vocab {model.vocab_size}', '--threads 1', '--dtype f32', '--device cuda'):  # fmt: skip
    assert part in text, part


def test_a_twin_that_fails_or_computes_something_else_is_bad_input(twin):
  measure = lambda twin, config: twin.measure(config, 'train', {'n': 0, 'k': 1}, on_gpu=False, extra=())
  with pytest.raises(BadInput, match='config.model.injection'):
    measure(twin, tiny_config(**{'model.injection': 'add'}))
  twin.path.write_text('raise SystemExit("no torch here")')
  with pytest.raises(BadInput, match='no torch here'):
    measure(twin, tiny_config())
  twin.path.write_text('print("hello")')
  with pytest.raises(BadInput, match='hello'):
    measure(twin, tiny_config())
  with pytest.raises(BadInput, match='--twin=.*nowhere'):
    dataclasses.replace(twin, path=twin.path.with_name('nowhere'))


@pytest.mark.parametrize(
  'verb, text', [('train', '4'), ('train', '4,0'), ('train', '-1,4'), ('train', '1,2,3'), ('decode', '8,4'),
                 ('decode', '0'), ('decode', 'x'), ('decode', '')]
)  # fmt: skip
def test_depths_that_the_verb_cannot_run_are_bad_input(verb, text):
  with pytest.raises(BadInput, match=f'--depths={text}: not a depth to {verb}'):
    bench.depths_of(verb, ['8,4' if verb == 'train' else '8', text])


def test_depths_are_read():
  assert bench.depths_of('train', ['0,4', '28,4']) == [(0, 4), (28, 4)]
  assert bench.depths_of('decode', ['4', '32']) == [4, 32]


@pytest.mark.parametrize('make', [lambda: benchmark.Effort(0, 1), lambda: benchmark.Prompts(4, 0, 1)])
def test_counts_below_one_are_bad_input(make):
  with pytest.raises(BadInput, match='=0 is below 1'):
    make()


def test_whoever_sets_one_thread_gets_one_thread(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(8)))
  for nproc, flags, asked, want in [
    ('', '', None, 8),
    ('', '', 2, 2),
    ('3', '', None, 3),
    ('', f'--a {xla_flags.ONE_THREAD} --b', None, 1),
    ('', '', 99, 8),
  ]:
    monkeypatch.setenv('NPROC', nproc)
    monkeypatch.setenv('XLA_FLAGS', flags)
    assert xla_flags.use_threads(asked) == want
    assert os.environ['NPROC'] == str(want) and os.environ['XLA_FLAGS'] == flags
  with pytest.raises(BadInput, match='--threads=0'):
    xla_flags.use_threads(0)


@pytest.mark.parametrize(
  'installed,devices,vendors,given,want',
  [
    (True, [], ['0x8086'], None, 'cpu'),
    (True, [], ['0x8086', '0x1ae0'], None, None),
    (True, ['nvidia0'], ['0x8086'], None, None),
    (True, [], [], None, None),
    (False, [], ['0x8086'], None, None),
    (True, [], ['0x8086'], 'tpu', 'tpu'),
  ],
  ids=['planner', 'tpu', 'gpu', 'not to be seen', 'plain', 'told'],
)
def test_without_tpus_the_planner_s_compiler_is_left_alone(
  installed, devices, vendors, given, want, tmp_path, monkeypatch
):
  for i, vendor in enumerate(vendors):
    (tmp_path / 'sys/bus/pci/devices' / str(i)).mkdir(parents=True)
    (tmp_path / 'sys/bus/pci/devices' / str(i) / 'vendor').write_text(f'{vendor}\n')
  (tmp_path / 'dev').mkdir()
  for device in devices:
    (tmp_path / 'dev' / device).touch()
  monkeypatch.setattr(xla_flags, 'Path', lambda path: tmp_path / path.lstrip('/'))
  monkeypatch.setattr(xla_flags.importlib.util, 'find_spec', lambda name: installed or None)
  monkeypatch.delenv('JAX_PLATFORMS')
  if given:
    monkeypatch.setenv('JAX_PLATFORMS', given)
  xla_flags.forget_absent_tpus()
  assert os.environ.get('JAX_PLATFORMS') == want


def test_random_rows_are_whole_documents():
  batch = benchmark.random_batch(tiny_config())
  assert batch.tokens_BT.shape == (B, T) and np.all(batch.segment_ids_BT == 1) and np.all(batch.weights_BT == 1)
  np.testing.assert_array_equal(batch.targets_BT[:, :-1], batch.tokens_BT[:, 1:])
