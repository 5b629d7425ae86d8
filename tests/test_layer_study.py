"""What a layer's study measures on single queries is what whole query tiles show."""

from __future__ import annotations

import pytest
import torch

from veda_compile import Extra, Layout, Plan, Video, sparse_attention
from veda_compile.distilled_plan import choose_heads, head_weights
from veda_compile.keep_maps import LADDER
from veda_compile.kernels.plan import TileShape
from veda_compile.layer_study import LayerStudy
from veda_compile.observed_call import ObservedCall
from veda_compile.sidecar_schema import LayerCard

HEADS, KV_HEADS, DIM, SIZE = 4, 2, 16, 64
SHAPES: list[TileShape] = [(1, 8, 8), (4, 4, 4)]
DENSITY = 0.3


def observed(layout: Layout, batch: int = 1, scale_of_head: int | None = None) -> ObservedCall:
    generator = torch.Generator().manual_seed(3)
    q = 3 * torch.randn(batch, HEADS, layout.query_length, DIM, generator=generator)
    k = torch.randn(batch, KV_HEADS, layout.length, DIM, generator=generator)
    v = torch.randn(batch, KV_HEADS, layout.length, DIM, generator=generator)
    if scale_of_head is not None:
        v[:, scale_of_head // (HEADS // KV_HEADS)] *= 3.0
    card = LayerCard("blocks.0.attn1", HEADS, DIM)
    return ObservedCall(card, q, k, v, layout, DIM**-0.5, None, None)


def video_queries(layout: Layout) -> torch.Tensor:
    first, video = layout.videos[0]
    return torch.arange(first, first + video.length)


@pytest.mark.parametrize(
    "layout",
    [Layout.of(Video(4, 8, 16)), Layout.of(Extra(3), Video(5, 7, 9)), Layout.of(Video(3, 9, 8),
     Extra(5))], ids=["full", "ragged", "text last"],
)  # fmt: skip
def test_all_queries_searched_are_the_errors_of_sparse_attention(layout: Layout) -> None:
    call, rung = observed(layout), LADDER.index(DENSITY)
    study = LayerStudy(layout, HEADS, DIM, SIZE)
    study.search(call, SHAPES, video_queries(layout))

    def attend(shape: TileShape, density: float) -> torch.Tensor:
        plan = Plan.uniform(HEADS, shape, density)
        made = sparse_attention(
            call.q, call.k, call.v, layout=layout, plan=plan, scale=call.scale,
            executor="reference",
        )  # fmt: skip
        assert isinstance(made, torch.Tensor)
        return made[:, :, video_queries(layout)]

    for shape in SHAPES:
        exact = attend(shape, 1.0)
        error = (attend(shape, DENSITY) - exact).square().sum((0, 2, 3))
        wanted = error / exact.square().sum((0, 2, 3))
        found = study.curves[shape].relative("fit", "closed_form")[:, rung]
        torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-6)
        for place, mode in enumerate(study.curves[shape].windows):
            plan = Plan((shape,) * HEADS, (1.0,) * HEADS, modes=(mode,) * HEADS)
            static = sparse_attention(
                call.q, call.k, call.v, layout=layout, plan=plan, scale=call.scale,
                executor="reference",
            )  # fmt: skip
            assert isinstance(static, torch.Tensor)
            wrong = (static[:, :, video_queries(layout)] - exact).square().sum((0, 2, 3))
            found = study.curves[shape].static_relative("fit")[:, place]
            wanted = wrong / exact.square().sum((0, 2, 3))
            torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-6)


def test_batch_elements_take_turns() -> None:
    layout = Layout.of(Video(4, 8, 16))
    call = observed(layout, batch=2)
    study, tokens = LayerStudy(layout, HEADS, DIM, SIZE), video_queries(layout)[::7]
    study.search(call, SHAPES, tokens)
    first = study.curve(SHAPES[0]).error.clone()
    study.search(call, SHAPES, tokens)
    second = study.curve(SHAPES[0]).error - first
    assert not torch.allclose(first, second)
    study.search(call, SHAPES, tokens)
    torch.testing.assert_close(study.curve(SHAPES[0]).error - first - second, first)


def test_heads_weigh_what_their_outputs_do_whatever_was_sampled_of_them() -> None:
    """Also once heads are studied under shapes of their own: more samples are no more weight."""
    layout = Layout.of(Video(4, 8, 16))
    call, tokens = observed(layout, scale_of_head=3), video_queries(layout)
    study = LayerStudy(layout, HEADS, DIM, SIZE)
    study.search(call, SHAPES, tokens)
    before = head_weights(study)
    energy = sparse_attention(
        call.q, call.k, call.v, layout=layout, plan=Plan.uniform(HEADS, SHAPES[0], 1.0),
        scale=call.scale, executor="reference",
    )  # fmt: skip
    assert isinstance(energy, torch.Tensor)
    share = energy.square().sum((0, 2, 3))
    torch.testing.assert_close(before.float(), share / share.sum(), rtol=1e-4, atol=0)
    shapes = (SHAPES[0], SHAPES[1], SHAPES[1], SHAPES[1])
    for _ in range(3):
        study.study(call, shapes, tokens, "fit", None)
    torch.testing.assert_close(head_weights(study), before, rtol=1e-3, atol=0)


def test_several_videos_are_searched_by_whole_tiles() -> None:
    layout = Layout.of(Video(2, 8, 8), Video(2, 8, 8))
    study = LayerStudy(layout, HEADS, DIM, SIZE)
    study.search(observed(layout), SHAPES, torch.arange(0, 256, 3))
    chosen = choose_heads({"blocks.0.attn1": study}, DENSITY, "mixed")["blocks.0.attn1"]
    assert len(chosen.heads) == HEADS
    assert sum(head.density for head in chosen.heads) / HEADS <= DENSITY + 1e-9
