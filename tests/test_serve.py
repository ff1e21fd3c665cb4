"""The server, driven by OpenAI's own client: answers are the engine's, a client's leaving or nonsense hurts nobody."""

import contextlib
import http.client
import json
import os
import random
import re
import socket
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest
from starlette.testclient import TestClient

from latent_loop.chaos import serve as chaos
from latent_loop.inference.board import Board
from latent_loop.inference.engine import Answer, Engine, ExitRule, Request
from latent_loop.inference.text import Typist, request_of, text_of
from latent_loop.serving import fields, repl, server, wire
from latent_loop.serving.app import MAX_BODY_BYTES, make_app
from latent_loop.serving.fields import Limits
from latent_loop.serving.scheduler import Scheduler
from latent_loop.tokenizer import Bytes
from latent_loop.tokenizer import utf8 as tokenizer
from latent_loop.tokenizer.messages import STOPS
from tests.browser import headless
from tests.tiny import mesh_of, random_params, tiny_model

openai = pytest.importorskip('openai', reason='the client is in launch/requirements/dev.txt')
pytestmark = pytest.mark.slow

LIMITS = Limits('tiny', depth=3, max_depth=64, max_total_tokens=2048)
SLOTS, QUEUE, LONG = 2, 3, 1900


@pytest.fixture(scope='module')
def engine():
  model = tiny_model(**{'model.vocab_size': tokenizer.VOCAB_SIZE})
  return Engine(model, jax.tree.map(jnp.asarray, random_params(model)), mesh_of(), 'ring:1')


@pytest.fixture(scope='module')
def running(engine):
  """(URL, scheduler)."""
  board = Board(engine, SLOTS, LIMITS.max_depth, LIMITS.max_total_tokens)
  with server.in_background(board, Bytes(), LIMITS, QUEUE) as (url, scheduler):
    yield url, scheduler


@pytest.fixture(scope='module')
def client(running):
  with openai.OpenAI(base_url=f'{running[0]}/v1', api_key='none', max_retries=0, timeout=60) as client:
    yield client


@pytest.fixture(autouse=True)
def nothing_leaks(running):
  """After every test all slots are free and nothing waits."""
  yield
  until_idle(running[1])


def until_idle(scheduler):
  until_load(scheduler, busy=0, queued=0)


def until_load(scheduler, **wanted):
  deadline = time.monotonic() + 60
  while not wanted.items() <= scheduler.load().items():
    assert time.monotonic() < deadline, scheduler.load()
    time.sleep(0.01)


def ask(client, prompt='ab', max_tokens=40, **options):
  """OpenAI's fields by name, ours through extra_body."""
  ours = {name: options.pop(name) for name in ('depth', 'exit', 'warm_start', 'top_k', 'min_p') if name in options}
  return client.completions.create(
    **{'model': 'tiny', 'prompt': prompt, 'max_tokens': max_tokens, 'temperature': 0, 'extra_body': ours, **options}
  )


def want(engine, prompt='ab', max_new_tokens=40, **options):
  (answer,) = engine.answer([request_of(Bytes(), prompt, **{'depth': 3, 'max_new_tokens': max_new_tokens, **options})])
  return answer


def test_a_completion_is_what_the_engine_answers(client, engine):
  ours = {'depth': 5, 'exit': 'latent-diff:0.6', 'top_k': 9, 'min_p': 0.01}
  got = ask(client, temperature=0.8, top_p=0.9, seed=4, logprobs=1, **ours)
  ours['exit'] = ExitRule.parse(ours['exit'])
  answer = want(engine, temperature=0.8, top_p=0.9, seed=4, **ours)
  (choice,) = got.choices
  assert choice.text == text_of(Bytes(), answer)[0] and choice.finish_reason == answer.finish
  assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (3, len(answer.tokens))
  assert got.usage.iterations == sum(answer.depths) and got.usage.mean_depth < 5
  if len(choice.logprobs.token_logprobs) == len(answer.tokens):  # no two tokens made one character
    assert choice.logprobs.token_logprobs == pytest.approx(answer.log_probs, abs=1e-5)


