"""A blank matplotlib figure, and a figure as the bytes of a PNG."""

import io
from typing import Any


def blank(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
  """(a Figure of this size in inches, its axes as an array [rows, columns])."""
  from matplotlib.figure import Figure  # most of a second, which programs that draw nothing need not wait

  figure = Figure(figsize=size, layout='constrained')
  return figure, figure.subplots(rows, columns, squeeze=False, **options)


def png_of(figure: Any) -> bytes:
  png = io.BytesIO()
  figure.savefig(png, format='png', dpi=110)
  return png.getvalue()
