"""An export in `transformers`, by its own modelling file: the numbers of our engine and of the reference."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_loop.config import Config, DataConfig, TrainConfig
from latent_loop.inference.engine import Engine, ExitRule, Request
from latent_loop.interop import huggingface, to_hf
from latent_loop.model.layers import Rows
from latent_loop.tokenizer import Bytes
from tests.test_huggingface import GOLDEN, assert_same
from tests.tiny import mesh_of, random_params, tiny_config, tiny_model

pytestmark = pytest.mark.slow
_INSTALL = 'pip install -r launch/requirements/interop.txt'
torch = pytest.importorskip('torch', reason=f'the export is not run: {_INSTALL}')
transformers = pytest.importorskip('transformers', reason=f'the export is not run: {_INSTALL}')

SIZES = {'model.vocab_size': 264, 'model.num_core_layers': 2, 'model.num_coda_layers': 3}
PROMPTS = ((7, 99, 31), (250, 4, 4, 18, 66, 120, 3), (42, 8, 15, 16, 23))
DEPTH, NEW = 9, 6


def load(folder, monkeypatch, home):
  monkeypatch.setattr(transformers.dynamic_module_utils, 'HF_MODULES_CACHE', str(home))
  monkeypatch.syspath_prepend(str(home))
  return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  """(our model, its parameters, the same in PyTorch, the folder between them)."""
  tmp = tmp_path_factory.mktemp('transformers')
  config, model = tiny_config(**SIZES), tiny_model(**SIZES)
  params = random_params(model)
  to_hf.write_folder(tmp / 'hf', to_hf.texts_of(config), params, config, 60_000)
  torch.set_num_threads(1)
  with pytest.MonkeyPatch.context() as patch:
    yield model, params, load(tmp / 'hf', patch, tmp / 'code'), tmp / 'hf'


def left_padded(prompts):
  width = max(map(len, prompts))
  ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
  mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
  return ids, mask


def generate(theirs, prompts, **options):
  """(new tokens of each row, iterations [rows][tokens])."""
  ids, mask = left_padded(prompts)
  depths = []
  hook = theirs.register_forward_hook(lambda module, given, out: depths.append(out.depths.tolist()))
  asked = {'max_new_tokens': NEW, 'do_sample': False, 'init_scale': 0.0, 'eos_token_id': None, 'pad_token_id': 0}
  made = theirs.generate(ids, attention_mask=mask, **{**asked, **options})
  hook.remove()
  return made[:, ids.shape[1] :].tolist(), np.array(depths).T.tolist()


@pytest.mark.parametrize('depth', [1, 5])
def test_logits_are_those_of_our_model(pair, depth):
  model, params, theirs, _ = pair
  tokens_BT = np.arange(22).reshape(2, 11) * 23 % 264

  @jax.jit
  def ours(params):
    rows = Rows(jnp.tile(jnp.arange(11), (2, 1)), None)
    s_BTD = jnp.zeros((2, 11, model.cfg.width))
    s_BTD = model.advance(params, s_BTD, model.embed_input(params, tokens_BT, rows), rows, depth)
    return model.scores(params, model.apply_coda(params, s_BTD, rows))

  with torch.no_grad():
    logits = theirs(torch.tensor(tokens_BT), num_steps=depth, init_scale=0.0).logits
  assert np.std(logits.numpy()) > 0.1
  np.testing.assert_allclose(logits.numpy(), ours(params), atol=2e-5)


def test_tokens_and_depths_are_those_of_our_engine(pair):
  """Prompts of three lengths, padded on the left there and not at all here, by five exit rules in one batch."""
  model, params, theirs, _ = pair
  rules = ('none', 'kl:3e-2', 'latent-diff:0.2', 'entropy-diff:2e-2', 'argmax-stability:2')
  asked = [
    Request(prompt, DEPTH, NEW, exit=ExitRule.parse(rule), state_scale=0.0) for rule in rules for prompt in PROMPTS
  ]
  answers = Engine(model, params, mesh_of()).answer(asked)
  thought = set()
  for i, rule in enumerate(rules):
    kind, _, threshold = rule.partition(':')
    exits = {'exit_criterion': kind, 'exit_threshold': float(threshold) if threshold else None}
    tokens, depths = generate(theirs, PROMPTS, num_steps=DEPTH, **exits)
    ours = answers[3 * i : 3 * i + 3]
    assert tokens == [answer.tokens for answer in ours], rule
    assert depths == [answer.depths for answer in ours], rule
    thought |= {depth for row in depths for depth in row}
  assert len(thought) > 2  # rules did differ


@pytest.mark.parametrize('exit_criterion', ['none', 'latent-diff'])
def test_a_padded_row_is_what_it_is_alone(pair, exit_criterion):
  options = {'num_steps': DEPTH, 'exit_criterion': exit_criterion, 'exit_threshold': 0.2}
  together = generate(pair[2], PROMPTS, **options)[0]
  assert together == [generate(pair[2], (prompt,), **options)[0][0] for prompt in PROMPTS]


def test_a_cache_serves_no_deeper_thought_than_it_was_begun_with(pair):
  ids = torch.tensor([PROMPTS[0]])
  with torch.no_grad():
    cache = pair[2](ids, num_steps=3, use_cache=True).cache
    pair[2](ids[:, :1], num_steps=2, cache=cache)
    with pytest.raises(ValueError, match='num_steps=4'):
      pair[2](ids[:, :1], num_steps=4, cache=cache)


def test_labels_are_shifted_inside(pair):
  ids = torch.tensor([PROMPTS[1]])
  with torch.no_grad():
    out = pair[2](ids, labels=ids, num_steps=2, init_scale=0.0)
  expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
  torch.testing.assert_close(out.loss, expected)


def test_what_transformers_saves_comes_back_bit_equal(pair, tmp_path):
  model, params, theirs, _ = pair
  theirs.save_pretrained(tmp_path)
  cfg, depth = huggingface.read_config(tmp_path)
  assert (cfg.num_prelude_layers, cfg.num_core_layers, cfg.num_coda_layers, depth.mean) == (1, 2, 3, 6)
  assert_same(huggingface.read_params(tmp_path, cfg), params)


def test_its_tokenizer_reads_bytes(pair):
  tokenizer, text = transformers.AutoTokenizer.from_pretrained(pair[3]), 'de\u00e9p \n\tloop'
  ours = Bytes()
  assert tokenizer(text)['input_ids'] == [ours.bos, *ours.encode([text])[0].tolist()], 'as a prompt of our engine'
  assert tokenizer.decode(tokenizer(text)['input_ids'], skip_special_tokens=True) == text
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)


def test_the_reference_continues_alike(tmp_path, monkeypatch):
  """The golden lists of the reference itself, with a cache and without."""
  model, depth = huggingface.read_config(GOLDEN)
  config = Config(model=model, depth=depth, data=DataConfig(seq_len=128), train=TrainConfig(loss_chunk=128))
  to_hf.write_folder(tmp_path / 'hf', to_hf.texts_of(config), huggingface.read_params(GOLDEN, model), config, 10**9)
  theirs = load(tmp_path / 'hf', monkeypatch, tmp_path / 'code')
  golden = json.loads(open(f'{GOLDEN}/generation.json').read())
  for name, tokens in golden.items():
    if name.endswith('/full'):
      options = {'num_steps': int(name.split('/')[1][1:]), 'max_new_tokens': len(tokens) - 10}
      for use_cache in (True, False):
        assert generate(theirs, (tokens[:10],), use_cache=use_cache, **options)[0][0] == tokens[10:], name
