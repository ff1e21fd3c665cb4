"""The planner: HLO read right, sentences for hardware that is not known, the real step compiled for a real TPU."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from latent_loop import planner
from latent_loop.config import MeshConfig
from latent_loop.errors import BadInput
from latent_loop.model import build, cost
from latent_loop.parallel import mesh as meshes
from latent_loop.planner import gpus, hlo, topology
from latent_loop.planner.plan import Memory, _out_of_memory
from latent_loop.planner.roofline import Roofline
from tests.reading_path import ROOT
from tests.tiny import B, T, V, mesh_of, tiny_config

KEYS = {
  'parameters', 'fits', 'hbm_bytes_per_device', 'hbm_capacity_bytes', 'devices', 'chips', 'mesh', 'global_batch',
  'microbatches', 'weight_collectives_in_depth_loops', 'weight_collectives_elsewhere', 'collective_bytes_per_step',
  'compile_seconds', 'step_seconds', 'mfu_ceiling', 'tokens_per_second',
}  # fmt: skip
HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None

HLO = """HloModule tiny

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %ag = f32[64]{0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[8]) tuple(%i, %x)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%free (p: (s32[], s32[], f32[8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0}) while(%init), condition=%cond, body=%body, metadata={op_name="jit(f)/depth_loop/while"}
  %v = (s32[], f32[8]{0}) while(%init), condition=%free, body=%body, metadata={op_name="jit(f)/while"}
  %rs = bf16[16]{0} reduce-scatter(%b), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, to_apply=%add
  %one = f32[4]{0} all-reduce(%c), replica_groups={{0},{1}}, to_apply=%add
  ROOT %ar = (f32[3]{0}, bf16[2]{0}) all-reduce-start(%d, %e), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
"""


def test_collectives_are_read_with_kind_size_axes_and_loops():
  first, second, scatter, reduce = hlo.collectives(HLO, mesh_of(2, 4))
  assert (first.kind, first.size_bytes, first.sent_bytes, first.axes) == ('all-gather', 256, 192, ('fsdp',))
  assert first.inside('depth_loop') and not second.inside('depth_loop')
  assert first.bytes_per_step(7) == 5 * 192 and second.bytes_per_step(7) == 7 * 192
  assert (scatter.kind, scatter.size_bytes, scatter.axes) == ('reduce-scatter', 64, ('data',))
  assert (reduce.kind, reduce.size_bytes, reduce.axes) == ('all-reduce', 16, ('data', 'fsdp'))
  assert reduce.sent_bytes == 2 * 16 * 7 // 8


@pytest.mark.parametrize(
  'pairs, sent, axes',
  [
    ('{0,1},{1,0},{2,3},{3,2}', 32, ('fsdp',)),
    ('{0,0},{1,4},{4,1}', 32, ('data', 'fsdp')),
    ('{0,0},{1,2},{2,6}', 32, ('data', 'fsdp')),
    ('{0,0},{1,1}', None, None),
  ],
)
def test_a_permute_sends_all_it_holds_over_the_axes_of_all_its_pairs(pairs, sent, axes):
  for op, type_ in ('collective-permute', 'f32[8]{0}'), ('collective-permute-start', '(f32[8]{0}, f32[8]{0})'):
    line = f'  ROOT %p = {type_} {op}(%a), channel_id=1, source_target_pairs={{{pairs}}}'
    found = hlo.collectives(f'ENTRY %main (a: f32[8]) -> f32[8] {{\n{line}\n}}\n', mesh_of(2, 4))
    assert [(c.size_bytes, c.sent_bytes, c.axes) for c in found] == ([(32, sent, axes)] if sent else [])


@pytest.mark.parametrize(
  'name, says',
  [
    ('v5p', 'unknown'),
    ('v9:2x2', 'unknown'),
    ('h100:x', 'unknown'),
    ('cpu:0', '^--topology=cpu:0: .* a number from 1'),
    ('v5e:2x0', '^--topology=v5e:2x0: .* a number from 1'),
    ('cpu:9', 'shows 8 CPU device.*set XLA_FLAGS=--xla_force_host_platform_device_count=9$'),
  ],
)
def test_unknown_hardware_is_a_sentence(name, says):
  with pytest.raises(BadInput, match=says):
    topology.find(name, 1)
  with pytest.raises(BadInput, match='--slices=0: .* give a number from 1'):
    topology.find('h100:8', 0)


def test_an_absent_tpu_compiler_is_a_sentence_that_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(BadInput, match='libtpu, is not installed here; pip install -r launch/requirements/tpu.txt'):
    topology.find('v5e:2x2', 1)


def test_a_gpu_is_counted_without_a_compiler_and_a_step_is_linear_in_depth():
  config = tiny_config()
  found = topology.find('h200:4', 2)
  assert (found.num_chips, found.num_devices) == (8, 8)
  counted = cost.count(build(config.model, config.depth), T)
  at = Roofline(config, counted, found, [], 1).at
  assert at(9, 3).matmul - at(5, 3).matmul == pytest.approx(4 * (counted.core - counted.drive) * B * T / 8 / 989e12)
  assert 0 < at(5, 3).mfu < 1


def test_chips_that_are_two_devices_are_planned_as_two_and_counted_without_a_compiler():
  made = planner.plan(tiny_config(), 'mi250x:2', 2, None, print)
  numbers = planner.summary(made)
  assert KEYS <= numbers.keys() and numbers['fits'] is None and numbers['weight_collectives_elsewhere'] is None
  assert numbers['compile_seconds'] is None
  assert (numbers['chips'], numbers['devices'], numbers['mesh']['data']) == (4, 8, 4)
  assert numbers['hbm_capacity_bytes'] == int(64 * 2**30 * gpus.memory_share()), 'half a chip each'
  at = made.roofline().at(5, 3)
  assert at.peak == 383e12 / 2 and at.model_flops_per_device * 8 == pytest.approx(
    (made.cost.train(5, 3) - made.cost.spared(5, 3)) * B * T
  )
  text = planner.describe(made, numbers)
  assert 'mi250x:2: 4 chips, 8 devices' in text and '--config.mesh.dcn=2 --config.mesh.data=4 ' in text


@pytest.mark.parametrize('remat', ['none', 'block'])
def test_gathering_per_iteration_is_planned_with_what_it_computes_again(remat):
  found, times = topology.find('h200:8', 1), {}
  for weights in ('gather_once', 'gather_per_iteration'):
    config = tiny_config(**{'mesh.weights': weights, 'model.remat': remat})
    counted = cost.count(build(config.model, config.depth), T)
    times[weights] = Roofline(config, counted, found, [], 1).at(5, 3).matmul
  more = 3 * (counted.core - counted.drive - (counted.core_last_block if remat == 'block' else 0))
  assert times['gather_per_iteration'] - times['gather_once'] == pytest.approx(more * B * T / 8 / 989e12)


@pytest.mark.parametrize(
  'name, mesh, kind, axes, speed',
  [
    ('h200:8', {'fsdp': 8}, 'all-gather', ('fsdp',), 450e9),
    ('h200:64', {'data': 8, 'fsdp': 8}, 'all-gather', ('fsdp',), 450e9),
    ('h200:64', {'data': 8, 'fsdp': 8}, 'all-reduce', ('data',), 50e9),
    ('h200:64', {'data': 4, 'fsdp': 16}, 'reduce-scatter', ('fsdp',), 400e9),
    ('h200:64', {'data': 4, 'fsdp': 16}, 'collective-permute', ('fsdp',), 50e9),
    ('h200:64', {'data': 2, 'fsdp': 8, 'tensor': 4}, 'all-gather', ('fsdp',), 100e9),
    ('a100:16', {'fsdp': 16}, 'all-gather', ('fsdp',), 200e9),
    ('mi250x:8', {'fsdp': 16}, 'all-gather', ('fsdp',), 100e9),
  ],
)
def test_between_hosts_of_gpus_a_ring_is_as_fast_as_the_network_cards_of_its_members(name, mesh, kind, axes, speed):
  config = tiny_config(**{f'mesh.{axis}': size for axis, size in {'data': 1, **mesh}.items()})
  counted = cost.count(build(config.model, config.depth), T)
  roofline = Roofline(config, counted, topology.find(name, 1), [hlo.Collective(kind, 9, 7, axes, (), '')], 1)
  assert roofline.at(5, 3).communication == pytest.approx(7 / speed)


@pytest.mark.parametrize(
  'environment, capacity, says',
  [
    ({}, 105.75, '75% of the device; XLA_CLIENT_MEM_FRACTION=0.92 in the environment makes it more)'),
    ({'XLA_PYTHON_CLIENT_MEM_FRACTION': '.5'}, 70.5, '50% of the device; XLA_CLIENT_MEM_FRACTION=0.92'),
    ({'XLA_CLIENT_MEM_FRACTION': '.92'}, 129.72, '92% of the device)'),
  ],
)
def test_a_plan_fits_in_the_part_of_a_gpu_that_jax_gives_a_process(environment, capacity, says, monkeypatch):
  for name in ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  made = planner.plan(tiny_config(), 'mi250x:4', 1, None, print)
  found, memory = topology.find('h200:8', 1), Memory(1, 1, 1, 106 * 2**30)
  made = dataclasses.replace(made, topology=found, memory=memory, collectives=[], hlo_text='')
  numbers = planner.summary(made)
  assert numbers['hbm_capacity_bytes'] == pytest.approx(capacity * 2**30, abs=1)
  assert made.fits is (capacity > 106)
  assert f'106.00 of {capacity:.2f} GiB per device' in (text := planner.describe(made, numbers)) and says in text


def test_a_share_of_a_gpu_that_is_none_is_a_sentence(monkeypatch):
  for value, says in ('92', '=92 in the environment: .* at most 1'), ('most', 'could not convert .*mend or unset XLA_'):
    monkeypatch.setenv('XLA_CLIENT_MEM_FRACTION', value)
    with pytest.raises(BadInput, match=says):
      topology.find('h200:8', 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  'flags, says',
  [
    (['--topology=cpu:65'], 'this machine shows 64 CPU device'),
    (['--topology=mi250x:8', '--dump_hlo=x'], '--dump_hlo=x: nothing here compiles for mi250x:8'),
  ],
)
def test_what_cannot_be_compiled_is_refused_ahead_of_the_plan(flags, says):
  """The program shows this machine as devices enough for small plans."""
  command = [sys.executable, '-m', 'launch.plan', '--config=experiments/tiny_text.py', *flags]
  result = subprocess.run(
    command, cwd=ROOT, env={**os.environ, 'XLA_FLAGS': ''}, capture_output=True, text=True, timeout=300
  )
  assert result.returncode == 2 and says in result.stderr and not result.stdout, result.stderr


@pytest.mark.slow
def test_the_step_is_planned_on_virtual_devices():
  config = tiny_config(**{'mesh.fsdp': 4, 'mesh.data': -1, 'train.batch_size': 32})
  made = planner.plan(config, 'cpu:8', 1, 64, print)
  numbers = planner.summary(made)
  assert KEYS <= numbers.keys() and numbers['fits'] is True
  assert numbers['mesh'] == {'dcn': 1, 'data': 2, 'fsdp': 4, 'tensor': 1} and numbers['global_batch'] == 64
  assert numbers['weight_collectives_in_depth_loops'] == 0 < numbers['weight_collectives_elsewhere']
  assert numbers['collective_bytes_per_step'] == sum(c.bytes_per_step(0) for c in made.collectives)
  text = planner.describe(made, numbers)
  assert 'fits' in text and '--config.train.batch_size=64 --config.train.num_microbatches=' in text
  assert '--config.mesh.dcn=1 --config.mesh.data=2 --config.mesh.fsdp=4 --config.mesh.tensor=1' in text
  assert re.search(r'faster, where it fits too: --config.model.remat=none, [12]\d% fewer FLOPs per step', text)


def test_where_no_mode_fits_the_plan_is_of_the_one_that_needs_least(monkeypatch):
  needed = {'gather_once': 3, 'gather_per_microbatch': 1, 'gather_per_iteration': 2}
  module = sys.modules['latent_loop.planner.plan']  # the package's `plan` is the function

  def compiled(config, found):
    memory = module.Memory(0, 0, 0, needed[config.mesh.weights] * 10**15)
    return planner.Plan(config, found, {}, None, memory, [], 0.0, '')

  monkeypatch.setattr(module, '_compile', compiled)
  assert planner.plan(tiny_config(), 'cpu:8', 1, None, print).config.mesh.weights == 'gather_per_microbatch'
  needed['gather_once'] = 0
  assert planner.plan(tiny_config(), 'cpu:8', 1, None, print).config.mesh.weights == 'gather_once'


@pytest.mark.slow
def test_what_does_not_fit_is_said_with_the_amount_and_the_remedy(monkeypatch):
  chip = dataclasses.replace(topology._LAPTOP, hbm_bytes=1000)
  monkeypatch.setattr(topology, '_LAPTOP', chip)
  config = tiny_config(**{'mesh.weights': 'gather_per_iteration', 'model.remat': 'none'})
  made = planner.plan(config, 'cpu:8', 1, None, print)
  text = planner.describe(made, planner.summary(made))
  assert made.fits is False and 'does NOT fit' in text and 'GiB too much' in text
  assert 'What helps: --config.model.remat=iteration; --config.mesh.fsdp=8 --config.mesh.data=1;' in text


@pytest.mark.parametrize(
  'text, gib',
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (42.05G) exceeds',
      42.05,
    ),
    ('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm.', 17.5),
    (
      'RESOURCE_EXHAUSTED: E1000: Ran out of memory in memory space hbm. Used 15.75G of 15.75G hbm. Exceeded hbm '
      'capacity by 7.70M.\n\nTotal hbm usage >= 16.01G:\n    reserved        258.12M',
      16.01,
    ),
  ],
)
def test_the_compilers_sentence_about_memory_is_understood(text, gib):
  memory = _out_of_memory(jax.errors.JaxRuntimeError(text))
  assert memory.needed == pytest.approx(gib * 2**30, rel=1e-6)
  refused = planner.Plan(tiny_config(), topology.find('h200:8', 1), {}, None, memory, None, 0.0, None)
  assert refused.fits is False and memory.needed < refused.capacity
  with pytest.raises(jax.errors.JaxRuntimeError):
    _out_of_memory(jax.errors.JaxRuntimeError('INTERNAL: something else'))


@pytest.mark.parametrize('batch, says', [(12, 'does not divide over dcn x data x fsdp')])
def test_a_batch_that_does_not_divide_is_a_sentence(batch, says):
  with pytest.raises(BadInput, match=says):
    planner.plan(tiny_config(), 'h200:8', 1, batch, print)


@pytest.mark.parametrize('axes', [{'dcn': 2}, {'dcn': 4, 'data': 2}, {'dcn': 2, 'fsdp': 2, 'tensor': 2}])
def test_slices_are_the_outermost_axis(axes):
  mesh = meshes.make_mesh(MeshConfig(**{'data': -1, **axes}))
  assert mesh.axis_names[0] == 'dcn' and mesh.shape['dcn'] == axes['dcn']
  ids = np.vectorize(lambda device: device.id)(mesh.devices)
  assert [sorted(part.ravel()) for part in ids] == np.arange(8).reshape(axes['dcn'], -1).tolist()


needs = lambda there, file: pytest.mark.skipif(not there, reason=f'no compiler for it: launch/requirements/{file}')
COMPILERS = [
  pytest.param('v5e:2x2', 'tpu_custom_call', marks=needs(HAS_LIBTPU, 'tpu.txt')),
  pytest.param('h200:4', 'fmha', marks=needs(gpus.HAS_COMPILER, 'cuda.txt (3 GB)')),
]


@pytest.mark.slow
@pytest.mark.parametrize('chips, kernel', COMPILERS)
def test_the_step_compiles_for_real_chips_with_no_weight_collective_in_the_depth_loops(chips, kernel, tmp_path):
  """Rows and heads are both split, and the kernel of the platform is in."""
  flags = {
    'model.width': 256, 'model.num_heads': 2, 'model.mlp_dim': 256, 'model.compute_dtype': 'bfloat16',
    'model.vocab_size': V + 188, 'data.seq_len': 128, 'train.loss_chunk': 128, 'mesh.fsdp': 2,
    'mesh.tensor': 2,
  }  # fmt: skip
  command = [
    sys.executable, '-m', 'launch.plan', '--config=experiments/tiny_task.py', f'--topology={chips}', '--json',
    f'--dump_hlo={tmp_path}/step.hlo', *(f'--config.{key}={value}' for key, value in flags.items()),
  ]  # fmt: skip
  environment = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
  ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
  assert ran.returncode == 0, ran.stderr
  numbers = json.loads(ran.stdout.splitlines()[-1])
  assert numbers['fits'] is True and numbers['devices'] == 4
  assert numbers['weight_collectives_in_depth_loops'] == 0 < numbers['weight_collectives_elsewhere']
  text = (tmp_path / 'step.hlo').read_text()
  assert 'all-gather' in text and kernel in text