def test_a_stream_brings_the_same_text_in_pieces_each_with_its_depth(client, engine):
  options = {'exit': 'latent-diff:0.6', 'depth': 5}
  whole = ask(client, **options)
  chunks = list(ask(client, stream=True, stream_options={'include_usage': True}, **options))
  *texts, last = chunks
  assert ''.join(chunk.choices[0].text for chunk in texts) == whole.choices[0].text and len(texts) > 2
  assert [chunk.choices[0].finish_reason for chunk in texts] == [None] * (len(texts) - 1) + ['length']
  assert last.choices == [] and last.usage == whole.usage
  pairs = [pair for chunk in texts for pair in chunk.choices[0].depths]
  assert pairs == whole.choices[0].depths and ''.join(piece for piece, _ in pairs) == whole.choices[0].text
  assert len({depth for _, depth in pairs}) > 1


def test_a_chat_is_a_completion_of_its_messages(client):
  messages = [{'role': 'system', 'content': 'be brief '}, {'role': 'user', 'content': ' hi'}]
  options = {'model': 'tiny', 'temperature': 0, 'seed': 3}
  chat = client.chat.completions.create(messages=messages, max_completion_tokens=9, **options)
  plain = ask(client, 'system: be brief\nuser: hi\nassistant:', 9, seed=3)
  assert chat.choices[0].message.content == plain.choices[0].text and chat.choices[0].message.role == 'assistant'
  assert chat.usage == plain.usage
  chunks = list(client.chat.completions.create(messages=messages, max_tokens=9, stream=True, **options))
  assert ''.join(chunk.choices[0].delta.content for chunk in chunks) == plain.choices[0].text
  assert [chunk.choices[0].delta.role for chunk in chunks] == ['assistant'] + [None] * (len(chunks) - 1)


def test_two_at_once_at_different_depths_do_not_meet(client, engine):
  """More than there are slots, each with another depth."""
  depths, got = [1, 30, 7, 3], {}

  def one(depth):
    got[depth] = ask(client, depth=depth, seed=depth)

  threads = [threading.Thread(target=one, args=(depth,)) for depth in depths]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for depth in depths:
    answer = want(engine, depth=depth, seed=depth)
    assert got[depth].choices[0].text == text_of(Bytes(), answer)[0] and got[depth].usage.mean_depth == depth


def test_a_stop_string_ends_the_answer_and_frees_the_slot(client, engine):
  text = text_of(Bytes(), want(engine, max_new_tokens=60))[0]
  stop = text[20:23]
  for got in (ask(client, max_tokens=LONG, stop=stop), ask(client, max_tokens=LONG, stop=[stop, 'not there'])):
    assert got.choices[0].text == text[: text.index(stop)] and got.choices[0].finish_reason == 'stop'
    assert got.usage.completion_tokens < 100
  chunks = list(ask(client, max_tokens=LONG, stop=stop, stream=True))
  assert ''.join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]


def test_a_client_that_leaves_frees_its_slot(client, running):
  scheduler = running[1]
  stream = ask(client, max_tokens=LONG, depth=64, stream=True)
  next(iter(stream))
  assert scheduler.load()['busy'] == 1
  stream.close()
  until_idle(scheduler)
  with pytest.raises(openai.APITimeoutError):
    ask(client, max_tokens=LONG, depth=64, timeout=0.2)
  until_idle(scheduler)


