"""The figure of launch.bench depth: seconds, memory and bytes between devices over n and k, against predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

from latent_loop.report import canvas


def png_of(lines: Sequence[Mapping[str, Any]]) -> bytes:
  """Points are measured, lines predicted; of the JSON lines of one call, or of several on one machine."""
  points = sorted((line for line in lines if line['mode'] == 'depth'), key=lambda line: line['n'])
  figure, axes = canvas.blank(1, 3, (16, 4.8))
  seconds, memory, sent = axes[0]
  for i, k in enumerate(sorted({point['k'] for point in points})):
    its = [point for point in points if point['k'] == k]
    n, color = [point['n'] for point in its], f'C{i}'
    seconds.plot(n, [point['seconds_median'] for point in its], 'o', color=color, label=f'k = {k}')
    seconds.plot(n, [point['predicted_seconds'] for point in its], color=color, linewidth=1)
    mib = lambda name, its=its: [point[name] / 2**20 for point in its]
    if all(point['measured_temporary_bytes'] is not None for point in its):
      memory.plot(n, mib('measured_temporary_bytes'), 'o', color=color, label=f'k = {k}')
    memory.plot(n, mib('temporary_bytes'), color=color, linewidth=1)
    for mode, style in zip(its[0]['sent_bytes'], ('-', '--', ':'), strict=False):
      label = mode if i == 0 else None
      sent.plot(n, [point['sent_bytes'][mode] / 2**20 for point in its], style, color=color, label=label)
  seconds.set(xlabel='n, iterations without gradient', ylabel='seconds per step', title='time: points measured')
  memory.set(xlabel='n', ylabel='MiB of temporaries', title="memory: points measured, lines the compiler's")
  devices = points[0]['sent_devices']
  sent.set(xlabel='n', ylabel='MiB sent per device and step', title=f'collectives of the program for {devices} devices')
  for panel in axes[0]:
    panel.set_ylim(bottom=0)
    if panel.get_legend_handles_labels()[0]:
      panel.legend(fontsize='small')
  return canvas.png_of(figure)
