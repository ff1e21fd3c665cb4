"""The watchdog under a fake clock, and processes that compare what must be equal."""

import socket
import threading

import numpy as np
import pytest

from latent_loop import config as configs
from latent_loop.exit_codes import BAD_INPUT, HANG
from latent_loop.parallel import group as groups
from latent_loop.trust import watchdog
from latent_loop.trust.watchdog import StepTime, Watchdog


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self) -> float:
    return self.now


class Watched:
  """A watchdog whose time a test moves; it notes exit codes instead of ending the process."""

  def __init__(self, **cfg):
    self.clock, self.ended, self.told = Clock(), [], []
    self.dog = Watchdog(configs.GuardConfig(**cfg), self.told.append, self.clock, self.ended.append)

  def step(self, n: int, next_n: int = 0, secs: float | None = None) -> str | None:
    """One step of 1 + 0.5 n seconds, most of it waiting for the device."""
    secs = 1 + 0.5 * n if secs is None else secs
    for phase, share in (('data', 0.1), ('dispatch', 0.1), ('device', 0.8)):
      self.dog.phase(phase)
      self.clock.now += share * secs
    return self.dog.step_done(n, next_n)

  def silence(self, secs: float) -> None:
    for _ in range(round(secs / watchdog.TURN_SECS)):
      self.dog.turn()


def trained(**cfg) -> Watched:
  watched = Watched(**cfg)
  watched.step(3, secs=500.0)  # compiling
  for n in (3, 40, 7, 0, 21, 8, 2, 11, 5):
    assert watched.step(n, next_n=8) is None
  return watched


@pytest.mark.parametrize('seed', range(3))
def test_step_time_is_a_plus_b_n(seed):
  """Noise of 5 % on 1 + 0.5 n: expectations within 10 %; and the fit follows when the machine becomes half as fast."""
  rng, fit = np.random.default_rng(seed), StepTime()
  for factor in (1, 2):
    for n in rng.poisson(12, 400):
      fit.add(int(n), factor * (1 + 0.5 * n) * rng.normal(1, 0.05))
    for n in (5, 12, 40):
      np.testing.assert_allclose(fit.expect(n), factor * (1 + 0.5 * n), rtol=0.1)


def test_step_time_at_one_depth_is_the_mean():
  fit = StepTime()
  for _ in range(20):
    fit.add(4, 3.0)
  np.testing.assert_allclose([fit.expect(4), fit.expect(100)], 3.0)


def test_patience_follows_the_depth_of_the_step_under_way():
  watched = trained(patience_secs=20.0, patience_factor=10.0)
  watched.dog.phase('device')
  np.testing.assert_allclose(watched.dog.patience(), 10 * (1 + 0.5 * 8), rtol=1e-6)
  watched.step(8, next_n=100)
  np.testing.assert_allclose(watched.dog.patience(), 10 * (1 + 0.5 * 100), rtol=1e-6)
  watched.step(100, next_n=0)
  assert watched.dog.patience() == 20.0, 'the stated minimum'


def test_silence_ends_the_process_with_stacks_and_the_phase(capfd):
  watched = trained(patience_secs=20.0, patience_factor=10.0)
  watched.dog.phase('device')
  watched.silence(50)
  assert watched.ended == []
  watched.silence(1)
  error = capfd.readouterr().err
  assert watched.ended == watched.told == [HANG]
  assert 'nothing has moved for 51 s' in error and "phase 'device'" in error
  assert 'most recent call first' in error and 'test_watchdog.py' in error
  watched.dog.bark('a peer says so, too')
  assert watched.ended == [HANG], 'one end is enough'


def test_every_phase_begins_with_new_patience():
  watched = trained(patience_secs=20.0, patience_factor=1.0)
  for phase in ('data', 'dispatch', 'device', 'peers', 'data'):
    watched.dog.phase(phase)
    watched.silence(20)
  assert watched.ended == []


