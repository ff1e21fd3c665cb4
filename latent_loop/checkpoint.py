"""All of Orbax: asynchronous saves of the whole train state, and exact restores.

A step folder holds `state` (arrays) and `meta` (JSON): the sealed config, the data fingerprint and the
shape and dtype of every array, since Orbax casts a wrong dtype without a word.
"""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from latent_loop.config import CheckpointConfig
from latent_loop.errors import BadInput
from latent_loop.parallel.sharding import path_of

FORMAT = 1  # 1: first


class Checkpoints:
  """The checkpoints of one workdir. Close it: a save may still be under way.

  read_only: another process may be writing here, so leave its unfinished saves alone.
  """

  def __init__(self, workdir: Path, cfg: CheckpointConfig, read_only: bool = False):
    keep = ocp.training.preservation_policies
    policies = [keep.LatestN(cfg.keep_last)]
    if cfg.keep_every_steps:
      policies.append(keep.EveryNSteps(cfg.keep_every_steps))
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name='meta')
    context = ocp.Context()
    context.checkpointables.registry = registry
    self.directory = (workdir / 'checkpoints').absolute()
    if read_only and not self.directory.is_dir():
      raise BadInput(f'{self.directory}: no checkpoint yet; train for at least one save interval first')
    self._orbax = ocp.training.Checkpointer(
      str(self.directory),
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=keep.AnyPreservationPolicy(policies),
      context=context,
      cleanup_tmp_directories=not read_only,
    )

  def latest_step(self) -> int | None:
    latest = self._orbax.latest
    return None if latest is None else latest.step

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Starts a save and returns; an earlier save's failure is raised here or in close()."""
    meta = {'format': FORMAT, 'step': step, 'arrays': describe(state), **meta}
    self._orbax.save_checkpointables_async(step, {'state': state, 'meta': meta})

  def restore(self, step: int, shapes: Any, specs: Any, fingerprint: str | None, only: tuple[str, ...] = ()) -> Any:
    """The train state at `step`, laid out by `specs`; with `only`, just the arrays under these names.

    Raises BadInput when its arrays or its data are not those of this run: names the first difference.
    """
    path = self.directory / str(step)
    meta = self._load(step, {'meta': None})['meta']
    stored, wanted = meta['arrays'], describe(shapes)
    for name in sorted(stored.keys() | wanted.keys()):
      here, there = wanted.get(name, 'absent'), stored.get(name, 'absent')
      if here != there:
        raise BadInput(
          f'{path}: array {name} is {there} in the checkpoint and {here} in this config; '
          'continue with the config of the run, or start a new workdir'
        )
    if fingerprint is not None and meta['data_fingerprint'] != fingerprint:
      raise BadInput(
        f'{path}: the data changed since the run began (fingerprint {meta["data_fingerprint"]} then, {fingerprint} '
        'now), so it cannot continue exactly; restore the data and the Python version, or start a new workdir'
      )

    def target(keypath, a, spec):
      wanted = not only or path_of(keypath).split('/')[0] in only
      return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=spec) if wanted else ocp.PLACEHOLDER

    return self._load(step, {'state': jax.tree_util.tree_map_with_path(target, shapes, specs)})['state']

  def _load(self, step: int, target: dict[str, Any]) -> dict[str, Any]:
    path = self.directory / str(step)
    try:
      loaded = self._orbax.load_checkpointables(step, target)
      if 'meta' in loaded and (not isinstance(loaded['meta'], dict) or loaded['meta'].get('format') != FORMAT):
        raise ValueError(f'meta is not of format {FORMAT}')
      return loaded
    except (ocp.errors.InvalidLayoutError, OSError, KeyError, ValueError) as error:
      reason = ' '.join(str(error).split())[:200]
      raise BadInput(
        f'{path}: unreadable checkpoint ({type(error).__name__}: {reason}); '
        'move this folder away and start again to use the one before it'
      ) from error

  def close(self) -> None:
    """Waits for the save under way; raises if it failed."""
    self._orbax.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def describe(tree: Any) -> dict[str, str]:
  """path -> 'float32[128,384]' for every array of `tree`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_of(path): f'{leaf.dtype}{list(leaf.shape)}'.replace(' ', '') for path, leaf in leaves}
