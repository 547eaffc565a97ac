"""Comparisons measure both sides by the same rule, at the same cost."""

from functools import partial

import pytest

import tolerax
from benchmarks.derivative_free import running_best
from benchmarks.dfols import Evaluated
from benchmarks.frame import Settings
from benchmarks.published import MAID, Comparison, Peer, Rival, versus
from benchmarks.tuned import ours_at
from tolerax.problems.library import quadratic, tv_denoising

QUIET = Settings(tell=lambda line: None)
make = partial(quadratic, n=60, d=4)


def test_a_solver_beside_itself_costs_the_same():
    """Peers are looked at at 25 points of their run only, so theirs may be found a little later."""
    peers = {"self": Peer(tolerax.InexactLineSearch(), published=False)}
    row = versus(make, peers, seed=3, cost=400, settings=QUIET)
    rival = row.rivals["self"]
    assert rival.ours <= rival.cost
    assert row.ratio("self") > 0.5
    assert rival.loss == pytest.approx(row.loss(row.x), rel=1e-6)


def test_published_methods_run_and_reach_what_is_claimed_of_them():
    ready = make(3)
    row = versus(make, MAID, seed=3, cost=3000, settings=QUIET)
    rival = row.rivals["MAID 1"]
    assert float(ready.value(rival.x)) == pytest.approx(rival.loss, rel=1e-6)
    assert rival.loss < 0.5 * float(ready.value(ready.x0))
    assert rival.cost <= 3000 + 500


def test_the_ratio_is_that_of_the_member_with_the_lowest_loss():
    rivals = {
        "A slow": Rival(1.0, None, 100.0, 10.0),
        "A good": Rival(0.5, None, 200.0, 50.0),
        "B": Rival(0.1, None, 10.0, float("inf")),
    }
    row = Comparison(rivals, None, None)  # type: ignore[arg-type]
    assert row.ratio("A") == 0.25
    assert row.ratio("B") == float("inf")


def test_equal_cost_means_nothing_learnt_after_the_budget():
    ready = make(3)
    start = float(ready.value(ready.x0))
    assert float(ready.value(ours_at(ready, 1))) == pytest.approx(start)
    assert float(ready.value(ours_at(ready, 400))) < start


def test_running_best_keeps_the_costs_of_all_evaluations():
    ready = tv_denoising(0, 8, 2)
    trace = [
        Evaluated(5, ready.x0, ready.noisy, 1.0),
        Evaluated(9, ready.x0 + 1, ready.clean, 1.0),
        Evaluated(12, ready.x0 + 2, ready.noisy, 1.0),
    ]
    best = running_best(trace, ready)
    assert [one.cost for one in best] == [5, 9, 12]
    assert [float(one.x[0] - ready.x0[0]) for one in best] == [0.0, 1.0, 1.0]
