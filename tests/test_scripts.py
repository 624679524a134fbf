"""The pieces of the benchmarks, on a tiny network."""

from __future__ import annotations

import json
import statistics
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import count_reads, make_images, tiny_config
from torch import nn

from autocompress.conductor import annealing_length
from autocompress.errors import ConfigError
from autocompress.evaluation import evaluate, metric_drop
from autocompress.loaders import ArrayLoader, calibration_loader
from autocompress.progress import NullDisplay
from autocompress.quantization import Quantizer, calibration_batches
from autocompress.task import Task
from autocompress.training import Recipe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import arena as ground  # noqa: E402
import bench_finetune  # noqa: E402
import bench_impact  # noqa: E402
import bench_importance  # noqa: E402
import bench_peers  # noqa: E402
import bench_quantization  # noqa: E402
import bench_sampler  # noqa: E402
import bench_search  # noqa: E402
import opponents  # noqa: E402


@pytest.fixture
def arena(tmp_path: Path, task: Task) -> ground.Arena:
    config = tiny_config(tmp_path, trials=4, annealing_trials=0, **{"finetune.epochs": 0.5})
    return ground.make_arena(config, task, NullDisplay())


FAMILIES = {
    "uniform svd": lambda a: opponents.uniform(a, "svd"),
    "uniform tt": lambda a: opponents.uniform(a, "tt"),
    "allocator": opponents.allocator,
    "allocator, channels too": lambda a: opponents.allocator(a, channels=True),
    "vbmf": opponents.tucker_vbmf,
    "alds": opponents.alds,
    "pruning": opponents.pruning,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_smaller_dial_never_costs_more_and_every_network_runs(
    name: str, arena: ground.Arena
) -> None:
    before = {k: v.clone() for k, v in arena.baseline.model.state_dict().items()}
    make = FAMILIES[name](arena)
    models = [make(dial) for dial in (0.1, 0.3, 0.6, 1.0)]
    shares = [arena.share(model) for model in models]
    assert shares == sorted(shares)
    assert shares[0] < 0.6 and shares[0] < shares[-1] <= 1.0
    for model in models:
        assert model(torch.randn(2, 1, 8, 8)).shape == (2, 4)
    after = arena.baseline.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_vbmf_finds_the_rank_under_noise(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(40, rank, generator=generator)
    right = torch.randn(rank, 150, generator=generator)
    matrix = left @ right + 0.5 * torch.randn(40, 150, generator=generator)
    assert opponents.evbmf_rank(matrix) == rank
    assert opponents.evbmf_rank(matrix.T) == rank


def test_a_split_of_full_rank_is_the_layer_itself() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, stride=2, padding=1)
    x = torch.randn(2, 8, 9, 9)
    for groups in (1, 2, 4):
        rank = min(12, 8 // groups * 9)
        built = opponents.build_split(conv, opponents.Split(groups, rank, 0, 0.0))
        assert torch.allclose(built(x), conv(x), atol=1e-4)
    linear = nn.Linear(8, 5)
    built = opponents.build_split(linear, opponents.Split(1, 5, 0, 0.0))
    assert torch.allclose(built(x[:, :, 0, 0]), linear(x[:, :, 0, 0]), atol=1e-5)


def test_alds_errors_bound_what_a_split_breaks(arena: ground.Arena) -> None:
    layer = next(layer for layer in arena.layers if layer.name == "conv")
    weight = arena.baseline.model.conv.weight.detach()
    splits = opponents.alds_splits(arena.baseline.model, layer)
    assert {split.groups for split in splits} == {1, 2, 4, 8}
    for split in splits[::7]:
        first, second = opponents.build_split(arena.baseline.model.conv, split)
        assert first.weight.numel() + second.weight.numel() == split.params
        inner = first.weight.chunk(split.groups)
        outer = second.weight[:, :, 0, 0].chunk(split.groups, dim=1)
        parts = [
            (b @ a.flatten(1)).reshape(-1, *a.shape[1:]) for a, b in zip(inner, outer, strict=True)
        ]
        rest = torch.linalg.matrix_norm((weight - torch.cat(parts, 1)).flatten(1), 2)
        assert rest / torch.linalg.matrix_norm(weight.flatten(1), 2) <= split.error + 1e-5


def test_the_budget_is_spent_but_not_overspent(arena: ground.Arena) -> None:
    make = opponents.alds(arena)
    for budget in (0.3, 0.5, 0.7):
        share = arena.share(ground.spend_budget(make, arena.share, budget))
        assert 0.8 * budget <= share <= budget


def test_budgets_close_in_on_the_least_within_delta() -> None:
    tried: list[tuple[float, bool]] = []
    for _ in range(8):
        budget = ground.next_budget(tried, floor=0.01)
        tried.append((budget, budget >= 0.1))
    least = min(share for share, within in tried if within)
    assert 0.1 <= least < 0.103
    assert ground.next_budget([(0.1, True), (0.099, False)], 0.01) == pytest.approx(
        0.0922, abs=1e-4
    )
    assert ground.next_budget([], floor=0.4) == 0.4


def test_every_epoch_is_counted(arena: ground.Arena) -> None:
    attempts = ground.bisect_family(
        {"svd": opponents.uniform(arena, "svd"), "tt": opponents.uniform(arena, "tt")},
        arena,
        trials=3,
        epochs=0.5,
        learning_rate=0.05,
        seed=0,
    )
    assert [attempt.family for attempt in attempts] == ["svd", "tt", "svd"]
    assert [attempt.epochs for attempt in attempts] == pytest.approx([0.5, 1.0, 1.5])
    assert arena.counter.epochs == pytest.approx(1.5)


def attempt_of(arena: ground.Arena, share: float, drop: float) -> ground.Attempt:
    return ground.Attempt(arena.baseline.model, "svd", share, share, drop - 1.0, drop, 1.0)


def test_the_cheapest_within_delta_wins_after_the_long_training(
    arena: ground.Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = {0.2: 7.0, 0.3: 4.0}
    tuned: list[float] = []

    def tune(model: Any, arena: Any, epochs: float, rate: float, seed: int) -> tuple[float, float]:
        tuned.append(epochs)
        arena.counter.given += round(epochs * len(arena.counter))
        lost = list(after.values())[len(tuned) - 1]
        return lost - 1.0, lost

    monkeypatch.setattr(ground, "tune", tune)
    attempts = [
        attempt_of(arena, *pair) for pair in ((0.5, 1.0), (0.3, 6.0), (0.2, 8.0), (0.1, 90))
    ]
    winner = ground.finish(attempts, arena, epochs=9.0, seed=0)
    assert winner is not None and (winner.share, winner.lost) == (0.3, 4.0)
    assert tuned == [1.0, 1.0]
    tuned.clear()
    # With one long training to spend, the network that was within delta already is what is left.
    winner = ground.finish(attempts, arena, epochs=1.0, seed=0)
    assert winner is not None and (winner.share, winner.lost) == (0.5, 1.0)
    assert tuned == [1.0]
    assert ground.finish(attempts[2:], arena, epochs=0.0, seed=0) is None


def test_test_data_is_read_by_describe_alone(arena: ground.Arena, task: Task) -> None:
    arena.task.test, reads = count_reads(arena.task.test)
    model = opponents.allocator(arena)(0.5)
    drop, lost = ground.tune(model, arena, 0.5, 0.05, 0)
    assert lost >= drop
    assert not reads
    figures = ground.describe(model, arena, drop)
    assert len(reads) == 2
    expected = metric_drop(evaluate(task.model, task, task.test), evaluate(model, task, task.test))
    assert figures["test_drop"] == pytest.approx(expected)
    assert figures["params_ratio"] == pytest.approx(1 / arena.share(model))


def test_a_kept_result_stands_for_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    assert ground.remember(path, {"delta": 1.0}, lambda: {"figure": 1})["figure"] == 1
    assert ground.remember(path, {"delta": 1.0}, lambda: {"figure": 2})["figure"] == 1
    with pytest.raises(ConfigError, match="delta"):
        ground.remember(path, {"delta": 2.0}, lambda: {"figure": 3})


def test_all_methods_run_with_all_seeds_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[str, int]] = []

    def work(method: str, seed: int) -> dict[str, Any]:
        done.append((method, seed))
        return {"figure": f"{method} {seed}"}

    for _ in range(2):
        found = ground.run_all(
            ("a", "b"), (0, 1), tmp_path, lambda method: {"of": method}, work, lambda r: r["figure"]
        )
    assert done == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [run["figure"] for run in found["b"]] == ["b 0", "b 1"]
    assert found["b"][0]["settings"] == {"of": "b"}
    assert "## b, seed 1\nb 1\n" in capsys.readouterr().out


def test_stages_share_about_the_same_epochs(arena: ground.Arena) -> None:
    config = ground.override(
        arena.config,
        {"search.trials": 24, "finetune.epochs": 5.0, "finetune.final_epochs": 20.0},
    )
    for method in ("random", "tpe", "exploration", "both"):
        own = ground.override(config, bench_search.stages(config, method, None))
        recipe = Recipe.from_config(own.finetune)
        annealing = annealing_length(recipe, own.search.annealing_trials)
        # Another trial of the annealing would bring the rehearsal with it, and be too much.
        assert own.search.trials * 5 + annealing == (110 if method == "both" else 120)
    assert bench_search.stages(config, "tpe-long", 300)["search.trials"] == 300


@pytest.mark.slow
def test_a_search_is_logged_trial_by_trial(tmp_path: Path, arena: ground.Arena) -> None:
    found = bench_search.run_search(arena, "tpe", tmp_path, 3, {"search.trials": 2})
    text = (tmp_path / "study-tpe/trials.jsonl").read_text(encoding="utf-8")
    trials = [json.loads(line) for line in text.splitlines()]
    assert found["trials"] == trials and len(trials) == 2
    # Before the first trial a study takes a few steps to see that training works.
    assert 0.5 <= trials[0]["epochs"] <= 1.2
    assert trials[1]["epochs"] - trials[0]["epochs"] == pytest.approx(0.5)
    assert found["epochs"] >= trials[-1]["epochs"]


def test_the_curve_takes_what_is_within_delta_and_ended_in_time() -> None:
    trials = [
        {"within": True, "ratio": 2.0, "epochs": 1.0},
        {"within": False, "ratio": 9.0, "epochs": 2.0},
        {"within": True, "ratio": 3.0, "epochs": 3.0},
    ]
    limits = (0.5, 2.5, float("inf"))
    assert [bench_search.best_after(trials, limit) for limit in limits] == [None, 2.0, 3.0]


def test_peers_and_their_table(arena: ground.Arena) -> None:
    found = bench_peers.run_peer(arena, "alds", 0, epochs=4.0)
    assert len(found["trials"]) == 4 and found["epochs"] <= 4.0 + 1e-6
    text = bench_peers.peers_table(
        {"alds": [found | {"seconds": 1.0}, {**found, "seconds": 3.0}]}, [0, 1]
    )
    assert "ALDS" in text and "2.0 +/- 1.4" in text and "Seeds 0, 1" in text


def test_other_methods_get_the_epochs_of_the_longest_study_of_ours(tmp_path: Path) -> None:
    assert bench_peers.epochs_of_ours(tmp_path, 0) == 0
    for name, epochs in (("autocompress-ranks-0", 3.0), ("autocompress-both-0", 7.5)):
        (tmp_path / f"{name}.json").write_text(f'{{"epochs": {epochs}}}')
    (tmp_path / "alds-0.json").write_text('{"epochs": 20.0}')
    (tmp_path / "autocompress-both-1.json").write_text('{"epochs": 30.0}')
    assert bench_peers.epochs_of_ours(tmp_path, 0) == 7.5


def test_spread_says_what_is_missing() -> None:
    assert ground.spread([None]) == "-"
    assert ground.spread([2.0]) == "2.00"
    assert ground.spread([1.0, 3.0, None]) == "2.00 +/- 1.41 (2 of 3)"


def test_every_variant_of_fine_tuning_differs_in_what_it_says(arena: ground.Arena) -> None:
    images, labels = make_images(256, 1)
    pixels = (32 * images + 128).clamp(0, 255).byte()
    arena.counter.loader = ArrayLoader(pixels, labels, 32, [0.5], [0.125], "crop", shuffle=True)
    arena.task.calibration = calibration_loader(arena.counter.loader)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in bench_finetune.BY_DEFAULT:
        model, _ = bench_finetune.VARIANTS[name](deepcopy(arena.baseline.model), arena, 1.0, 0)
        found[name] = model.state_dict()
    norms = {key for key in found["as it is"] if "running" in key}
    for name, state in found.items():
        same = {key: torch.equal(state[key], found["as it is"][key]) for key in state}
        weights = all(same[key] for key in same if key not in norms and "tracked" not in key)
        if name in ("as it is", "running statistics", "whole images"):
            assert weights, name
        else:
            assert not weights, name
    for name in ("running statistics", "whole images"):
        assert not any(torch.equal(found[name][key], found["as it is"][key]) for key in norms)


def test_proposals_are_timed_for_each_sampler(tmp_path: Path) -> None:
    space = bench_sampler.make_space(6)
    trials = bench_sampler.make_trials(space, 30)
    study = bench_sampler.make_study("sqlite", tmp_path, trials)
    for name in ("random", "knobs", "annealing"):
        study.sampler = bench_sampler.sampler(name, space, 30)
        assert all(milliseconds > 0 for milliseconds in bench_sampler.measure(study, space, 2))
    assert len(study.trials) == 30 + 3 * (1 + 2)  # one to warm up


def test_ways_to_int8_get_one_network_and_a_missing_one_is_named(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    before = evaluate(task.model, task, task.val)
    quantizer = Quantizer(task, before, task.example(), 5.0, 0.5)
    ways = ["autocompress, minmax", "ONNX Runtime, minmax", "NNCF"]
    batches = list(calibration_batches(task, 64))
    exact, ours, theirs, missing = (
        [cell.strip() for cell in row.split("|")]
        for row in bench_quantization.compare(quantizer, task.model, batches, ways)
    )
    assert exact[:3] == ["float32", f"{before.score:.2f}", "0.00"]
    # One method: the same accuracy, and the same size once the text is gone.
    assert ours[1:3] == theirs[1:3] and ours[4] == theirs[4] == ours[3] != theirs[3]
    assert missing[:2] == ["NNCF", "not installed: nncf"]
    assert len({len(row) for row in (exact, ours, theirs, missing)}) == 1


def test_predicted_changes_are_compared_with_real_ones(arena: ground.Arena) -> None:
    space, cache = opponents.table_space(arena, channels=True)
    found = list(bench_impact.changes(arena, space, cache))
    assert {(kind, name) for kind, name, _, _ in found} >= {("ranks", "conv"), ("channels", "stem")}
    times = [real / choice.impact for _, _, choice, real in found]
    assert min(times) > 0 and 0.3 < statistics.median(times) < 5, times
    ranks, channels, both = bench_impact.lost(arena, space, cache, 0.5)
    assert ranks.endswith("x") and len({ranks, channels, both}) > 1


def test_the_allocator_removes_channels_where_it_may(arena: ground.Arena) -> None:
    small = opponents.allocator(arena, channels=True)(0.3)
    norms = [
        module.num_features for module in small.modules() if isinstance(module, nn.BatchNorm2d)
    ]
    assert sum(norms) < 16 + 32


def test_orders_of_channels_are_compared_at_one_cost(arena: ground.Arena) -> None:
    rows = [
        row
        for order in ("norm", "taylor")
        for row in bench_importance.measure(arena, order, [0.6, 0.3], seeds=[0, 1])
    ]
    assert [row["budget"] for row in rows] == 2 * [0.6, 0.6, 0.3, 0.3]
    assert all(0 < row["share"] <= row["budget"] for row in rows)
    # A plan is recalibrated alike for each seed, and then fine-tuned with it.
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert one["before"] == pytest.approx(other["before"], abs=2.0)
