"""The figure of sweeps: loss over training FLOPs by width and mean depth, and the law that was fitted."""

from collections.abc import Mapping, Sequence
from typing import Any

from latent_loop.report import canvas


def png_of(sweeps: Sequence[Mapping[str, Any]]) -> bytes:
  """A panel for each sweep.json; a line joins runs of one shape that differ in their tokens."""
  figure, axes = canvas.blank(1, len(sweeps), (8 * len(sweeps), 5))
  for panel, sweep in zip(axes[0], sweeps, strict=True):
    _draw(panel, sweep['runs'], sweep['law'])
  return canvas.png_of(figure)


def _draw(axes: Any, runs: Sequence[Mapping[str, Any]], law: Mapping[str, Any] | None) -> None:
  if not runs:
    raise ValueError('no runs')
  depths = sorted({run['mean_depth'] for run in runs})
  widths = sorted({run['width'] for run in runs})
  for width in widths:
    for depth in depths:
      its = sorted((r for r in runs if (r['width'], r['mean_depth']) == (width, depth)), key=lambda r: r['tokens'])
      color, marker = f'C{depths.index(depth)}', 'osv^D'[widths.index(width) % 5]
      if its:
        x, y = [run['training_flops'] for run in its], [run['loss'] for run in its]
        axes.plot(x, y, color=color, marker=marker, label=f'width {width}, mean depth {depth}')
  title = 'too few runs for a law'
  if law:
    terms = (f'{name}^{e["exponent"]:.3f} ({e["low"]:.3f} to {e["high"]:.3f})' for name, e in law['law'].items())
    title = 'loss ~ ' + ' x '.join(terms) + f'\n{law["runs"]} runs; one left out is predicted to {law["error"]:.1%}'
  axes.set_xscale('log')
  axes.set_yscale('log')
  axes.set(xlabel='training FLOPs', ylabel='validation loss at the mean depth, nats per token')
  axes.set_title(title, fontsize='small')
  axes.legend(fontsize='small')
