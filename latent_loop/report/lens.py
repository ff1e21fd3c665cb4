"""The page of a latent lens: one HTML file with its numbers, style and script; its table needs no script."""

import html
import json
import math
from pathlib import Path
from typing import Any

from latent_loop import storage
from latent_loop.metrics import finite

_HERE = Path(__file__).parent
# The browser itself refuses whatever the page would load from elsewhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write(path: Path, numbers: dict[str, Any]) -> None:
  """numbers: those of evals.lens.summarize. Raises OSError."""
  storage.write(path, _page(numbers))


def summary(numbers: dict[str, Any]) -> str:
  """When the tokens would have left and how their states move, as a sentence."""
  exits, depth, motions = numbers['exit'], numbers['depth'], numbers['motion']
  mean = sum(step or depth for step in exits) / len(exits)
  never = sum(step is None for step in exits)
  stay = f', {never} of them not before the end' if never else ''
  kinds = ', '.join(f'{motions.count(kind)} {kind}' for kind in sorted(set(motions), key=motions.count, reverse=True))
  return (
    f'A KL exit at {numbers["threshold"]:g} would have left its {len(exits)} tokens after {mean:.1f} of {depth} '
    f'iterations on average{stay}. At the end the states of the tokens are: {kinds}.'
  )


def _page(numbers: dict[str, Any]) -> str:
  name = html.escape(numbers['name'])
  text = html.escape(''.join(_plain(label) for label in numbers['prompt_labels'][1:]))
  # No prompt can end the script element early, and four digits are more than a picture shows.
  data = json.loads(json.dumps(finite(numbers)), parse_float=lambda number: float(f'{float(number):.4g}'))
  data = json.dumps(data, separators=(',', ':')).replace('<', '\\u003c')
  parts = {
    'policy': _POLICY,
    'name': name,
    'prompt': text,
    'summary': html.escape(summary(numbers)),
    'step': str(numbers['step']),
    'mean_depth': str(numbers['mean_depth']),
    'threshold': f'{numbers["threshold"]:g}',
    'depth': str(numbers['depth']),
    'seed': str(numbers['seed']),
    'style': (_HERE / 'lens.css').read_text(),
    'table': _table(numbers),
    'data': data,
    'script': (_HERE / 'lens.js').read_text(),
  }
  page = (_HERE / 'lens.html').read_text()
  before, *rest = page.split('{{')  # one pass: what a part brings in is not searched
  pieces = (piece.partition('}}') for piece in rest)
  return before + ''.join(parts[key] + after for key, _, after in pieces)


def _plain(label: str) -> str:
  """A label inside a line of text: a longer character once."""
  letter, _, place = label.partition(' ')
  return letter if not place or place.startswith('1/') else ''


def _table(numbers: dict[str, Any]) -> str:
  """Tokens down, iterations across, in each cell the likeliest next token."""
  steps = ''.join(f'<th scope="col">{i + 1}</th>' for i in range(numbers['depth']))
  head = '<tr><th scope="col">read</th><th scope="col">then</th>'
  rows = ''.join(_row(numbers, t) for t in range(len(numbers['tokens'])))
  return f'<thead>{head}<th scope="col">exit</th><th scope="col">states</th>{steps}</tr></thead><tbody>{rows}</tbody>'


def _row(numbers: dict[str, Any], t: int) -> str:
  tokens, shown, labels = numbers['tokens'], numbers['prompt_labels'], numbers['labels']
  follows, leaves = tokens[t + 1] if t + 1 < len(tokens) else None, numbers['exit'][t]
  cells = []
  for i, (best, p) in enumerate(zip(numbers['top'][t], numbers['top_p'][t], strict=True)):
    kinds = ' '.join(['hit'] * (best[0] == follows) + ['exit'] * (i + 1 == leaves))
    shade = f'{p[0]:.2f}' if math.isfinite(p[0]) else '0'
    kinds = f' class="{kinds}"' if kinds else ''
    cells.append(f'<td{kinds} style="--v:{shade}">{html.escape(labels[str(best[0])])}</td>')
  then = '' if follows is None else html.escape(shown[t + 1])
  return (
    f'<tr><th scope="row"><i>{t}</i> {html.escape(shown[t])}</th><td>{then}</td><td>{leaves or "never"}</td>'
    f'<td>{numbers["motion"][t]}</td>{"".join(cells)}</tr>\n'
  )
