"""Proof that training sees what it should: replays the order of a run, for several numbers of hosts; reads no token.

That every document is seen once in an epoch follows from two facts, each checked by itself: every token of a document
but its first is a target in exactly one row, and every row comes exactly once in an epoch.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from latent_loop import data
from latent_loop.config import Config
from latent_loop.data.chat import ChatRows
from latent_loop.data.mixture import Mixture, most_off
from latent_loop.data.parquet import ParquetRows
from latent_loop.data.pipeline import Batches, Changes
from latent_loop.data.prepared import PreparedRows
from latent_loop.errors import BadInput
from latent_loop.metrics import read_lines
from latent_loop.trust import rollback

_ROUNDING = 1e-3  # of rows, in products of shares and places
_WINDOW = 1000  # rows over which the realized mixture is compared with the asked one
MakeBatches = Callable[[int, range], Batches]  # (host, the rows of a global batch that it builds) -> its batches


@dataclasses.dataclass(frozen=True)
class Start:
  """From `step` on, `hosts` processes feed the run."""

  step: int
  hosts: int


def audit(config: Config, hosts: list[int], epochs: int, workdir: Path | None, say: Callable[[str], None]) -> list[str]:
  """Says what holds and returns a sentence for every fault. workdir: also compare with what that run recorded."""
  if not config.data.paths:
    raise BadInput(
      f'config.data.source={config.data.source!r}: only data of config.data.paths has an index to '
      'replay; give a config or a run with such data (prepared, parquet or chat)'
    )
  size = config.train.batch_size
  for count in hosts:
    if count < 1 or size % count:
      raise BadInput(f'--hosts={count} does not divide config.train.batch_size={size}; give numbers that do')
  rows = data.make_source(config).rows('train')
  sources = rows.sources if isinstance(rows, Mixture) else [rows]
  faults = [fault for path, one in zip(config.data.paths, sources, strict=True) for fault in check_rows(path, one, say)]
  changes = config.data.changes_of(config.train.num_steps)
  make = lambda host, mine: Batches(rows, config.seed, size, mine, changes=changes)
  # Shares of a run have a meaning in that run only, and in it a source may not come to the end of an epoch.
  num_steps = config.train.num_steps if changes else steps_for(rows, size, epochs)
  cuts = [Start(num_steps * i // len(hosts), count) for i, count in enumerate(hosts)]
  for starts in [*([Start(0, count)] for count in hosts), *([cuts] if len(hosts) > 1 else [])]:
    title = ', then '.join(
      f'{start.hosts} host(s)' + f' from step {start.step:,}' * bool(start.step) for start in starts
    )
    ids, found = replay(make, size, num_steps, starts)
    found += check_order(rows, ids, None if changes else epochs)
    say(f'{title}: {num_steps:,} steps, {"every row once in each epoch" if not found else f"{len(found)} faults"}')
    faults += [f'{title}: {fault}' for fault in found]
  lines, found = mixture(rows, ids, [(step * size, weights) for step, weights in changes], size)
  faults += found
  for line in lines:
    say(line)
  if workdir is not None:
    faults += compare_with_run(make(0, range(size)), workdir, say)
  return faults


def steps_for(rows: data.Rows, batch_size: int, epochs: int) -> int:
  """Steps until every source has been through `epochs` epochs."""
  if not isinstance(rows, Mixture):
    return math.ceil(epochs * len(rows) / batch_size)
  total = sum(rows.weights)
  places = max(epochs * len(part) * total / weight for part, weight in zip(rows.parts, rows.weights, strict=True))
  return math.ceil((places + 2 * len(rows.parts)) / batch_size)


def replay(make: MakeBatches, batch_size: int, num_steps: int, starts: list[Start]) -> tuple[np.ndarray, list[str]]:
  """(row at every place of the stream, as the hosts see it, [steps * batch]; faults).

  Each start makes its batches anew, as a process that resumes does.
  """
  ids = np.full((num_steps, batch_size), -1, np.int64)
  faults = []
  for start, end in itertools.pairwise([*starts, Start(num_steps, 0)]):
    share = batch_size // start.hosts
    for host in range(start.hosts):
      mine = range(host * share, (host + 1) * share)
      batches = make(host, mine)
      for step in range(start.step, end.step):
        ids[step, mine.start : mine.stop] = batches.row_ids(step)
  if (ids < 0).any():
    faults.append(f'{(ids < 0).sum()} places of the stream are fed by no host')
  return ids.reshape(-1), faults


def check_order(rows: data.Rows, ids: np.ndarray, epochs: int | None) -> list[str]:
  """Faults of the first epochs of every source: rows that are missing in one, and rows that come again.

  epochs: None = all there are; the last one of a source may end before its time, so no row of that is missing.
  """
  parts = rows.parts if isinstance(rows, Mixture) else [range(len(rows))]
  faults = []
  for number, part in enumerate(parts):
    mine = ids[(ids >= part.start) & (ids < part.stop)] - part.start
    for epoch in range(-(-len(mine) // len(part)) if epochs is None else epochs):
      some = mine[epoch * len(part) : (epoch + 1) * len(part)]
      counts = np.bincount(some, minlength=len(part))
      begun = epochs is None and len(some) < len(part)
      missing, again = 0 if begun else int((counts == 0).sum()), int((counts > 1).sum())
      if missing or again:
        faults.append(
          f'source {number}, epoch {epoch + 1}: of {len(part):,} rows {missing:,} ({missing / len(part):.1%}) are '
          f'never read, {again:,} ({again / len(part):.1%}) are read again'
        )
  return faults


def check_rows(path: str, rows: PreparedRows | ChatRows | ParquetRows, say: Callable[[str], None]) -> list[str]:
  """Whether every token of `rows` but the first of a document is a target once; says what packing costs."""
  if isinstance(rows, ParquetRows):
    say(
      f'{path}: {len(rows):,} rows in {len(rows.blocks):,} row groups; each is used as it is, so packing loses nothing'
    )
    return []
  count = len(rows.layout)
  places = (place for i in range(count) for span in rows.layout.spans(i) for place in span)
  spans = np.fromiter(places, np.int64).reshape(-1, 2)
  ends = np.concatenate(list(rows.stream.document_ends()))
  starts = np.concatenate([[0], ends[:-1]])
  lost, again = targets(spans, starts, ends)
  used = int((spans[:, 1] - spans[:, 0] - 1).sum())
  say(
    f'{path}: {len(ends):,} documents, {int(ends[-1]):,} tokens, {count:,} rows; targets lost to packing {lost:,}, '
    f'twice {again:,}; {used / (count * rows.seq_len):.2%} of the places in a row have a target'
  )
  faults = [f'{path}: {lost:,} tokens are never a target, {again:,} more than once'] if lost or again else []
  return faults + (_check_answers(path, rows, say) if isinstance(rows, ChatRows) else [])


def _check_answers(path: str, rows: ChatRows, say: Callable[[str], None]) -> list[str]:
  """Whether all that the assistant says is in a row that is used."""
  count = lambda which: sum(rows.stream.num_targets(rows.layout.spans(i)) for i in which)
  said, found = count(range(len(rows.layout))), count(rows.used)
  left_out = len(rows.layout) - len(rows)
  say(f'{path}: the assistant says {said:,} tokens; {left_out:,} rows in which it says nothing are left out')
  return [f'{path}: {said - found:,} tokens that the assistant says are in no row'] if found != said else []


def targets(spans: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[int, int]:
  """(tokens that are never a target, tokens that are one again) of documents [start, end), by the spans.

  A span [a, b) makes targets of a + 1 to b - 1; all but the first token of a document should be one, once. How often a
  token is one too many changes only where spans and documents begin and end, so what this holds grows with them alone.
  """
  more = np.concatenate([spans[:, 0] + 1, starts])
  less = np.concatenate([[0], spans[:, 1], starts + 1])
  places = np.concatenate([more, less])
  order = np.argsort(places)
  excess = np.cumsum(np.where(order < len(more), 1, -1))
  lengths = np.diff(places[order], append=ends[-1])
  return int(lengths[excess < 0].sum()), int(lengths[excess > 0].sum())


def mixture(rows: data.Rows, ids: np.ndarray, changes: Changes, batch_size: int) -> tuple[list[str], list[str]]:
  """(a line for each phase of a mixture: asked and realized shares, and the worst window; faults).

  changes: (the place in `ids` from which they hold, weights). Epochs are counted from the first place on.
  """
  if not isinstance(rows, Mixture):
    return ['one source: no mixture'], []
  phases, lines, faults = [(0, rows.weights), *changes, (len(ids), ())], [], []
  for (begin, weights), (end, _) in itertools.pairwise(phases):
    total, texts, size = sum(weights), [], end - begin
    for number, (part, weight, most) in enumerate(zip(rows.parts, weights, most_off(weights), strict=True)):
      mine = np.concatenate([[0], np.cumsum((ids[:end] >= part.start) & (ids[:end] < part.stop))])
      inside, asked = mine[begin:] - mine[begin], weight / total
      window = min(_WINDOW, size)
      worst = np.abs((inside[window:] - inside[:-window]) / window - asked).max()
      texts.append(
        f'{inside[-1] / size:.4f} of {asked:.4f} ({mine[-1] / len(part):.2f} epochs, windows of {window} within '
        f'{worst:.4f})'
      )
      off = np.abs(inside - asked * np.arange(size + 1)).max()
      if off > most + _ROUNDING:
        faults.append(f'source {number}, from step {begin // batch_size:,} on: {off:.0f} rows away from its share')
    title = f'mixture from step {begin // batch_size:,}' if changes else 'mixture'
    lines.append(f'{title}, realized of asked: {"; ".join(texts)}')
  return lines, faults


def compare_with_run(batches: Batches, workdir: Path, say: Callable[[str], None]) -> list[str]:
  """Faults where a run recorded other batches than its config gives; names what its roll-backs skipped."""
  batches.rollbacks = rollback.read(workdir)
  for back, skipped in rollback.skipped(batches.rollbacks):
    say(
      f'{workdir}: batches {skipped.start:,} to {skipped.stop - 1:,} of the stream were skipped by a roll-back to step '
      f'{back.step:,} ({back.reason}): not read in this epoch, and no fault'
    )
  records = read_lines(workdir / 'metrics.jsonl')
  if not records:
    raise BadInput(f'{workdir}: no metrics.jsonl with steps to compare; train first')
  wrong = [r['step'] for r in records if batches.hash(r['step'] - 1) != r['batch_hash']]
  say(f'{workdir}: {len(records) - len(wrong)} of {len(records)} recorded batches are those of the replay')
  return [f'{workdir}: the batch of step {step} was another one' for step in wrong]
