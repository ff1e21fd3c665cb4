"""The latent lens: its numbers are those of the model and of their definitions; its page works in a real browser."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_loop.errors import BadInput
from latent_loop.evals import lens
from latent_loop.inference.decode import start_states
from latent_loop.inference.engine import Request, asks_of
from latent_loop.inference.text import request_of
from latent_loop.model.layers import Rows
from latent_loop.report import lens as page
from latent_loop.tokenizer import Bytes
from latent_loop.tokenizer import utf8 as tokenizer
from tests.browser import headless
from tests.tiny import random_params, tiny_model

PROMPT, R = '</script>\u00e9 <b>', 7
T = 16  # tokens: the first and the bytes of PROMPT
ABOUT = {'name': 'a</script>', 'step': 4, 'mean_depth': 3}


@pytest.fixture(scope='module')
def given():
  """(model, params, request)."""
  model = tiny_model(**{'model.vocab_size': tokenizer.VOCAB_SIZE})
  return model, jax.tree.map(jnp.asarray, random_params(model)), request_of(Bytes(), PROMPT, depth=R, seed=3)


@pytest.fixture(scope='module')
def seen(given):
  return lens.look(*given)


@pytest.fixture(scope='module')
def numbers(given, seen):
  return lens.summarize(seen, given[2], ABOUT)


def test_the_last_row_is_a_plain_forward_pass(given, seen):
  model, params, request = given
  tokens_BT, positions_BT = jnp.array([request.tokens]), jnp.arange(T)[None]
  rows = Rows(positions_BT, None)
  s_BTD = start_states(model, asks_of([request]), positions_BT)

  @jax.jit
  def plain(n):
    y_BTD = model.forward(params, s_BTD, tokens_BT, rows, n, R - 4)
    return jax.nn.softmax(model.scores(params, y_BTD))[0]

  p_TV = np.asarray(plain(4))
  np.testing.assert_allclose(seen.top_p_RTK[-1], np.sort(p_TV)[:, : -lens.TOP - 1 : -1], rtol=1e-4)
  np.testing.assert_array_equal(seen.top_RTK[-1, :, 0], p_TV.argmax(-1))
  np.testing.assert_allclose(seen.next_p_RT[-1, :-1], p_TV[np.arange(T - 1), request.tokens[1:]], rtol=1e-4)


def test_every_number_follows_its_definition(given, seen):
  """From the states alone, in float64: entropy, KL to the row before, distance to the state after 2 R iterations."""
  model, params, request = given
  rows, states = Rows(jnp.broadcast_to(jnp.arange(T), (R + 1, T)), None), jnp.asarray(seen.states_STD)
  read = jax.jit(lambda s: model.scores(params, model.apply_coda(params, s, rows)))
  logits = np.asarray(read(states), np.float64)
  log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
  log_p[0] = -np.log(tokenizer.VOCAB_SIZE)  # what the first is compared with
  p = np.exp(log_p)
  np.testing.assert_allclose(seen.entropy_RT, -np.sum(p * log_p, -1)[1:], rtol=1e-4)
  np.testing.assert_allclose(seen.kl_RT, np.sum(p[:-1] * (log_p[:-1] - log_p[1:]), -1), rtol=1e-2, atol=1e-6)
  twice = lens.look(model, params, Request(request.tokens, 2 * R, seed=3)).states_STD
  np.testing.assert_allclose(twice[: R + 1], seen.states_STD, rtol=1e-4, atol=1e-5)
  want_RT = np.linalg.norm(seen.states_STD[1:] - twice[-1], axis=-1)
  np.testing.assert_allclose(seen.distance_RT, want_RT, rtol=1e-3, atol=1e-5)
  assert seen.distance_RT.min() > 0  # the end of the map is not zero by construction


def test_a_token_changes_nothing_before_itself(given, seen):
  model, params, request = given
  other = lens.look(model, params, Request((*request.tokens[:-1], 7), R, seed=3))
  np.testing.assert_allclose(other.entropy_RT[:, :-1], seen.entropy_RT[:, :-1], rtol=1e-5)
  assert np.abs(other.entropy_RT[:, -1] - seen.entropy_RT[:, -1]).min() > 1e-4


def test_the_exit_is_the_first_step_under_the_threshold():
  kl_RT = np.array([[3.0, 3.0, 0.4, 0.5], [0.1, 3.0, 3.0, 0.5], [0.2, 3.0, np.nan, 0.6]])
  assert lens.exit_steps(kl_RT, 0.5) == [2, None, 1, None]


def test_principal_directions_are_orthonormal_and_explain_what_they_claim():
  rng = np.random.default_rng(0)
  spread_D = np.array([0.1, 5.0, 1.0, 0.5, 3.0])
  states_STD = 7 + rng.standard_normal((8, 9, 5)) * spread_D
  coordinates_STP, directions_PD, shares_P = lens.principal(states_STD, 3)
  np.testing.assert_allclose(directions_PD @ directions_PD.T, np.eye(3), atol=1e-12)
  centered = states_STD - states_STD.mean(axis=(0, 1))
  np.testing.assert_allclose(coordinates_STP, centered @ directions_PD.T, atol=1e-12)
  np.testing.assert_allclose(shares_P, np.square(coordinates_STP).sum((0, 1)) / np.square(centered).sum(), rtol=1e-12)
  assert list(np.abs(directions_PD).argmax(axis=1)) == [1, 4, 2] and shares_P[0] > shares_P[1] > shares_P[2]
  everything_P = lens.principal(states_STD, 6)[2]
  assert len(everything_P) == 5 and np.isclose(everything_P.sum(), 1)


def test_motions_are_told_apart():
  i = np.arange(33.0)[:, None]
  circle = np.hstack([np.cos(i), np.sin(i), 0 * i])
  rest = np.array([[0.0, 0.0, 5.0]])
  paths = {
    'settled': rest + circle * 0.5**i,
    'settling': rest + 9 * circle * 0.9**i,
    'turning': rest + circle,
    'sliding': np.hstack([i, 1 - i, 0 * i + 5]),
    'not finite': circle * np.nan,
  }
  assert {kind: lens.motion(path) for kind, path in paths.items()} == {kind: kind for kind in paths}
  assert lens.motion(circle[:6]) == 'too few steps'


def test_tokens_are_readable():
  text = 'a \n\u20ac\t' + '\u0301'  # the last is a combining accent: nothing to show by itself
  labels = tokenizer.labels_in_text([tokenizer.BOS, *tokenizer.encode(text), 0xC3, 0x28, 260])
  euro = ['\u20ac 1/3', '\u20ac 2/3', '\u20ac 3/3']
  assert labels == ['<bos>', 'a', '\u2423', '\u21b5', *euro, '\u21e5', '\u0301 1/2', '\u0301 2/2', 'c3', '(', '<260>']
  assert all(label.strip() for label in map(tokenizer.label, range(tokenizer.VOCAB_SIZE)))


def test_what_no_page_can_show_is_a_sentence(given):
  model, params, request = given
  refused = {
    'it is empty': request_of(Bytes(), '', depth=2),
    '513 tokens and a page shows 512; shorten': Request((1,) * 513, 2),
    'give --depth=128 or less': Request((1,) * 512, 129),
    '264 tokens and does not know 264': Request((1, 264), 2),
  }
  for words, request in refused.items():
    with pytest.raises(BadInput, match=words):
      lens.look(model, params, request)


def test_the_table_and_the_numbers_of_the_page_are_whole(numbers, tmp_path):
  """What a reader without scripts has; and nothing that a prompt says becomes markup."""
  page.write(tmp_path / 'lens.html', numbers)
  text = (tmp_path / 'lens.html').read_text()
  assert text.count('<td') == T * (R + 3) and text.count('<tr>') == T + 1
  assert text.count('</script>') == 2 and '<title>Latent lens: a&lt;/script&gt;</title>' in text and '{{' not in text
  assert not re.search(r'(src|href)=|https?://(?!www\.w3\.org/2000/svg)', text)
  inside = json.loads(text.split('id="numbers">')[1].split('</script>')[0])
  assert inside['tokens'] == numbers['tokens'] and len(inside['coordinates'][T - 1]) == R + 1
  np.testing.assert_allclose(inside['kl'], numbers['kl'], rtol=1e-3)


def test_numbers_that_are_not_finite_still_make_a_page(given, seen, tmp_path):
  """The page is needed most when a model is broken."""
  broken = jax.tree.map(lambda x: x * np.nan if x.dtype.kind == 'f' else x, seen)
  numbers = lens.summarize(broken, given[2], ABOUT)
  page.write(tmp_path / 'lens.html', numbers)
  assert 'NaN' not in (tmp_path / 'lens.html').read_text() and numbers['exit'] == [None] * T
  assert '16 not finite' in page.summary(numbers)


# --- the page in a browser -------------------------------------------------------------------------


@pytest.fixture(scope='module')
def browser():
  with headless() as browser:
    yield browser


def errors(browser) -> list[str]:
  return [entry['message'] for entry in browser.get_log('browser') if entry['level'] == 'SEVERE']


@pytest.mark.slow
def test_the_page_answers_to_mouse_and_keys(browser, numbers, tmp_path):
  from selenium.webdriver import ActionChains, Keys

  page.write(tmp_path / 'lens.html', numbers)
  browser.get((tmp_path / 'lens.html').as_uri())
  find = lambda css: browser.find_elements('css selector', css)
  detail = lambda: find('#detail')[0].text
  words_of = lambda t, i: [numbers['labels'][str(token)] for token in numbers['top'][t][i]]
  cell = lambda t, i: find(f'#grid tbody tr:nth-child({t + 1}) td:nth-child({i + 5})')[0]
  assert f'position {T - 1}), iteration 3' in detail()  # at first: the last token at the mean depth
  ActionChains(browser).move_to_element(cell(2, 5)).perform()
  assert 'position 2), iteration 6' in detail()
  assert [bar.text.split('\n')[0] for bar in find('#detail .bar')] == words_of(2, 5)
  cell(1, 1).click()
  paths = find('#panels')[0].get_attribute('innerHTML')
  browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
  assert browser.switch_to.active_element == cell(2, 3) and cell(2, 3).get_attribute('aria-selected') == 'true'
  assert len(find('[aria-selected]')) == 1 and len(find('#grid [tabindex="0"]')) == 1
  browser.switch_to.active_element.send_keys(Keys.HOME, Keys.ARROW_LEFT, Keys.PAGE_UP)
  assert browser.switch_to.active_element == cell(0, 0)
  ActionChains(browser).move_to_element(find('h1')[0]).perform()
  assert 'position 0), iteration 1' in detail()
  assert find('#panels')[0].get_attribute('innerHTML') != paths and len(find('#panels svg')) == 3


@pytest.mark.slow
def test_the_page_draws_what_it_has_and_asks_for_nothing_else(browser, numbers, tmp_path):
  page.write(tmp_path / 'lens.html', numbers)
  browser.get((tmp_path / 'lens.html').as_uri())
  shading = lambda: browser.execute_script('return cells.map(row => row.map(c => +c.style.getPropertyValue("--v")))')
  choose = 'const s = document.getElementById("shade"); s.value = arguments[0]; s.dispatchEvent(new Event("change"))'
  np.testing.assert_allclose(shading(), np.array(numbers['top_p'])[..., 0], atol=2e-3)
  browser.execute_script(choose, 'entropy')
  np.testing.assert_allclose(shading(), np.array(numbers['entropy']) / np.max(numbers['entropy']), atol=2e-3)
  assert errors(browser) == []  # none in the script, nothing refused by the page's own policy
  opacities = """return cells.map((row, t) => row.map((_, i) => {
    const c = document.querySelector(`canvas[data-map=${arguments[0]}]`), dense = c.width / c.clientWidth;
    const [x, y] = [MARGIN + (i + .5) * columnOf(c), (t + .5) * ROW];
    return c.getContext('2d').getImageData(x * dense, y * dense, 1, 1).data[3] / 255;
  }))"""
  for name in ('kl', 'distance'):
    heights = np.log10(np.maximum(numbers[name], 1e-8))
    want = (heights - heights.min()) / np.ptp(heights)
    np.testing.assert_allclose(browser.execute_script(opacities, name), want, atol=0.01, err_msg=name)
  background = 'return getComputedStyle(document.body).backgroundColor'
  light = browser.execute_script(background)
  dark = {'features': [{'name': 'prefers-color-scheme', 'value': 'dark'}]}
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dark)
  assert browser.execute_script(background) != light == 'rgb(255, 255, 255)'
  assert browser.execute_script('return performance.getEntriesByType("resource").length') == 0


@pytest.mark.slow
def test_a_page_of_a_broken_model_says_so_and_works(browser, given, seen, tmp_path):
  broken = jax.tree.map(lambda x: x * np.nan if x.dtype.kind == 'f' else x, seen)
  page.write(tmp_path / 'lens.html', lens.summarize(broken, given[2], ABOUT))
  browser.get((tmp_path / 'lens.html').as_uri())
  assert 'not finite' in browser.find_element('id', 'detail').text
  assert 'no principal directions' in browser.find_element('id', 'panels').text
  assert errors(browser) == []
