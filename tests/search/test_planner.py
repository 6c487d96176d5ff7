"""What a run chooses from, with costs and losses that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeprune.precision import CACHE_FORMATS, WEIGHT_FORMATS
from edgeprune.search.latency_table import LatencyCosts
from edgeprune.search.module_costs import ModuleCosts, additive
from edgeprune.search.planner import STEP, Planner
from edgeprune.search.search import corrected
from edgeprune.search.solve import Problem
from edgeprune.search.widths import CacheLosses, RoundingLosses, Sensitivities, Widths

DENSE = Widths(2, 2, 64)
LAYERS = 4


def planner(layout: str = "uniform", vocabularies: dict[int, float] | None = None) -> Planner:
    """Four layers; memory and decode grow with every width, prefill hardly; loss with what is removed."""
    groups, heads = np.arange(3)[:, None], np.arange(1, 3)
    attention = 1.0 - groups * heads / 4
    mlp = (1 - np.arange(65) / 64) ** 2
    depths = np.array([1.0, 0.6, 0.7, 1.2])
    sensitivities = Sensitivities(depths[:, None, None] * attention, depths[:, None] * mlp)
    costs = {
        name: additive(
            scale * (groups * heads)[None] * 1.0, scale * np.arange(65)[None] / 8.0, np.array([[[2.0, 0.01]]])
        )
        for name, scale in (("memory", 3.0), ("prefill", 0.01), ("decode", 1.0))
    }
    problem = Problem(DENSE, sensitivities, costs, 8, vocabularies or {100: 0.0})
    dense = {name: 10 * cost for name, cost in problem.estimate(problem.everything).items()}  # another scale
    latency = LatencyCosts(costs["prefill"], costs["decode"], {}, "test")
    return Planner(problem, layout, latency, corrected(problem.estimate, problem.everything, dense))


def dense_cost(plan: Planner) -> dict[str, float]:
    return plan.estimator.predict(plan.problem.everything)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_only_the_limit_that_binds_has_a_gain(layout: str) -> None:
    plan = planner(layout)
    cost = dense_cost(plan)
    limits = {"memory": 0.95 * cost["memory"], "decode": 0.6 * cost["decode"], "prefill": cost["prefill"]}
    chosen = plan.within(limits)
    assert all(plan.estimator.predict(chosen)[name] <= limit for name, limit in limits.items())
    gains = plan.gains(limits, chosen)
    assert gains["memory"] == gains["prefill"] == 0.0
    more = plan.within({**limits, "decode": limits["decode"] * (1 + STEP)})
    assert gains["decode"] == pytest.approx(chosen.loss - more.loss)
    assert gains["decode"] > 0


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_further_rungs_take_less_each_and_keep_the_vocabulary(layout: str) -> None:
    plan = planner(layout, {100: 0.0, 40: 0.01, 20: 0.5})
    limits = {"decode": 0.8 * dense_cost(plan)["decode"]}
    chosen = plan.within(limits)
    found = plan.smaller(chosen, limits, 3)
    costs = [plan.estimator.predict(rung)["decode"] for rung in [chosen, *found]]
    assert len(found) == 3
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 4
    assert {rung.vocab_size for rung in found} == {chosen.vocab_size}


def test_there_is_no_rung_below_the_smallest() -> None:
    plan = planner()
    assert plan.smaller(plan.problem.smallest, {"decode": 1.0}, 3) == []


def test_the_vocabulary_is_a_width_like_any_other() -> None:
    """A smaller one that costs little is taken before a layer is cut, one that costs much is not."""
    limits = {"decode": 0.985 * dense_cost(planner())["decode"]}
    cheap, dear = (planner(vocabularies={100: 0.0, 10: loss}).within(limits) for loss in (0.001, 9.0))
    assert cheap.vocab_size == 10
    assert dear.vocab_size == 100
    assert cheap.loss < dear.loss


def test_shares_of_a_frontier_descend_in_equal_steps_to_the_worst_loss() -> None:
    plan = planner("per-layer")
    shares = plan.shares("decode", 4, most_loss=1.0)
    assert shares == sorted(shares, reverse=True)
    assert np.allclose(np.diff(shares), shares[0] - 1)
    cost = dense_cost(plan)["decode"]
    assert plan.within({"decode": shares[-1] * cost}).loss <= 1.0
    lower = plan.within({"decode": (shares[-1] - 0.05) * cost})
    assert lower is None or lower.loss > 1.0


def test_corrections_move_what_fits() -> None:
    plan = planner()
    limits = {"decode": 0.7 * dense_cost(plan)["decode"]}
    before = plan.within(limits)
    slower = {name: 1.2 * value for name, value in plan.estimator.predict(before).items()}
    plan.estimator.correct(before, slower)
    after = plan.within(limits)
    assert after.loss > before.loss
    assert plan.estimator.predict(before)["decode"] == pytest.approx(slower["decode"])
    assert replace(plan, layout="per-layer").within(limits).loss <= after.loss + 1e-9


FORMATS = (None, WEIGHT_FORMATS["int8"], WEIGHT_FORMATS["int4-32"])


def planner_with_formats() -> Planner:
    """Bytes are halved and quartered by formats, for a small loss each; embedding and head take int8 alone."""
    groups, heads = np.indices((5, 2))
    attention, mlp = (groups * (heads + 1.0))[None], np.arange(65)[None] / 8.0
    shares = np.array([1.0, 0.5, 0.25])
    tables = np.full((3, 3, 2), np.inf)
    tables[0, 0], tables[1, 1] = (2.0, 0.1), (2.0, 0.05)
    memory = ModuleCosts(
        shares[:, None, None] * attention,
        shares[:, None] * mlp,
        np.zeros_like(attention[0]),
        np.zeros_like(mlp[0]),
        tables,
    )
    generator, layers = np.random.default_rng(0), 3
    losses = np.zeros((layers, 5, 2))
    losses[:, :, :] = 1.0 - 0.2 * np.arange(5)[:, None] + 0.1 * np.array([1.0, 0.0])
    losses[:, 4, 1] = 0.0
    roundings = {
        "int8": RoundingLosses(np.full(layers, 1e-4), np.full(layers, 1e-4), 0.0, 1e-4),
        "int4-32": RoundingLosses(0.02 * generator.random(layers), 0.02 * generator.random(layers), np.inf, np.inf),
    }
    sensitivities = Sensitivities(losses, np.linspace(1.0, 0.0, 65)[None].repeat(layers, 0), np.ones(3), roundings)
    problem = Problem(
        Widths(4, 2, 64), sensitivities, {"memory": memory}, 8, {100: 0.0}, FORMATS, (0, 1, 2), (0, 1), True
    )
    dense = problem.estimate(problem.everything)
    return Planner(problem, "uniform", None, corrected(problem.estimate, problem.everything, dense))


def test_precision_comes_before_pruning_and_the_levers_say_what_each_gave():
    planner = planner_with_formats()
    whole = planner.problem.estimate(planner.problem.everything)["memory"]
    limits = {"memory": 0.6 * whole}
    chosen = planner.solve(planner.estimator.room(limits))
    assert set(chosen.layers) == {planner.problem.dense}  # nothing is pruned
    levers = planner.levers(limits, chosen)
    saved = whole - planner.problem.estimate(chosen)["memory"]
    assert sum(part.saved_bytes for part in levers.parts) == pytest.approx(saved)
    assert sum(part.nats for part in levers.parts) == pytest.approx(chosen.loss)
    assert levers.precision_alone == pytest.approx(chosen.loss)
    assert levers.pruning_alone > 20 * levers.precision_alone
    assert "pruning" not in [part.name for part in levers.parts]


Q3, Q4 = WEIGHT_FORMATS["q3_k"], WEIGHT_FORMATS["q4_k"]


def planner_below_four_bits(ratio: float, layout: str) -> Planner:
    """Of every module 4 bits cost next to nothing, and 3 bits `ratio` times what as many bytes of channels cost."""
    formats, layers, nats = (None, Q4, Q3), 4, 1e-3  # nats of a channel, whose bytes in floats are 1
    shares = np.array([1.0, Q4.weight_bits / 16, Q3.weight_bits / 16])
    groups, heads = np.indices((3, 2))
    attention, mlp = 256.0 * groups * (heads + 1), np.arange(2049.0)
    tables = np.full((3, 3, 2), np.inf)
    tables[0, 0] = 0.0
    memory = ModuleCosts(shares[:, None, None] * attention, shares[:, None] * mlp, 0 * attention, 0 * mlp, tables)
    cut = np.full((layers, 3, 2), 9.0)
    cut[:, 2, 1] = 0.0
    of_channel = ratio * nats * (shares[1] - shares[2]) / shares[1]  # for the bytes of a channel that 3 bits save
    roundings = {
        "q4_k": RoundingLosses(np.full(layers, 1e-6), np.full(layers, 1e-6), np.inf, np.inf),
        "q3_k": RoundingLosses(np.full(layers, 1024 * of_channel), np.full(layers, 2048 * of_channel), np.inf, np.inf),
    }
    losses = Sensitivities(cut, nats * (2048 - np.arange(2049.0))[None].repeat(layers, 0), np.ones(3), roundings)
    problem = Problem(Widths(2, 2, 2048), losses, {"memory": memory}, 256, {0: 0.0}, formats, (0, 1, 2), (0,), True)
    dense = problem.estimate(problem.everything)
    return Planner(problem, layout, None, corrected(problem.estimate, problem.everything, dense))


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_below_four_bits_the_lever_of_less_loss_for_each_byte_is_taken(layout: str) -> None:
    for ratio, lever, other in ((0.7, "q3_k", "pruning"), (1.4, "pruning", "q3_k")):
        planner = planner_below_four_bits(ratio, layout)
        whole = planner.problem.estimate(planner.problem.everything)["memory"]
        in_three_bits = replace(planner.problem.everything, formats=((Q4, Q3),) * 4)  # the MLPs
        limits = {"memory": planner.problem.estimate(in_three_bits)["memory"]}
        chosen = planner.within(limits)
        parts = {part.name: part for part in planner.levers(limits, chosen).parts}
        assert set(parts) == {"q4_k", lever}, ratio
        assert other not in parts
        assert limits["memory"] < Q4.weight_bits / 16 * whole
        assert sum(part.saved_bytes for part in parts.values()) == pytest.approx(
            whole - planner.problem.estimate(chosen)["memory"]
        )
        assert parts[lever].nats > 0.9 * chosen.loss
        assert (Q3 in {form for pair in chosen.formats for form in pair}) == (lever == "q3_k")
        assert (set(chosen.layers) == {planner.problem.dense}) == (lever == "q3_k")


def test_formats_alone_are_no_better_than_a_choice_of_formats_that_leaves_room():
    planner = planner_with_formats()
    whole = planner.problem.estimate(planner.problem.everything)["memory"]
    chosen = planner.solve({"memory": 0.6 * whole})
    limits = {"memory": 0.7 * whole}
    assert planner.within(limits).loss < chosen.loss
    assert planner.levers(limits, chosen).precision_alone == pytest.approx(chosen.loss)


def test_beyond_the_fewest_bits_pruning_helps():
    planner = planner_with_formats()
    limits = {"memory": 0.25 * planner.problem.estimate(planner.problem.everything)["memory"]}
    chosen = planner.solve(planner.estimator.room(limits))
    assert chosen.loss < planner.problem.smallest.loss
    levers = planner.levers(limits, chosen)
    assert "pruning" in [part.name for part in levers.parts]
    assert levers.precision_alone is None
    assert levers.pruning_alone is None or levers.pruning_alone > chosen.loss


def test_the_cache_is_a_lever_of_its_own():
    """Half of an attention's bytes are those of the cache, a quarter of which int8 leaves."""
    planner = planner_with_formats()
    problem, int8 = planner.problem, CACHE_FORMATS["int8"]
    memory = problem.costs["memory"]
    smaller = replace(memory, attention=memory.attention * 0.625)
    losses = CacheLosses(np.full(3, 1e-4), 2.0)
    problem = replace(
        problem,
        sensitivities=replace(problem.sensitivities, caches={"int8": losses}),
        caches={None: problem.costs, int8: {"memory": smaller}},
        layer_formats=(0,),
        table_formats=(0,),
    )
    planner = replace(planner, problem=problem, estimator=replace(planner.estimator, estimate=problem.estimate))
    whole = problem.estimate(problem.everything)["memory"]
    limits = {"memory": 0.85 * whole}
    chosen = planner.within(limits)
    assert chosen.cache == int8
    assert set(chosen.layers) == {problem.dense}
    levers = planner.levers(limits, chosen)
    (part,) = levers.parts
    assert part.name == "KV cache in int8"
    assert part.saved_bytes == pytest.approx(whole - problem.estimate(chosen)["memory"])
    assert part.nats == pytest.approx(6e-4) == levers.precision_alone
    assert levers.pruning_alone > 20 * part.nats