def test_a_full_queue_says_when_to_come_again(client, running):
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(contextlib.closing(http.client.HTTPConnection(running[0][7:]))) for _ in range(5)]
    for connection in sockets:
      body = {'prompt': 'a', 'max_tokens': LONG, 'depth': 64, 'temperature': 0}  # a sampled one may end at once
      connection.request('POST', '/v1/completions', json.dumps(body), {'content-type': 'application/json'})
    until_load(running[1], busy=SLOTS, queued=QUEUE)
    with pytest.raises(openai.RateLimitError, match='2 answers are being made and 3 wait') as caught:
      ask(client)
    assert caught.value.response.headers['retry-after'] == '1'
    assert post(running[0], '/health', None)[1]['queued'] == QUEUE
    for connection in sockets[SLOTS:]:
      connection.close()
    until_load(running[1], queued=0)
    assert running[1].load()['busy'] == SLOTS  # those that left the queue did not wait for a slot first


def post(url, path, body, headers=None):
  """(status, the JSON that came)."""
  with contextlib.closing(http.client.HTTPConnection(url[7:], timeout=30)) as connection:
    connection.request('GET' if body is None else 'POST', path, body, headers or {})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


@pytest.mark.parametrize(
  'body,words',
  [
    (b'{"prompt": ', 'the body is not JSON'),
    (b'\xff\xfe{}', 'the body is not JSON'),
    (b'[' * 100_000, 'the body is not JSON'),
    (b'[1]', 'the body is no object'),
    (b'{}', 'prompt is missing'),
    ({'prompt': 'a', 'n': 2}, 'n=2: this server knows only 1'),
    ({'prompt': 'a', 'dept': 2}, "'dept': this server has no such field; it has best_of, depth"),
    ({'prompt': 'a', 'depth': 2.5}, 'depth=2.5: the rule is a whole number'),
    ({'prompt': 'a', 'depth': True}, 'depth=true: the rule is a whole number'),
    ({'prompt': 'a', 'depth': 65}, 'depth=65 is above 64'),
    ({'prompt': 'a', 'depth': 10**30}, 'depth=1000000000000000000000000000000 is out of range'),
    ({'prompt': 'a', 'exit': 'klx'}, "exit='klx': no such criterion; choose one of kl"),
    ({'prompt': 'a', 'temperature': 'hot'}, 'temperature="hot": the rule is a number'),
    (b'{"prompt": "a", "temperature": NaN}', 'temperature=nan: not a number from 0'),
    ({'prompt': 'a', 'max_tokens': 0}, 'max_tokens=0 is out of range'),
    ({'prompt': 'a' * 2000, 'max_tokens': 128}, 'a prompt of 2001 tokens and max_tokens=128 are more than the 2048'),
    ({'prompt': ['a', 'b']}, 'a request for each of several prompts'),
    ({'prompt': [3, 264]}, 'the model knows 0 to 263'),
    ({'prompt': [3, -1]}, 'the model knows 0 to 263'),
    ({'prompt': []}, 'it has no tokens'),
    ({'prompt': '\ud800'}, 'not UTF-8 text'),
    ({'prompt': 'a', 'stop': ['']}, 'none empty'),
    ({'prompt': 'a', 'logprobs': 5}, 'of the chosen tokens only'),
    ({'prompt': 'a', 'stream_options': {'include_usage': 3}}, 'include_usage=3: the rule is true or false'),
    ({'prompt': 'a', 'stream_options': {'usage': True}}, "stream_options: it has include_usage, not 'usage'"),
    ({'prompt': 'a', 'temperature': 10**400}, 'not a number from 0'),
  ],
)
def test_nonsense_is_refused_in_a_sentence(running, body, words):
  body = body if isinstance(body, bytes) else json.dumps(body)
  status, answer = post(running[0], '/v1/completions', body)
  assert status == 400 and answer['error']['type'] == 'invalid_request_error'
  assert words in answer['error']['message'] and '--' not in answer['error']['message']


