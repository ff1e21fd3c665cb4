"""The scheduler over a board that is only played: nobody starves, and a device that fails ends nothing for good."""

import collections
import threading
import types

from latent_loop.serving.scheduler import Job, Scheduler

SLOTS, QUEUE = 2, 5


class Board:
  """Each answer is complete with its first token, but for that of the request 'long'."""

  def __init__(self):
    self.requests, self.seen = [None] * SLOTS, []

  @property
  def free(self):
    return [slot for slot, request in enumerate(self.requests) if request is None]

  def admit(self, slot, request):
    self.seen.append(request)
    if request == 'long':
      self.requests[slot] = request
    return types.SimpleNamespace(tokens=[1], finish=None if request == 'long' else 'length')

  def advance(self, iterations):
    self.seen.append('advance')
    return {}

  def release(self, slot):
    raise RuntimeError('the device is gone')

  def clear(self):
    self.requests = [None] * SLOTS


def test_requests_of_one_token_that_never_cease_do_not_hold_up_a_long_answer():
  board = Board()
  scheduler = Scheduler(board, QUEUE)
  again = lambda: len(board.seen) < 99 and scheduler._waiting.append(Job('short', again))
  scheduler._waiting.extend([Job('long', lambda: None), Job('short', again)])
  scheduler._turn()
  assert board.seen == ['long', 'short', 'advance']


def test_a_device_that_fails_while_a_slot_is_freed_costs_the_answers_but_not_the_server():
  scheduler = Scheduler(Board(), QUEUE)
  left, other = Job('long', lambda: None), Job('long', lambda: None)
  scheduler._waiting.extend([left, other])
  scheduler._turn()
  scheduler.cancel(left)
  scheduler._turn()
  assert 'the device failed (the device is gone)' in str(other.error)
  assert scheduler.load() == {'slots': SLOTS, 'busy': 0, 'queued': 0}


def test_a_device_that_is_gone_for_good_ends_the_server_and_everybody_hears_of_it(monkeypatch):
  def gone(self):
    raise RuntimeError('RESOURCE_EXHAUSTED')

  monkeypatch.setattr(Board, 'clear', gone)
  monkeypatch.setattr(threading, 'excepthook', lambda raised: None)
  scheduler = Scheduler(Board(), QUEUE)
  jobs = [Job('long', lambda: None) for _ in range(3)]
  scheduler._running, scheduler._waiting = {0: jobs[0], 1: jobs[1]}, collections.deque([jobs[2]])
  scheduler.cancel(jobs[0])
  scheduler.start()
  scheduler.join()
  assert all(job.error is not None for job in jobs) and not scheduler.takes_jobs
