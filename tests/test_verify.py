import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latent_loop.config import DepthConfig, ModelConfig
from latent_loop.errors import BadInput
from latent_loop.interop import generation, huggingface
from latent_loop.interop.verify import SHARES, TOLERANCES, verify
from latent_loop.model import build
from latent_loop.model.layers import Rows

HUGINN_TINY = Path('tests/golden/huginn_tiny')
CFG = ModelConfig(
  vocab_size=40, width=24, num_heads=3, mlp_dim=20, num_prelude_layers=1, num_core_layers=1, num_coda_layers=0
)
DEPTH = DepthConfig(mean=3, backprop_depth=1)
FORWARD, GRADS, OPTIMIZER = 'forward.safetensors', 'grads.safetensors', 'optimizer.safetensors'


def unrolled(params, s_BTD, tokens, n, k):
  """What the golden files hold, with a Python loop over depth and a whole [tokens, vocabulary] loss."""
  model, (B, T) = build(CFG, DEPTH), tokens[:, 1:].shape
  rows = Rows(jnp.tile(jnp.arange(T), (B, 1)), None)
  e_BTD = model.embed_input(params, tokens[:, :-1], rows)
  states = [s_BTD]
  for i in range(n + k):
    used = (params, states[-1], e_BTD, rows)
    states.append(model.apply_core(*used) if i >= n else jax.lax.stop_gradient(model.apply_core(*used)))
  logits_BTV = model.scores(params, model.apply_coda(params, states[-1], rows))
  nll_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens[:, 1:, None], axis=-1)[..., 0]
  return jnp.mean(nll_BT), (e_BTD, states, logits_BTV)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  """A golden folder of another shape: other layer counts, a prime length, k above the config's, gaps in the depths."""
  folder, rng = tmp_path_factory.mktemp('small'), np.random.default_rng(0)
  shapes = jax.eval_shape(build(CFG, DEPTH).init, jax.random.key(0))
  params = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
  tokens, s_BTD = rng.integers(0, 40, (2, 6)).astype(np.int32), rng.normal(size=(2, 5, 24)).astype(np.float32)
  n, k = 1, 2
  run = jax.jit(jax.value_and_grad(lambda p, s, t: unrolled(p, s, t, n, k), has_aux=True))
  (loss, (e_BTD, states, logits_BTV)), grads = run(params, s_BTD, tokens)
  model = build(CFG, DEPTH)
  forward = {
    'tokens': tokens,
    'init_state': s_BTD,
    'prelude_out': e_BTD,
    'state_1': states[1],
    'state_2': states[2],
    'normed_state_r3': model.leave_core(params, states[3]),
    'logits_r3': logits_BTV,
  }
  gradients = {'loss': loss, **huggingface.to_hf(grads, CFG)}
  save_file(huggingface.to_hf(params, CFG), folder / 'model.safetensors')
  save_file({name: np.asarray(x) for name, x in forward.items()}, folder / FORWARD)
  save_file({f'n{n}_k{k}/{name}': np.asarray(x) for name, x in gradients.items()}, folder / GRADS)
  (folder / 'config.json').write_text(json.dumps(huggingface.config_to_hf(CFG, DEPTH, block_size=8)))
  return folder


@pytest.fixture
def copy(small, tmp_path):
  """copy(FILE, ...): a new folder with these files of `small`, or of huginn_tiny for the optimizer."""

  def make(*names):
    for name in ('config.json', 'model.safetensors', *names):
      shutil.copy((HUGINN_TINY if name.startswith('optimizer') else small) / name, tmp_path / name)
    return tmp_path

  return make


def edit(path, name, change):
  """Writes `path` again with tensor `name` changed; a change to None removes it."""
  tensors = load_file(path)
  tensors[name] = change(tensors[name]) if name in tensors else change(None)
  save_file({key: x for key, x in tensors.items() if x is not None}, path)


def remove(x):
  return None


def nudge(x):
  x = x.copy()
  x[(0,) * x.ndim] += 1e-3
  return x


def reference_folder(folder, without):
  """huginn_tiny but for one of its files."""
  for path in HUGINN_TINY.iterdir():
    if path.name != without:
      (folder / path.name).symlink_to(path.resolve())
  return folder


def test_reference_numbers_are_met(tmp_path):
  result = verify(reference_folder(tmp_path, without='generation.json'))
  assert result.pop('ok') is True
  assert result.keys() == TOLERANCES.keys()
  for name, error in result.items():
    assert 0 < error <= TOLERANCES[name], name


