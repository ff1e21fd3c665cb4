"""The figure of studies: what each variant reaches by test-time depth, over its seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

from latent_loop.report import canvas


def png_of(studies: Sequence[Mapping[str, Any]]) -> bytes:
  """A panel for each study.json: the mean over seeds of each variant, and the range of its seeds."""
  figure, axes = canvas.blank(1, len(studies), (8 * len(studies), 5))
  for panel, study in zip(axes[0], studies, strict=True):
    _draw(panel, study['study'], study['runs'])
  return canvas.png_of(figure)


def _draw(axes: Any, name: str, runs: Sequence[Mapping[str, Any]]) -> None:
  """Accuracy of a task, else loss."""
  is_task = runs[0]['chance_accuracy'] is not None
  key, label = ('accuracy_by_depth', 'accuracy') if is_task else ('loss_by_depth', 'validation loss, nats per token')
  depths = sorted({int(depth) for run in runs for depth in run[key]})
  for i, variant in enumerate(dict.fromkeys(run['variant'] for run in runs)):
    its = [run for run in runs if run['variant'] == variant]
    shown = [depth for depth in depths if all(str(depth) in run[key] for run in its)]
    by_depth = [[run[key][str(depth)] for run in its] for depth in shown]
    means = [sum(values) / len(values) for values in by_depth]
    (line,) = axes.plot(shown, means, marker='osv^D'[i % 5], ms=4, label=variant)
    axes.fill_between(shown, [min(v) for v in by_depth], [max(v) for v in by_depth], alpha=0.15, color=line.get_color())
  if is_task:
    axes.axhline(runs[0]['chance_accuracy'], color='gray', linestyle=':', label='chance')
  axes.set_xscale('log', base=2)
  axes.set_xticks(depths, [str(depth) for depth in depths])
  axes.set(xlabel='test-time depth', ylabel=label, title=f'{name}: {len({run["seed"] for run in runs})} seeds')
  axes.legend(fontsize='small')
