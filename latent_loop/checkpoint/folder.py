"""The folder `checkpoints` of a run: which steps it holds, what was left unfinished, what is set aside or deleted.

STEP/ is a step. STEP.unfinished stands beside it from before its save starts until its manifest is written, so that
a save that was killed is known from a step that lost its manifest. set_aside/ holds the damaged ones.
"""

from pathlib import Path

from etils import epath

from latent_loop.checkpoint import manifest
from latent_loop.config import CheckpointConfig
from latent_loop.errors import BadInput

_MARK, _ORBAX, _ASIDE = '.unfinished', '.orbax-checkpoint-tmp', 'set_aside'


class Folder:
  """Process 0 alone changes it."""

  def __init__(self, workdir: Path):
    self.path = epath.Path(workdir).absolute() / 'checkpoints'
    self.set_aside_path = self.path / _ASIDE
    if self.path.is_file():
      raise BadInput(f'{self.path}: a file, where the folder of the checkpoints belongs; move it away')

  def __truediv__(self, step: int | str) -> epath.Path:
    return self.path / str(step)

  def steps(self) -> list[int]:
    """Every step that is not known to be unfinished, ascending; some of them may be damaged."""
    names = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
    found = [int(name) for name in names if name.isdecimal() and name == str(int(name))]
    return sorted(s for s in found if f'{s}{_MARK}' not in names or self._has_manifest(s))

  def unfinished(self) -> list[int]:
    """Every step that a save works on, or was killed at."""
    names = [path.name.removesuffix(_MARK) for path in self.path.glob(f'*{_MARK}')] if self.path.exists() else []
    return sorted(int(name) for name in names if name.isdecimal() and not self._has_manifest(name))

  def _has_manifest(self, step: int | str) -> bool:
    return (self / step / manifest.NAME).exists()

  def begin(self, step: int) -> None:
    """Notes that a save of `step` starts."""
    self.path.mkdir(parents=True, exist_ok=True)
    self._mark(step).touch()

  def end(self, step: int | str) -> None:
    """Notes that `step` has its manifest."""
    self._mark(step).unlink(missing_ok=True)

  def _mark(self, step: int | str) -> epath.Path:
    return self.path / f'{step}{_MARK}'

  def clean_up(self) -> None:
    """Removes saves that a killed process left unfinished: nobody was told that they exist."""
    for path in list(self.path.iterdir()) if self.path.exists() else []:
      if _ORBAX in path.name:
        path.rmtree() if path.is_dir() else path.unlink()
    for path in list(self.path.iterdir()) if self.path.exists() else []:
      step = path.name.removesuffix(_MARK)
      if path.name.endswith(_MARK) and step.isdecimal():
        if (self / step).exists() and not self._has_manifest(step):
          (self / step).rmtree()
        self.end(step)

  def set_aside(self, step: int) -> epath.Path:
    """Moves a damaged step out of the way, where it can be looked at; returns the place."""
    self.set_aside_path.mkdir(exist_ok=True)
    taken = {path.name for path in self.list_set_aside()}
    name = next(name for i in range(len(taken) + 1) if (name := f'{step}-{i}') not in taken)
    (self / step).rename(self.set_aside_path / name)
    return self.set_aside_path / name

  def list_set_aside(self) -> list[epath.Path]:
    return sorted(self.set_aside_path.iterdir()) if self.set_aside_path.exists() else []

  def delete_old(self, cfg: CheckpointConfig, newest: int) -> None:
    """Deletes what `cfg` does not keep, once `newest` has its manifest; damaged steps stay for the next start."""
    finished = [step for step in self.steps() if step <= newest and self._has_manifest(step)]
    for step in finished[: -cfg.keep_last]:
      if not (cfg.keep_every_steps and step % cfg.keep_every_steps == 0):
        self.begin(step)  # killed here, what is left of it counts as unfinished
        (self / step / manifest.NAME).unlink()
        (self / step).rmtree()
        self.end(step)