@pytest.mark.slow
def test_the_token_lists_of_the_reference_are_met(tmp_path):
  """Some of each kind; launch.verify compares all of them."""
  golden = json.loads((HUGINN_TINY / 'generation.json').read_text())
  names = ['greedy/r4/full', 'greedy/r8/full', 'greedy/r4/compress-s8', 'greedy/r8/compress-s8', 'continuous/r4']
  names += [name for name in golden if name.startswith('adaptive')]
  folder = reference_folder(tmp_path, without='generation.json')
  (folder / 'grads.safetensors').unlink()
  part = {name: golden[name] for name in names}
  (folder / 'generation.json').write_text(json.dumps(part))
  result = verify(folder)
  assert result['ok'] is True and SHARES.keys() < result.keys(), result
  part['greedy/r4/full'][20] ^= 1
  (folder / 'generation.json').write_text(json.dumps({name: part[name] for name in names[:2]}))
  result = verify(folder)
  assert result['ok'] is False and result['greedy_match'] == 0.5


@pytest.mark.parametrize(
  'name,value,word',
  [
    ('greedy/r4', [1] * 11, 'is not a run that the reference makes'),
    ('greedy/r4/full', [1] * 10, 'is not a run that the reference makes'),
    ('greedy/r4/full', ['a'], 'is not a list of whole numbers'),
    ('greedy/r4/compress-s6', [1] * 11, 'no multiple of 4 core layers'),
    ('adaptive_prefill/kl/0.01', {'steps': []}, 'has 0 steps'),
    ('adaptive_prefill/klx/0.01', {'steps': [1]}, 'no such criterion'),
    ('beam/r4', [1] * 11, 'unknown run'),
  ],
)
def test_token_lists_that_no_run_makes_are_refused(tmp_path, name, value, word):
  (tmp_path / 'generation.json').write_text(json.dumps({name: value}))
  cfg, depth = huggingface.read_config(HUGINN_TINY)
  with pytest.raises(BadInput, match=word):
    generation.matches(tmp_path / 'generation.json', build(cfg, depth), {}, np.arange(20))


def test_other_shapes_are_met(small):
  result = verify(small)
  assert result.keys() == {'logits_max_abs_err', 'states_max_abs_err', 'grads_max_rel_err', 'ok'}
  assert result['ok'] is True, result


@pytest.mark.parametrize(
  'file, name, part',
  [
    (FORWARD, 'logits_r3', 'logits'),
    (FORWARD, 'state_2', 'states'),
    (FORWARD, 'normed_state_r3', 'states'),
    (FORWARD, 'prelude_out', 'states'),
    (OPTIMIZER, 'p1_8', 'optimizer'),
    (OPTIMIZER, 'p0_3', 'optimizer'),
  ],
)
def test_a_wrong_number_fails_its_part_only(copy, file, name, part):
  folder = copy(file, 'optimizer.json') if file == OPTIMIZER else copy(file)
  edit(folder / file, name, nudge)
  result = verify(folder)
  assert result['ok'] is False
  assert [key for key in TOLERANCES if key in result and result[key] > TOLERANCES[key]] == [f'{part}_max_abs_err']


def test_wrong_gradients_and_losses_fail(copy):
  folder = copy(FORWARD, GRADS)
  edit(folder / GRADS, 'n1_k2/transformer.core_block.0.attn.qk_bias', lambda x: x[::-1].copy())
  result = verify(folder)
  assert result['ok'] is False
  assert result['grads_max_rel_err'] > 0.1
  assert result['states_max_abs_err'] < TOLERANCES['states_max_abs_err']


def test_numbers_that_are_not_finite_fail_as_json(copy):
  folder = copy(FORWARD)
  edit(folder / FORWARD, 'logits_r3', lambda x: x * np.float32('nan'))
  result = verify(folder)
  assert result['ok'] is False
  assert json.loads(json.dumps(result, allow_nan=False))['logits_max_abs_err'] > 1e300


