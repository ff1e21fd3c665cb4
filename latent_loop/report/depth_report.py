"""The depth report of a run: one self-contained HTML page, one PNG, and the same numbers as JSON."""

import base64
import html
import json
from typing import Any

from latent_loop import storage
from latent_loop.metrics import finite
from latent_loop.report import canvas
from latent_loop.storage import Path

COLUMNS = (
  ('loss_by_depth', 'loss, nats per token', '.4f'),
  ('bits_per_byte_by_depth', 'bits per byte', '.4f'),
  ('accuracy_by_depth', 'accuracy', '.3f'),
  ('residual_by_depth', 'residual', '.2e'),
  ('kl_to_deepest_by_depth', 'KL to deepest', '.2e'),
  ('token_correlation_by_depth', 'token correlation', '.3f'),
)


_CURVE = {'loss': (float, type(None)), 'n': int, 'k': int}  # what is drawn of a line of metrics.jsonl
_DEEPEST_BIN = 256  # takes what is deeper, too


def write(workdir: Path, name: str, numbers: dict[str, Any], curve: list[dict[str, Any]]) -> list[Path]:
  """Writes depth_report.{html,png,json} and returns their paths; raises SaveFailed."""
  png = canvas.png_of(_draw(numbers, curve))
  paths = [workdir / f'depth_report.{suffix}' for suffix in ('html', 'png', 'json')]
  contents = _page(name, numbers, png), png, json.dumps(finite(numbers), indent=2) + '\n'
  for path, content in zip(paths, contents, strict=True):  # the JSON last: it says that a run is finished
    with storage.full_disk_in_words(path):
      storage.write(path, content)
  return paths


def _draw(numbers: dict[str, Any], curve: list[dict[str, Any]]) -> Any:
  """A matplotlib Figure."""
  figure, axes = canvas.blank(2, 2, (11, 7.5))
  mean = numbers['mean_depth']
  is_task = numbers['chance_accuracy'] is not None
  key, label = ('accuracy_by_depth', 'accuracy') if is_task else ('loss_by_depth', 'validation loss, nats per token')
  _by_depth(axes[0, 0], numbers[key], mean, label)
  if is_task:
    axes[0, 0].axhline(numbers['chance_accuracy'], color='gray', linestyle=':', label='chance')
    axes[0, 0].set_ylim(0, 1.02)
  axes[0, 0].legend()
  _by_depth(axes[0, 1], numbers['residual_by_depth'], mean, 'residual |s_r - s_(r-1)| / |s_r|')
  axes[0, 1].set_yscale('log')
  curve = [record for record in curve if all(isinstance(record.get(name), kind) for name, kind in _CURVE.items())]
  steps = [record['step'] for record in curve]
  axes[1, 0].plot(steps, [record['loss'] for record in curve], linewidth=0.8)
  axes[1, 0].set(xlabel='step', ylabel='training loss, nats per token', title='training curve')
  depths = [min(record['n'] + record['k'], _DEEPEST_BIN) for record in curve]
  axes[1, 1].hist(depths, bins=range(1, max(depths, default=1) + 2), align='left', rwidth=0.9)
  axes[1, 1].set(xlabel='iterations n + k', ylabel='logged steps', title='depths drawn')
  return figure


def _by_depth(axes: Any, values: dict[str, float], mean: int, label: str) -> None:
  depths = [int(depth) for depth in values]
  axes.plot(depths, list(values.values()), marker='o')
  axes.axvline(mean, color='tab:orange', linestyle='--', linewidth=1, label=f'mean depth {mean}')
  axes.set_xscale('log', base=2)
  axes.set_xticks(depths, [str(depth) for depth in depths])
  axes.set(xlabel='test-time depth', ylabel=label, title=label)


def _page(name: str, numbers: dict[str, Any], png: bytes) -> str:
  depths = list(numbers['loss_by_depth'])
  columns = [column for column in COLUMNS if column[0] in numbers]
  header = ''.join(f'<th>{html.escape(title)}</th>' for _, title, _ in columns)
  rows = ''.join(
    f'<tr><td>{depth}</td>' + ''.join(f'<td>{numbers[key][depth]:{form}}</td>' for key, _, form in columns) + '</tr>'
    for depth in depths
  )
  chance = numbers['chance_accuracy']
  note = '' if chance is None else f' Guessing would be right {chance:.1%} of the time.'
  image = base64.b64encode(png).decode()
  return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}: depth report</title>
<style>body{{font:16px system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
table{{border-collapse:collapse;width:100%}}td,th{{padding:.3rem .6rem;border-bottom:1px solid #ccc;text-align:right}}
img{{width:100%}}</style></head><body>
<h1>{html.escape(name)}: what depth buys</h1>
<p>Validation data, step {numbers['step']}. One model, read at several test-time depths in one unroll; the mean
depth in training was {numbers['mean_depth']}.{note}</p>
<img alt="loss, residual, training curve and drawn depths" src="data:image/png;base64,{image}">
<table><tr><th>depth</th>{header}</tr>{rows}</table>
<p>Residual: how much the last iteration still moved the raw state, relative to its length. KL to deepest: how far the
prediction is from the one at the deepest depth here. Token correlation near 1 means collapsed states.</p>
</body></html>
"""
