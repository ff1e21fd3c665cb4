"""A trained model, loaded from the folder of its run, and what one evaluates it on."""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from latent_loop import data, storage
from latent_loop.batch import Batch
from latent_loop.checkpoint import Checkpoints
from latent_loop.config import Config, MeshConfig
from latent_loop.data.pipeline import Batches
from latent_loop.errors import BadInput
from latent_loop.evals import depth as depth_eval
from latent_loop.inference.engine import Engine
from latent_loop.inference.text import request_of, text_of
from latent_loop.metrics import read_lines
from latent_loop.model import Model, Params, build
from latent_loop.optim import make_optimizer
from latent_loop.parallel import memory, sharding
from latent_loop.parallel import mesh as meshes
from latent_loop.report import depth_report
from latent_loop.step import TrainState, make_sharded_state
from latent_loop.storage import Path
from latent_loop.tokenizer import Bytes, Tokenizer
from latent_loop.trust import guards
from latent_loop.workdir import read_config

VALIDATION_SEED = 0  # one order of the validation rows and one noise for every run


@dataclasses.dataclass(frozen=True)
class Trained:
  """params: the moving average where the run keeps one."""

  config: Config
  model: Model
  params: Params
  mesh: Mesh
  step: int


def load(workdir: Path, tensor: int = 1) -> Trained:
  """The newest checkpoint of `workdir` on the devices of this machine, whatever mesh it was trained on.

  tensor: so many devices share each layer; the groups of them share the rows.
  Raises BadInput when there is none or it does not fit its config. Only reads: the run may be going on.
  """
  return load_on(workdir, meshes.make_mesh(MeshConfig(tensor=tensor)))


def load_on(workdir: Path, mesh: Mesh) -> Trained:
  """As `load`, on the devices of `mesh`; every process of it has to call it."""
  config = read_config(workdir)
  model = build(config.model, config.depth)
  init, specs = make_sharded_state(config, model, make_optimizer(config.optim, config.train.num_steps), mesh)
  with Checkpoints(workdir, config.checkpoint, read_only=True) as checkpoints:
    found = checkpoints.restore_newest(jax.eval_shape(init), specs, fingerprint=None, only=('params', 'ema'))
  if found is None:
    raise BadInput(f'{checkpoints.folder.path}: no checkpoint yet; train for at least one save interval first')
  step, state = found
  return Trained(config, model, state.averaged_params, mesh, step)


def first_state(config: Config, params: Params, mesh: Mesh) -> TrainState:
  """Step 0 as the trainer makes it, these parameters, arrays of the host or the devices, in the place of drawn ones."""
  model, optimizer = build(config.model, config.depth), make_optimizer(config.optim, config.train.num_steps)
  init, specs = make_sharded_state(config, model, optimizer, mesh)
  memory.check_state(jax.eval_shape(init), specs)

  def around(params):
    ema = params if config.optim.ema_decay else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), ema, guards.Skips.none())

  with jax.set_mesh(mesh):
    return jax.jit(around, out_shardings=specs)(jax.device_put(params, specs.params))


def _blocks(mesh: Mesh) -> tuple[list[int], int]:
  """(the blocks of rows that this process's devices hold, ascending; how many blocks the mesh makes)."""
  ways = math.prod(mesh.shape[axis] for axis in sharding.BATCH[0])
  held = NamedSharding(mesh, sharding.BATCH).addressable_devices_indices_map((ways,)).values()
  return sorted({rows.indices(ways)[0] for (rows,) in held}), ways


def rows_here(batch_size: int, mesh: Mesh) -> list[int]:
  """Which rows of a global batch this process feeds: those that its devices hold, whatever their order in the mesh."""
  blocks, ways = _blocks(mesh)
  size = batch_size // ways
  return [block * size + i for block in blocks for i in range(size)]


def place(batch: Batch, mesh: Mesh) -> Batch:
  """A process's rows, those of `rows_here`, as its part of the global batch on the mesh."""
  blocks, ways = _blocks(mesh)

  def one(x):
    size = x.shape[0] // len(blocks)
    at = {block * size: i * size for i, block in enumerate(blocks)}

    def part(index):
      first = at[index[0].indices(size * ways)[0]]
      return x[first : first + size]

    return jax.make_array_from_callback((size * ways, *x.shape[1:]), NamedSharding(mesh, sharding.BATCH), part)

  return jax.tree.map(one, batch)