def test_what_there_is_not_is_said_by_its_status(client, running):
  url = running[0]
  bad_messages = [[], [3], [{'role': 'x', 'content': 'a'}], [{'role': 'user', 'content': [{'type': 'image'}]}]]
  for messages in bad_messages:
    status, answer = post(url, '/v1/chat/completions', json.dumps({'messages': messages}))
    assert status == 400 and answer['error']['message'].startswith('messages')
  with pytest.raises(openai.NotFoundError, match="the one model here is 'tiny'"):
    ask(client, model='gpt')
  assert post(url, '/v2', None)[0] == 404 and post(url, '/v1/completions', None)[0] == 405
  assert post(url, '/v1/completions', b' ' * (MAX_BODY_BYTES + 1))[0] == 413
  pieces = iter([b' ' * 2**19] * 3)  # of no stated length
  assert post(url, '/v1/completions', pieces)[0] == 413
  assert [model.id for model in client.models.list()] == ['tiny']
  assert post(url, '/health', None)[1]['slots'] == SLOTS


def test_a_port_that_is_taken_is_a_sentence():
  with socket.create_server(('127.0.0.1', 0)) as taken:
    with pytest.raises(server.BadInput, match='cannot listen there'):
      server.listen('127.0.0.1', taken.getsockname()[1])


def test_pieces_are_the_text_and_nothing_is_taken_back():
  """Whole characters, no letter of a stop string, wherever the answer is cut."""
  text = 'a\u00e9-\u20ac stops here'
  tokens = [*text.encode(), 0xE2]
  answer = lambda n, finish: Answer(tokens[:n], [0.0] * n, list(range(n)), finish)
  for step in (1, 2, 5):
    typist, pieces = Typist(Bytes(), ('never', 'stop!')), []
    for n in range(step, len(tokens), step):
      pieces += typist.read(answer(n, None))
      assert text.startswith(''.join(piece for piece, _ in pieces))
    pieces += typist.read(answer(len(tokens), 'length'))
    assert ''.join(piece for piece, _ in pieces) == text + '\ufffd' and typist.finish == 'length'
    assert [i for _, i in pieces] == list(range(len(tokens))), 'every token once, in order'
    assert [piece for piece, _ in pieces[:7]] == ['a', '', '\u00e9', '-', '', '', '\u20ac']
  typist = Typist(Bytes(), ('stop',))
  assert ''.join(piece for n in range(1, 13) for piece, _ in typist.read(answer(n, None))) == 'a\u00e9-\u20ac '
  assert typist.finish == 'stop'


def test_a_token_that_begins_a_stop_string_is_told_once():
  """Of tokens with several letters each, where a part of one could already be shown."""
  words = types.SimpleNamespace(decode=lambda tokens: ''.join(['the ', 'cats ', 'sat'][token] for token in tokens))
  typist = Typist(words, ('xx', 'tax'))
  told = [typist.read(Answer([0, 1, 2][:n], [0.0] * n, [1] * n, 'length' if n == 3 else None)) for n in (1, 2, 3)]
  assert told == [[], [('the ', 0)], [('cats ', 1), ('sat', 2)]]


def test_log_probs_and_depths_of_an_answer_are_those_of_all_its_tokens(engine):
  """Also of those that only begin a character, and of the one that ends the answer."""
  tokens, log_probs = [*'\u00e9\u20ac'.encode(), tokenizer.EOS], [-0.1, -0.2, -0.3, -0.4, -0.5, float('nan')]
  for chat in (False, True):
    writer = wire.Writer(chat, 'tiny', fields.asked_of({'prompt': '', 'logprobs': 1}, Bytes(), LIMITS), Bytes())
    writer.read(Answer(tokens, log_probs, [1, 2, 3, 4, 5, 6], 'stop'))
    (choice,) = json.loads(wire.to_json(writer.whole()))['choices']
    told = choice['logprobs']
    values = [one['logprob'] for one in told['content']] if chat else told['token_logprobs']
    assert values == [*log_probs[:5], None], 'NaN is no JSON'
    assert choice['depths'] == [['', 1], ['\u00e9', 2], ['', 3], ['', 4], ['\u20ac', 5], ['', 6]]


