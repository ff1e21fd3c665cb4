"""The figure of a study: what each variant reaches by test-time depth, over its seeds."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from latent_loop.storage import Path


def draw(path: Path, name: str, runs: Sequence[Mapping[str, Any]]) -> None:
  """A PNG: the mean over seeds of each variant, and the range of its seeds; accuracy of a task, else loss."""
  from matplotlib.figure import Figure  # most of a second, which programs that draw nothing need not wait

  is_task = runs[0]['chance_accuracy'] is not None
  key, label = ('accuracy_by_depth', 'accuracy') if is_task else ('loss_by_depth', 'validation loss, nats per token')
  figure = Figure(figsize=(8, 5), layout='constrained')
  axes = figure.subplots()
  depths = sorted({int(depth) for run in runs for depth in run[key]})
  for variant in dict.fromkeys(run['variant'] for run in runs):
    its = [run for run in runs if run['variant'] == variant]
    shown = [depth for depth in depths if all(str(depth) in run[key] for run in its)]
    by_depth = [[run[key][str(depth)] for run in its] for depth in shown]
    (line,) = axes.plot(shown, [sum(values) / len(values) for values in by_depth], marker='o', ms=3, label=variant)
    axes.fill_between(shown, [min(v) for v in by_depth], [max(v) for v in by_depth], alpha=0.15, color=line.get_color())
  if is_task:
    axes.axhline(runs[0]['chance_accuracy'], color='gray', linestyle=':', label='chance')
  axes.set_xscale('log', base=2)
  axes.set_xticks(depths, [str(depth) for depth in depths])
  axes.set(xlabel='test-time depth', ylabel=label, title=f'{name}: {len({run["seed"] for run in runs})} seeds')
  axes.legend(fontsize='small')
  png = io.BytesIO()
  figure.savefig(png, format='png', dpi=110)
  path.write_bytes(png.getvalue())