@pytest.mark.parametrize(
  'file, name, change, word',
  [
    (FORWARD, 'tokens', remove, 'missing'),
    (FORWARD, 'init_state', remove, 'missing'),
    (FORWARD, 'prelude_out', remove, 'missing'),
    (FORWARD, 'logits_r3', remove, 'logits_r'),
    (FORWARD, 'state_03', lambda x: np.zeros((2, 5, 24), np.float32), 'unknown'),
    (FORWARD, 'init_state', lambda x: x[:, :-1].copy(), '(2, 4, 24)'),
    (FORWARD, 'tokens', lambda x: x + 1000, 'vocabulary'),
    (FORWARD, 'tokens', lambda x: x.astype(np.float32), 'F32'),
    (GRADS, 'n1_k2/loss', remove, 'missing'),
    (GRADS, 'n1_k2/transformer.prelude.0.norm_4.weight', remove, 'missing'),
    (GRADS, 'n1_k2/transformer.prelude.7.norm_4.weight', lambda x: np.zeros(24, np.float32), 'unknown'),
    (OPTIMIZER, 'p0_4', remove, 'missing'),
    (OPTIMIZER, 'lr', remove, 'missing'),
    (OPTIMIZER, 'g2_1', lambda x: np.zeros(6, np.float32), 'unknown'),
  ],
)
def test_incomplete_parts_are_refused(copy, monkeypatch, file, name, change, word):
  folder = copy(file, 'optimizer.json') if file == OPTIMIZER else copy(FORWARD, file)
  edit(folder / file, name, change)
  if file == GRADS:  # its own names are checked before anything of it is computed
    monkeypatch.setattr('latent_loop.interop.verify._forward_errors', lambda path, inputs: {})
  with pytest.raises(BadInput) as caught:
    verify(folder)
  assert file in str(caught.value) and word in str(caught.value)


@pytest.mark.parametrize(
  'text, word',
  [
    ('{"init_lr": 0.004,', 'JSON'),
    ('{}', 'flags'),
    ('{"flags": "nesterov", "init_lr": 0.004, "weight_decay": [0.004, 0.0], "betas": [0.9, 0.95]}', 'nesterov'),
    ('{"flags": F, "weight_decay": [0.004, 0.0], "betas": [0.9, 0.95]}', 'init_lr'),
    ('{"flags": F, "init_lr": 0, "weight_decay": [0.004, 0.0], "betas": [0.9, 0.95]}', 'learning_rate=0.0'),
    ('{"flags": F, "init_lr": 0.004, "weight_decay": [0.004, "0"], "betas": [0.9, 0.95]}', 'weight_decay[1]'),
    ('{"flags": F, "init_lr": 0.004, "weight_decay": [0.004, 0.0], "betas": [0.9]}', 'betas'),
  ],
)
def test_wrong_optimizer_settings_are_refused(copy, text, word):
  folder = copy(OPTIMIZER)
  flags = '"update_clipping, atan_adam, running_init, decouple_wd"'
  (folder / 'optimizer.json').write_text(text.replace('F', flags, 1) if '"flags": F' in text else text)
  with pytest.raises(BadInput) as caught:
    verify(folder)
  assert 'optimizer.json' in str(caught.value) and word in str(caught.value)


def test_absent_files_are_left_out_but_not_all(copy, tmp_path):
  result = verify(copy(OPTIMIZER, 'optimizer.json'))
  assert result.keys() == {'optimizer_max_abs_err', 'ok'} and result['ok'] is True
  (tmp_path / OPTIMIZER).unlink()
  with pytest.raises(BadInput, match=OPTIMIZER):
    verify(tmp_path)
  (tmp_path / 'optimizer.json').unlink()
  for folder in (tmp_path, tmp_path / 'nowhere'):
    with pytest.raises(BadInput, match='none of'):
      verify(folder)
  with pytest.raises(BadInput, match=FORWARD):  # gradients of what?
    verify(copy(GRADS))


@pytest.mark.slow
def test_the_program_prints_one_line_and_says_all_in_its_exit_code(copy, tmp_path):
  good, bad, lacking = copy(OPTIMIZER, 'optimizer.json'), tmp_path / 'bad', tmp_path / 'lacking'
  shutil.copytree(good, bad)
  edit(bad / OPTIMIZER, 'p0_1', nudge)
  shutil.copytree(good, lacking)
  edit(lacking / OPTIMIZER, 'p0_1', remove)
  command = [sys.executable, '-m', 'launch.verify']
  flags = [[f'--golden={good}'], [f'--golden={bad}'], [f'--golden={tmp_path}/nowhere'], [], [f'--golden={lacking}']]
  runs = [subprocess.Popen(command + f, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for f in flags]
  outputs = [run.communicate() for run in runs]
  assert [run.returncode for run in runs] == [0, 1, 2, 2, 2]
  for (out, _), ok in zip(outputs[:2], (True, False), strict=True):
    assert len(out.splitlines()) == 1 and json.loads(out)['ok'] is ok
  for (out, error), word in zip(outputs[2:], ('nowhere', '--golden is missing', "'p0_1' is missing"), strict=True):
    assert out == '' and word in error.splitlines()[-1]