def test_of_two_stop_strings_the_one_that_is_complete_first_ends_the_answer_however_it_comes():
  """And only the tokens up to it are counted, whatever the board had made beyond them."""
  tokens = [*b'12abcdef']
  answer = lambda n: Answer(tokens[:n], [0.0] * n, [2] * n, None)
  asked = fields.asked_of({'prompt': '', 'stop': ['abcd', 'b', 'ab']}, Bytes(), LIMITS)
  for step in (1, 3, 8):
    writer, n = wire.Writer(False, 'tiny', asked, Bytes()), 0
    while writer.finish is None:
      n = min(n + step, len(tokens))
      writer.read(answer(n))
    whole = writer.whole()
    assert whole['choices'][0]['text'] == '12' and text_of(Bytes(), answer(8), asked.stops) == ('12', 'stop')
    usage = {'prompt_tokens': 1, 'completion_tokens': 4, 'total_tokens': 5, 'iterations': 8, 'mean_depth': 2}
    assert whole['usage'] == usage


def test_who_gives_no_seed_gets_another_answer_each_time_unless_it_is_greedy():
  seed = lambda **values: fields.asked_of({'prompt': 'a', **values}, Bytes(), LIMITS).request.seed
  assert len({seed() for _ in range(5)}) > 1 and {seed(temperature=0), seed(seed=0)} == {0} and seed(seed=7) == 7


def test_a_turn_that_ends_in_a_token_of_its_own_needs_no_stop_strings():
  asked = lambda tokenizer: fields.asked_of({'messages': [{'role': 'user', 'content': 'a'}]}, tokenizer, LIMITS)
  marked = Bytes()
  marked.chat = types.SimpleNamespace(begin_header=1, end_header=2, end_turn=3)
  assert asked(Bytes()).stops == STOPS and asked(marked).stops == ()


def test_a_server_whose_scheduler_has_ended_is_not_healthy(running):
  ended = Scheduler(running[1]._board, QUEUE)
  ended.close(0)
  ended.start()
  ended.join()
  health = TestClient(make_app(ended, Bytes(), LIMITS)).get('/health')
  assert health.status_code == 503 and health.json()['status'] == 'stopping'
  assert post(running[0], '/health', None)[0] == 200


# --- for a person -------------------------------------------------------------------------------------------


def test_a_terminal_chat_shades_by_depth_stops_and_goes_on(engine, monkeypatch, capsys):
  lines = iter(['hi', KeyboardInterrupt(), '', 'more', '/depth 4', '/new', 'hi', '/quit'])

  def read(prompt):
    if isinstance(line := next(lines), str):
      return line
    raise line

  prompts = []

  def make(tokens):
    prompts.append(tokenizer.decode(tokens))
    return Request(tokens, 3, 40, stops=(tokenizer.EOS,), seed=len(prompts))

  monkeypatch.setattr('builtins.input', read)
  repl.chat(engine, Bytes(), make, (), shade=False)
  said = capsys.readouterr().out
  answer = want(engine, 'user: hi\nassistant:', seed=1)
  first = text_of(Bytes(), answer, STOPS)[0]
  assert prompts[0] == prompts[2] == 'user: hi\nassistant:'
  assert prompts[1] == f'user: hi\nassistant: {first.strip()}\nuser: more\nassistant:'
  assert said.count('Ctrl-C stops an answer') == 3 and '/depth: no command of this chat' in said
  assert said.count('3.0 of 3 iterations each') == 3
  assert '\033' not in said and repl.shaded('a\n', 1, 9) == '\033[38;5;16;48;5;255ma\033[0m\n'
  assert repl.shaded('\x1b[2J', 9, 9) == '\033[38;5;16;48;5;241m\\x1b[2J\033[0m'


@pytest.fixture(scope='module')
def browser():
  with headless() as browser:
    yield browser


