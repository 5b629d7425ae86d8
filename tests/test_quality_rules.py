"""The rules of benchmarks.quality: density, validity, exactness at 1.0, and what each looks for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.fields import video_qkv
from benchmarks.quality.attention_quality import measure_attention
from benchmarks.quality.clip_quality import Replaced
from benchmarks.quality.cluster_rules import SemanticClusters, k_means
from benchmarks.quality.fitting import dense, fit_alike, fit_windows, head_errors
from benchmarks.quality.oracle_rules import ClosedForm, FromSidecar, Oracle, OracleOf
from benchmarks.quality.recordings import GRID as MODEL_GRID
from benchmarks.quality.rule import CUBE, Rule, Site, attend
from benchmarks.quality.scored_rules import MeanPool, Random, SubBlock
from benchmarks.quality.splits import CALIBRATION, EVALUATION
from benchmarks.quality.threshold_rules import Sol, Sparge, likeness
from benchmarks.quality.trained_rule import Trained, max_target, train
from benchmarks.quality.window_rules import FAR, SlidingWindow, SpaceOrTime
from veda_compile.kernels.layout import Video
from veda_compile.kernels.selection import kept_map
from veda_compile.kernels.tiles import tile_table
from veda_compile.sidecar import LayerCard, Sidecar

GRID = (8, 8, 16)  # 16 tiles of 64, as cubes, raster runs and runs along time
TILES = 16


def site(seed: int = 0) -> Site:
    q, k, v = video_qkv(Video(*GRID), 2, 16, torch.float32, "cpu", seed)
    return Site(3.0 * q, k, v, GRID, 0)


def cubed(x: torch.Tensor) -> torch.Tensor:
    """x with every token replaced by the first of its cube."""
    table = tile_table(site().layout, CUBE, x.device)
    return x[:, :, table.rows[table.tile_of_token.long(), 0].long()]


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plans") / "rows.veda.safetensors"
    Sidecar.uniform("Any", [LayerCard("blocks.0.attn1", 2, 16)], GRID, (1, 4, 16), 0.3).save(path)
    return str(path)


@pytest.fixture(scope="module")
def rules(sidecar: str) -> list[Rule]:
    closed, planned = ClosedForm(), FromSidecar("rows", sidecar)
    known = [site(1)]
    return [
        Random(), MeanPool(cubes=False), MeanPool(cubes=True), SlidingWindow(), SpaceOrTime(),
        SubBlock(), Sol(corrected=False), Sol(corrected=True), Sparge(),
        Trained(train(known, lambda: None)), Oracle(), closed, OracleOf(closed), planned,
        OracleOf(planned), SemanticClusters(),
    ]  # fmt: skip


@pytest.mark.parametrize("density", [0.1, 0.25, 0.6])
def test_every_rule_keeps_the_density_in_every_head(rules: list[Rule], density: float) -> None:
    for rule in rules:
        kept = rule.choose(site(), density).density
        # clusters differ in size: the density is met up to half a cluster
        slack = 0.02 if isinstance(rule, SemanticClusters) else 1e-6
        assert kept.shape == (2,)
        assert float((kept - density).abs().max()) < slack + 1 / TILES**2, rule.name


def test_selections_are_valid(rules: list[Rule]) -> None:
    for rule in rules:
        choice = rule.choose(site(), 0.3)
        if not choice.ordered:
            continue
        counts, indices = choice.selection.counts, choice.selection.indices
        assert int(counts[..., :TILES].min()) >= 1, rule.name
        for row, count in zip(
            indices.flatten(0, 2).tolist(), counts.flatten().tolist(), strict=True
        ):
            kept = row[:count]
            assert kept == sorted(set(kept)), rule.name
            assert all(0 <= tile < TILES for tile in kept), rule.name


def test_density_one_equals_dense(rules: list[Rule]) -> None:
    exact = dense(site())
    for rule in rules:
        out, lse = attend(rule.choose(site(), 1.0))
        torch.testing.assert_close(out, exact, atol=2e-5, rtol=1e-4, msg=rule.name)
        torch.testing.assert_close(lse, site().lse, atol=1e-4, rtol=1e-4, msg=rule.name)


def test_every_choice_of_content_beats_random_and_none_retains_more_than_the_oracle(
    rules: list[Rule],
) -> None:
    rows = {row.rule: row for row in measure_attention(rules, [[site(2)]], [0.25], lambda: None)}
    for name in ("mean-pool cubes", "sub-block LSE", "mean+tau*sigma, corrected",
                 "self-similar top-p", "trained max-pool", "veda closed form"):  # fmt: skip
        assert rows[name].to_dict()["error"] < 0.8 * rows["random"].to_dict()["error"], name
    # equal budgets in every row of cubes
    for name in ("random", "mean-pool cubes", "sliding window", "sub-block LSE",
                 "trained max-pool", "veda closed form"):  # fmt: skip
        assert rows[name].retained[0] <= rows["oracle cubes"].retained[0] + 1e-6, name
        assert min(rows[name].recall) < 1.0
    assert rows["veda rows"].retained[0] <= rows["oracle of veda rows"].retained[0] + 1e-6
    assert rows["oracle cubes"].recall == [1.0, 1.0]


def test_the_oracle_of_a_plan_has_its_budgets_and_own_tiles(sidecar: str) -> None:
    ours = FromSidecar("rows", sidecar)
    counts = [rule.choose(site(), 0.3).selection.counts for rule in (ours, OracleOf(ours))]
    assert torch.equal(*counts)
    kept = kept_map(OracleOf(ours).choose(site(), 0.3).selection, [0, 1], TILES)
    assert bool(kept.diagonal(dim1=-2, dim2=-1).all())


def test_sliding_windows_hold_the_nearest_cubes() -> None:
    long_in_w = SlidingWindow({0: [(1.0, 1.0, FAR), (FAR, 1.0, 1.0)]})
    kept = kept_map(long_in_w.choose(site(), 0.25).selection, [0, 1], TILES)[0]
    # cubes stand 2 x 2 x 4: four along w are numbers 0 to 3, two along t are 0 and 8
    assert kept[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert {0, 8} <= set(kept[1, 0].nonzero().flatten().tolist())


def test_space_or_time_finds_which_it_is() -> None:
    t, h, w = GRID
    frame = torch.eye(t)[:, None].expand(t, h * w, t).reshape(t * h * w, t)
    place = F.one_hot(torch.arange(h * w) // 8, h * w // 8).float().expand(t, -1, -1)
    made = [torch.cat([x, x.new_zeros(len(x), 16 - x.shape[1])], 1)
            for x in (frame, place.reshape(t * h * w, -1))]  # fmt: skip
    q = 60.0 * torch.stack(made)[None]
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    looked = Site(q, q / 60.0, v, GRID, 0)
    choice = SpaceOrTime().choose(looked, 0.2)  # a frame is two tiles, a band three
    assert choice.call.plan.tile_shapes == ((1, 4, 16), (8, 1, 8))
    assert float(head_errors(attend(choice)[0], dense(looked)).max()) < 1e-3


def test_sub_blocks_are_scored_by_their_summed_exponentials() -> None:
    looked = site()
    table = tile_table(looked.layout, CUBE, looked.q.device).rows.long()
    q, k = (x[0, 0, table].unflatten(1, (4, 16)).mean(2) for x in (looked.q, looked.k))
    score = (q[3] @ k[5].T * looked.scale).exp().sum().log()
    assert float(SubBlock().scores(looked)[0, 0, 3, 5]) == pytest.approx(float(score), rel=1e-5)


def test_the_correction_is_exact_where_tiles_are_uniform() -> None:
    looked = site()
    flat = Site(looked.q, cubed(looked.k), cubed(looked.v), GRID, 0)
    corrected, plain = (attend(Sol(c).choose(flat, 0.2))[0] for c in (True, False))
    torch.testing.assert_close(corrected, dense(flat), atol=1e-5, rtol=1e-4)
    assert float((plain - dense(flat)).abs().max()) > 1e-2


def test_tiles_unlike_inside_are_kept_by_everyone() -> None:
    looked = site()
    table = tile_table(looked.layout, CUBE, looked.q.device)
    k = cubed(looked.k).clone()
    noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    k[:, :, table.rows[7].long()] = noise - noise.mean(0)
    mixed = Site(cubed(looked.q), k, looked.v, GRID, 0)
    like = likeness(mixed.k - mixed.k.mean(2, keepdim=True), mixed)
    assert float(like[0, 0, 7]) < 0.2 < 0.9 < float(like[0, 0, :7].min())
    trusting, wary = (
        kept_map(Sparge({0: torch.full((2,), least)}).choose(mixed, 0.3).selection, [0, 1], TILES)
        for least in (-1.0, 0.5)
    )
    assert bool(wary[..., 7].all()) and not bool(trusting[..., 7].all())


def test_k_means_finds_clusters_and_starts_from_those_of_the_call_before() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10.0 * torch.randn(1, 4, 8, generator=generator)
    label = torch.arange(64) % 4
    points = centres[:, label] + 0.1 * torch.randn(1, 64, 8, generator=generator)
    of, found = k_means(points, 4, 3, centres + 1.0)
    assert torch.equal(of[0], label)
    torch.testing.assert_close(found, centres, atol=0.2, rtol=0.0)
    rule = SemanticClusters()
    fresh = rule.choose(site(5), 0.3)
    rule.start()
    rule.choose(site(0), 0.3)
    carried = rule.choose(site(5), 0.3)
    rule.start()
    torch.testing.assert_close(attend(rule.choose(site(5), 0.3)), attend(fresh))
    assert not torch.equal(attend(carried)[0], attend(fresh)[0])


def test_the_estimator_learns_its_target() -> None:
    looked = site(1)
    target = max_target(looked)
    table = tile_table(looked.layout, CUBE, looked.q.device).rows.long()
    shares = (looked.q[0, 1] @ looked.k[0, 1].T * looked.scale).softmax(-1)
    row = torch.stack([shares[table[2]][:, tile].max() for tile in table])
    torch.testing.assert_close(target[0, 1, 2], row / row.sum())
    untrained = Trained({0: torch.zeros(2, 2, 48, 16)})
    trained = Trained(train([looked], lambda: None))

    def kept(rule: Rule) -> float:
        keep = kept_map(rule.choose(looked, 0.2).selection, [0, 1], TILES)
        return float((target[0] * keep[0]).sum())

    assert kept(trained) > kept(untrained)


def test_fits_take_the_candidate_with_the_least_error() -> None:
    looked = site(3)
    windows, alike = fit_windows([looked], lambda: None), fit_alike([looked], lambda: None)

    def error(rule: Rule) -> torch.Tensor:
        return head_errors(attend(rule.choose(looked, 0.15))[0], dense(looked))

    assert bool((error(SlidingWindow(windows)) <= error(SlidingWindow()) + 1e-6).all())
    assert bool((error(Sparge(alike)) <= error(Sparge()) + 1e-6).all())


def test_sampling_replaces_self_attention_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = MODEL_GRID[0] * MODEL_GRID[1] * MODEL_GRID[2]
    q, k, v = (torch.randn(1, 1, tokens, 16, generator=generator) for _ in range(3))
    text = torch.randn(1, 1, 4, 16, generator=generator)
    with Replaced(Random(), 0.1, layers=1) as replaced:
        itself = F.scaled_dot_product_attention(q, k, v)
        cross = F.scaled_dot_product_attention(q, text, value=text)
    assert replaced.kept == [pytest.approx(0.1, abs=1e-3)]
    torch.testing.assert_close(cross, F.scaled_dot_product_attention(q, text, text))
    assert float((itself - F.scaled_dot_product_attention(q, k, v)).abs().max()) > 1e-2


def test_evaluation_shares_nothing_with_calibration() -> None:
    assert not set(EVALUATION.classes) & set(CALIBRATION.classes)
    seen, learned = ({seed for *_, seed in split.probes(64)} for split in (EVALUATION, CALIBRATION))
    assert min(seen) >= 5000 > max(learned)
    assert len({level for _, level, _ in EVALUATION.probes(4)}) == 4