def validation_batches(config: Config, mesh: Mesh, source: data.Source) -> tuple[Batches, int]:
  """(validation batches of a microbatch each, how many make config.eval.num_batches); raises BadInput."""
  passes = config.train.num_microbatches
  meshes.check_batch(config.train.batch_size, passes, mesh.shape)
  size = config.train.batch_size // passes
  rows, together = source.rows('validation'), config.data.documents == 'together'
  batches = Batches(rows, VALIDATION_SEED, size, rows_here(size, mesh), together=together)
  return batches, config.eval.num_batches * passes


def make_evaluator(
  config: Config, model: Model, mesh: Mesh, source: data.Source, depths: tuple[int, ...]
) -> Callable[[Params, int], dict[str, Any]]:
  """(params, step) -> numbers by depth over config.eval.num_batches validation batches; compiles once.

  The keys of the numbers are those of depth_report.json, without bits per byte where tokens are no bytes. It reads a
  microbatch at a time, so what fits in training fits here. Raises BadInput when that does not divide over the mesh.
  """
  batches, count = validation_batches(config, mesh, source)
  evaluate = depth_eval.make_depth_eval(model, mesh, depths, config.train.loss_chunk)

  def numbers(params: Params, step: int) -> dict[str, Any]:
    means = None
    for i in range(count):
      key = jax.random.fold_in(jax.random.key(VALIDATION_SEED), i)
      # Awaited each time: many steps in flight deadlock on virtual CPU devices.
      new = jax.block_until_ready(evaluate(params, place(batches.batch(i), mesh), key))
      means = new if means is None else means + new
    found = depth_eval.summarize(means, depths)
    if source.vocab_size != Bytes.vocab_size:
      del found['bits_per_byte_by_depth']
    return {'step': step, 'mean_depth': config.depth.mean, 'chance_accuracy': source.chance_accuracy, **found}

  return numbers


def write_depth_report(trained: Trained, workdir: Path, numbers: dict[str, Any]) -> list[Path]:
  """depth_report.json, .png and .html in the run's folder."""
  curve = read_lines(workdir / 'metrics.jsonl')
  return depth_report.write(workdir, trained.config.name, numbers, curve)


def tokenizer_of(config: Config) -> Tokenizer | None:
  """None where the model does not know its tokens: text is bytes to a checkpoint of others without tokenizer.json."""
  tokenizer = data.make_tokenizer(config.data)
  return tokenizer if tokenizer.bos < config.model.vocab_size else None


def engine_of(trained: Trained, cache: str = 'full', **options: Any) -> Engine:
  """Options as in Engine; rows may be four times as long and deep as in training, 4096 tokens or iterations anyway."""
  limits = {
    'most_tokens': max(4096, 4 * trained.config.data.seq_len),
    'most_depth': depth_eval.deepest(trained.config.depth.mean),
  }
  return Engine(trained.model, trained.params, trained.mesh, cache, **limits, **options)


def write_samples(trained: Trained, workdir: Path, prompts: list[str]) -> Path:
  """samples.txt: the same prompts at depth 1, the mean and twice the mean, at temperature 0.7.

  Every process has to call it; the first one writes. Raises SaveFailed.
  """
  config, parts = trained.config, []
  options = {'max_new_tokens': config.eval.sample_tokens, 'temperature': 0.7, 'seed': config.seed}
  depths = sorted({1, config.depth.mean, 2 * config.depth.mean})
  asked = [(depth, prompt) for depth in depths for prompt in prompts]
  # All depths side by side, over a cache that takes the memory of one: the end of a long run is no place to run out.
  engine = Engine(trained.model, trained.params, trained.mesh, cache='ring:1')
  tokenizer = data.make_tokenizer(config.data)
  answers = engine.answer([request_of(tokenizer, prompt, depth=depth, **options) for depth, prompt in asked])
  for (depth, prompt), answer in zip(asked, answers, strict=True):
    parts.append(f'--- depth {depth} --- {json.dumps(prompt)}\n{prompt}{text_of(tokenizer, answer)[0]}\n')
  path = workdir / 'samples.txt'
  if jax.process_index() == 0:
    with storage.full_disk_in_words(path):
      storage.write(path, '\n'.join(parts))
  return path