def test_compiling_and_the_first_evaluation_may_take_long():
  watched = Watched(startup_secs=1000.0, patience_secs=20.0, patience_factor=10.0)
  watched.dog.phase('dispatch')
  watched.silence(999)
  watched = trained(startup_secs=1000.0, patience_secs=20.0, patience_factor=10.0)
  watched.dog.phase('evaluate')
  assert watched.dog.patience() == 1000.0
  watched.clock.now += 70
  watched.dog.phase('data')
  watched.dog.phase('evaluate')
  assert watched.dog.patience() == 700.0, 'ten times what the first one took'
  assert watched.ended == []


def test_how_long_a_wait_for_a_save_took_says_nothing_of_the_next():
  """The first one is over at once: no save is under way."""
  watched = trained(startup_secs=1000.0, patience_secs=20.0, patience_factor=10.0)
  for _ in range(2):
    watched.dog.phase(watchdog.SAVE_UNDER_WAY)
    watched.dog.phase('save')
  watched.dog.phase(watchdog.SAVE_UNDER_WAY)
  watched.silence(1000)
  assert watched.ended == []
  watched.silence(1)
  assert watched.ended == [HANG]


def test_a_process_that_was_stopped_as_a_whole_does_not_bark():
  """Ctrl-Z, a sleeping laptop: the clock has jumped, but the watchdog has not had its turns."""
  watched = trained(patience_secs=20.0)
  watched.dog.phase('device')
  watched.clock.now += 10_000
  watched.silence(1)
  assert watched.ended == []


def test_slow_steps_are_those_that_their_depth_does_not_explain():
  watched = trained(slow_factor=3.0)
  assert watched.step(100) is None, 'deep is not slow'
  assert watched.step(4, secs=8.9) is None
  sentence = watched.step(4, secs=12.0)
  assert sentence.startswith('slow: 12.00 s where n=4 explains 3.') and "9.60 s of it in phase 'device'" in sentence
  assert watched.dog.slow_steps == 1
  watched.dog.phase('save')
  watched.clock.now += 60
  assert watched.step(4) is None, 'a save is no part of a step'
  watched.step(4, secs=10_000)
  assert watched.step(4, secs=20) is not None, 'one hiccup explains no other'


# --- cross-checks ------------------------------------------------------------------------------------------


@pytest.fixture
def pair(monkeypatch):
  """Two groups of one run in this process, over a socket pair; exits are noted."""
  ended, links = [], socket.socketpair()
  done = threading.Event()

  def end(code):
    ended.append(code)
    if len(ended) == 2:
      done.set()

  monkeypatch.setattr(groups, '_keep_alive', lambda link: None)
  seats = [groups.Seat('127.0.0.1:1', 2, process) for process in (0, 1)]
  made = [groups.Group(seats[0], {1: links[0]}, end), groups.Group(seats[1], {0: links[1]}, end)]
  return made, ended, done


def test_processes_that_draw_different_depths_end_with_2_and_a_sentence(pair, capfd):
  (first, second), ended, done = pair
  for step, depth in ((50, '4+3'), (100, '5+3')):
    first.check(step, {'the depth drawn': depth, 'the hash of the batch': 'ab'})
  second.check(50, {'the depth drawn': '4+3', 'the hash of the batch': 'ab'})
  assert not done.wait(0.2) and ended == [], 'alike at step 50'
  second.check(100, {'the depth drawn': '6+3', 'the hash of the batch': 'ab'})
  assert done.wait(5) and ended == [BAD_INPUT, BAD_INPUT]
  error = capfd.readouterr().err
  sentence = 'at step 100 the processes are not alike: the depth drawn is 5+3 on process 0 and 6+3 on process 1;'
  assert error.count(sentence) == 2


def test_a_peer_that_barks_makes_the_others_bark(pair):
  (first, second), ended, _ = pair
  heard, came = [], threading.Event()
  first.on_hang = lambda reason: (heard.append(reason), came.set())
  second.announce(HANG)
  assert came.wait(5) and heard == ['process 1 reports that nothing moves']