def test_the_chat_page_talks_and_shades_every_token_by_its_depth(browser, running, monkeypatch):
  from selenium.webdriver import Keys

  find = lambda css: browser.find_elements('css selector', css)
  same_seed = 'Math.random = () => 0'  # two answers of 128 tokens and more; of the page's own seeds some end at once
  slide = 'const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event("input"))'
  notes = lambda: [note.text for note in find('.assistant .note')]

  def wait(done):
    deadline = time.monotonic() + 60
    while not done():
      assert time.monotonic() < deadline, find('#log')[0].text
      time.sleep(0.02)

  browser.get(running[0])
  browser.execute_script(same_seed)
  wait(lambda: find('#depth')[0].get_attribute('max') == '64')
  assert find('#depth_shown')[0].text == '3'
  browser.execute_script(slide, 'depth', 6)
  browser.execute_script(slide, 'exit', 9)
  find('#say')[0].send_keys('hello <b>', Keys.ENTER)
  wait(lambda: notes())
  assert find('.user')[0].text == 'hello <b>' and find('#exit_shown')[0].text == '1e-1'
  shades = [float(token.get_attribute('style').split(':')[1].strip(' ;')) for token in find('.assistant .token')]
  depths = [int(token.get_attribute('title').split()[0]) for token in find('.assistant .token')]
  assert shades == pytest.approx([(depth - 1) / 5 for depth in depths]) and len(set(depths)) > 1 and max(depths) <= 6
  assert re.fullmatch(r'\d+ tokens, \d\.\d iterations each on average', notes()[0])
  browser.execute_script(slide, 'depth', 64)
  browser.execute_script(slide, 'exit', 0)
  monkeypatch.setattr(fields, '_MAX_TOKENS', LONG)  # it is still being made when Stop is pressed
  find('#say')[0].send_keys('more', Keys.ENTER)
  wait(lambda: len(find('.assistant .token')) > len(depths))
  find('#send')[0].click()
  wait(lambda: len(notes()) == 2)
  assert notes()[1] == 'stopped'
  assert browser.execute_script('return messages.map(m => m.role)') == ['user', 'assistant'] * 2
  find('#say')[0].send_keys('x' * 2100, Keys.ENTER)
  wait(lambda: find('.error'))
  assert 'more than the 2048 tokens' in find('.error')[0].text
  assert [e for e in browser.get_log('browser') if e['level'] == 'SEVERE' and '400' not in e['message']] == []
  find('#fresh')[0].click()
  assert find('#log')[0].text == ''
  find('#say')[0].send_keys('a secret', Keys.ENTER)
  wait(lambda: find('.assistant .token'))
  find('#fresh')[0].click()
  wait(lambda: browser.execute_script('return running') is None)
  assert browser.execute_script('return messages') == [], 'nor does the answer that it stopped come back'


def test_twenty_seconds_of_trouble_leave_nothing_behind(tmp_path, monkeypatch):
  """launch.chaos serve, shorter: its programs compile without optimization, on one device."""
  quick = [flag for flag in os.environ['XLA_FLAGS'].split() if 'device_count' not in flag]
  monkeypatch.setenv('XLA_FLAGS', ' '.join(quick))
  result = chaos.serve(20 / 60, 0, tmp_path, print)
  assert result['ok'], result


def test_the_trial_sees_a_wrong_answer(engine, running):
  """A fault is one: of text, of status."""
  noted = []
  client = chaos._Client(int(running[0].rpartition(':')[2]), [], [], None, lambda *what: noted.append(what))
  body = {'prompt': 'a', 'max_tokens': 3, 'depth': 3, 'temperature': 0, 'seed': 0}
  client._bodies, client._dice = [body], random.Random(0)
  right = text_of(Bytes(), want(engine, 'a', 3))[0]
  for client._want in ([right], ['other']):
    client.finish(body)
  assert (
    [kind for kind, *_ in noted] == ['finished', 'finished'] and noted[0][1] is None and 'the engine' in noted[1][1]
  )
