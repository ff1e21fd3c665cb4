"""A grid's costs are exact, its budget holds, its law is found again, and a sweep that was cut off goes on."""

import json

import jax
import numpy as np
import pytest

from latent_loop import loop, sweep
from latent_loop.errors import BadInput
from latent_loop.exit_codes import DONE, PREEMPTED
from latent_loop.model import build, cost, depth
from latent_loop.sealing import to_json
from tests.tiny import B, D, K, T, tiny_config

STEP = B * T  # tokens


def test_flops_of_a_fixed_depth_are_steps_times_what_one_costs():
  base = tiny_config(**{'depth.kind': 'fixed', 'depth.mean': 5})
  (cell,) = sweep.grid(base, (), (), (7 * STEP,))
  counts = cost.count(build(base.model, base.depth), T)
  assert cell.tokens == 7 * STEP
  assert cell.flops == 7 * STEP * counts.train(5 - K, K)
  assert cell.parameters == counts.total_parameters


def test_flops_of_a_random_depth_are_those_of_the_depths_that_the_steps_draw():
  base = tiny_config()
  (cell,) = sweep.grid(base, (), (), ())
  counts = cost.count(build(base.model, base.depth), T)
  drawn = [depth.draw(base.depth, jax.random.key(base.seed), step) for step in range(base.train.num_steps)]
  assert len({int(n) for n, _ in drawn}) > 3
  assert cell.flops == STEP * sum(counts.train(int(n), int(k)) for n, k in drawn)


def test_grid_has_every_combination_once_cheapest_first():
  cells = sweep.grid(tiny_config(), (D, 2 * D), (2, 6), (2 * STEP, 3 * STEP + 1, 3 * STEP))
  assert sorted(sweep.name_of(cell) for cell in cells) == sorted(
    f'w{width}_d{mean}_s{steps}' for width in (D, 2 * D) for mean in (2, 6) for steps in (2, 3)
  )
  assert [cell.flops for cell in cells] == sorted(cell.flops for cell in cells)
  wide = next(cell.config for cell in cells if cell.config.model.width == 2 * D)
  base = tiny_config()
  assert (wide.model.head_dim, wide.model.mlp_dim) == (base.model.head_dim, 2 * base.model.mlp_dim)
  assert {cell.config.depth.backprop_depth for cell in cells} == {2, K}


@pytest.mark.parametrize(
  ('widths', 'tokens', 'named'), [((D + 1,), (), f'--width={D + 1}'), ((0,), (), '--width=0'), ((), (3,), '--tokens=3')]
)
def test_a_grid_that_cannot_be_is_refused(widths, tokens, named):
  with pytest.raises(BadInput, match=named):
    sweep.grid(tiny_config(), widths, (), tokens)


def test_budget_holds_and_leaves_out_the_dearest():
  cells = sweep.grid(tiny_config(), (), (2, 4, 6), (2 * STEP,))
  exactly = cells[0].flops + cells[1].flops
  assert sweep.within(cells, exactly) == (cells[:2], cells[2:])
  assert sweep.within(cells, exactly - 1) == (cells[:1], cells[1:])
  with pytest.raises(BadInput, match='cheapest run'):
    sweep.within(cells, cells[0].flops - 1)


def _results(noise: float) -> list[dict]:
  rng = np.random.default_rng(5)
  return [
    {
      'parameters': n,
      'tokens': t,
      'mean_depth': 4,
      'loss': 9 * n**-0.07 * t**-0.11 * float(np.exp(noise * rng.standard_normal())),
    }
    for n in (10_000, 30_000, 100_000)
    for t in (1e5, 4e5, 9e5)
  ]


def test_law_is_found_again_and_noise_widens_it():
  exact, noisy = sweep.fit(_results(0)), sweep.fit(_results(0.02))
  assert set(exact['law']) == {'parameters', 'tokens'}  # the depth does not vary, so it has no exponent
  for name, exponent in (('parameters', -0.07), ('tokens', -0.11)):
    assert exact['law'][name]['exponent'] == pytest.approx(exponent, abs=1e-9)
    assert exact['law'][name]['high'] - exact['law'][name]['low'] < 1e-9
    assert noisy['law'][name]['low'] < exponent < noisy['law'][name]['high']
  assert exact['constant'] == pytest.approx(9)
  assert exact['error'] < 1e-9 < 1e-3 < noisy['error'] < 0.1


def test_too_few_runs_have_no_law():
  assert sweep.fit(_results(0)[:3]) is None
  assert sweep.fit(_results(0)[:1]) is None


def test_a_run_that_was_made_under_another_law_is_not_taken_for_this_one(tmp_path, monkeypatch):
  """Its loss would stand beside the price of another; where it runs, and on how many devices, may change."""
  monkeypatch.setattr(loop, 'run', lambda config, place: pytest.fail('it began'))
  cells = sweep.grid(tiny_config(), (), (2, 4), ())
  (tmp_path / sweep.name_of(cells[1])).mkdir()
  (tmp_path / sweep.name_of(cells[1]) / 'config.json').write_text(to_json(cells[1].config))
  for changed in ({'depth.backprop_depth': 1}, {'eval.num_batches': 3}):
    with pytest.raises(BadInput, match=f'belongs to another config: {next(iter(changed))} was'):
      list(sweep.run(sweep.grid(tiny_config(**changed), (), (2, 4), ()), tmp_path))
  monkeypatch.setattr(loop, 'run', lambda config, place: PREEMPTED)
  assert len(list(sweep.run(sweep.grid(tiny_config(**{'mesh.fsdp': 2}), (), (2, 4), ()), tmp_path))) == 1


def test_sweep_ends_where_a_run_is_cut_off_and_goes_on(tmp_path, monkeypatch):
  cells = sweep.grid(tiny_config(), (), (2, 4, 6), ())
  ends = {sweep.name_of(cell): [DONE] for cell in cells}
  ends[sweep.name_of(cells[1])].insert(0, PREEMPTED)
  ran = []

  def train(config, place):
    ran.append(place.name)
    place.mkdir(exist_ok=True)
    loss = {str(config.depth.mean): 3 - config.depth.mean / 10}
    (place / 'depth_report.json').write_text(json.dumps({'loss_by_depth': loss}))
    return ends[place.name].pop(0)

  monkeypatch.setattr(loop, 'run', train)
  codes = [code for _, code, _ in sweep.run(cells, tmp_path)]
  assert codes == [DONE, PREEMPTED]
  ends[sweep.name_of(cells[0])] = [DONE]  # what loop.run answers for a run that has ended
  results = [result for _, _, result in sweep.run(cells, tmp_path)]
  assert [r['mean_depth'] for r in results] == [2, 4, 6]
  assert [r['loss'] for r in results] == [2.8, 2.6, 2.4]
  assert ran == [sweep.name_of(cells[i]) for i in (0, 1, 0, 1, 2)]
