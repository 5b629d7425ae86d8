"""Tokens moved by index tensors: made in the graph, constant, or inputs that may change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled, run, sparse_calls
from torch import Tensor, nn
from toys import GRID, TOKENS, latents

from veda_compile import LayoutError
from veda_compile.kernels.layout import Extra, Layout, Video

pytestmark = pytest.mark.usefixtures("fresh_compiler")

TEXT = 5
LAYOUT = Layout.of(Extra(TEXT), Video(*GRID))

Pack = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(video (B, N, C), text (B, M, C), places of the video in the sequence) -> the sequence."""


def attend(tokens: Tensor) -> Tensor:
    tokens = tokens.unsqueeze(1)
    return F.scaled_dot_product_attention(tokens * 3, tokens, tokens)


def blank(video: Tensor, text: Tensor) -> Tensor:
    return video.new_zeros(video.shape[0], video.shape[1] + text.shape[1], video.shape[2])


def by_setitem(video: Tensor, text: Tensor, places: Tensor) -> Tensor:
    out = blank(video, text)
    out[:, places] = video
    out[:, :TEXT] = text
    return out


def by_index_copy(video: Tensor, text: Tensor, places: Tensor) -> Tensor:
    return blank(video, text).index_copy(1, places, video).index_copy_(
        1, torch.arange(TEXT, device=text.device), text
    )  # fmt: skip


def by_index_add(video: Tensor, text: Tensor, places: Tensor) -> Tensor:
    out = torch.cat([text, torch.zeros_like(video)], 1)
    return out.index_add(1, places, video)


def by_index_put(video: Tensor, text: Tensor, places: Tensor) -> Tensor:
    out = torch.cat([text, torch.zeros_like(video)], 1)
    rows = torch.zeros(1, 1, dtype=torch.long, device=places.device)
    return out.index_put((rows, places[None]), video)


def by_scatter(video: Tensor, text: Tensor, places: Tensor) -> Tensor:
    out = torch.cat([text, torch.zeros_like(video)], 1)
    return out.scatter(1, places[None, :, None].expand_as(video), video)


def by_scatter_add(video: Tensor, text: Tensor, places: Tensor) -> Tensor:
    out = torch.cat([text, torch.zeros_like(video)], 1)
    return out.scatter_add(1, places[None, :, None].expand_as(video), video)


def by_masked_scatter(video: Tensor, text: Tensor, places: Tensor) -> Tensor:
    out = torch.cat([text, torch.zeros_like(video)], 1)
    mask = torch.zeros(out.shape[1], dtype=torch.bool, device=places.device)
    mask[places] = True
    return out.masked_scatter(mask[None, :, None], video)


def by_mask(video: Tensor, text: Tensor, places: Tensor) -> Tensor:
    out = torch.cat([text, torch.zeros_like(video)], 1)
    mask = torch.zeros(out.shape[1], dtype=torch.bool, device=places.device)
    mask[places] = True
    out[:, mask] = video
    return out


def by_index_select(video: Tensor, text: Tensor, places: Tensor) -> Tensor:
    back = torch.cat([torch.arange(TOKENS, TOKENS + TEXT, device=places.device), places - TEXT])
    return torch.cat([video, text], 1).index_select(1, back)


def by_sorting(video: Tensor, text: Tensor, places: Tensor) -> Tensor:
    both = torch.cat([places, torch.arange(TEXT, device=places.device)])
    return torch.cat([video, text], 1)[:, both.argsort()]


def by_gather(video: Tensor, text: Tensor, places: Tensor) -> Tensor:
    both = torch.cat([video, text], 1)
    back = torch.cat([torch.arange(TOKENS, TOKENS + TEXT, device=places.device), places - TEXT])
    return both.gather(1, back[None, :, None].expand(both.shape[0], -1, both.shape[2]))


WAYS = [by_setitem, by_index_copy, by_index_add, by_index_put, by_scatter, by_scatter_add,
        by_masked_scatter, by_mask, by_index_select, by_sorting, by_gather]  # fmt: skip


class Packed(nn.Module):
    """Attention over video and text packed in one sequence."""

    def __init__(self, pack: Pack, buffer: bool = False) -> None:
        super().__init__()
        self.pack = pack
        if buffer:
            self.register_buffer("places", torch.arange(TEXT, TEXT + TOKENS))

    def forward(self, x: Tensor, text: Tensor, places: Tensor | None = None) -> Tensor:
        video = x.flatten(2).transpose(1, 2)
        if places is None:
            places = self.places if hasattr(self, "places") else TEXT + torch.arange(TOKENS)
        return attend(self.pack(video, text, places))


def text() -> Tensor:
    return torch.randn(1, TEXT, 4, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("source", ["graph", "buffer", "input"])
@pytest.mark.parametrize("pack", WAYS)
def test_every_way_to_pack_a_sequence(pack: Pack, source: str) -> None:
    model = Packed(pack, buffer=source == "buffer")
    args: tuple[Tensor, ...] = (latents(), text())
    if source == "input":
        args = (*args, torch.arange(TEXT, TEXT + TOKENS))
    with sparse_calls() as calls:
        out, (site,) = run(model, *args)
    assert site.rewritten
    assert calls[0][0].layout == LAYOUT
    torch.testing.assert_close(out, model(*args), atol=2e-5, rtol=0.0)
    sparse, _ = run(model, *args, density=0.2)
    assert (sparse - out).abs().max() > 1e-3


@pytest.mark.parametrize("pack", [by_index_copy, by_scatter, by_gather, by_mask])
def test_an_index_input_with_other_values_is_an_error(pack: Pack) -> None:
    model = Packed(pack)
    fn = compiled(model)
    places = torch.arange(TEXT, TEXT + TOKENS)
    with torch.no_grad():
        expected = fn(latents(), text(), places)
        assert torch.equal(fn(latents(), text(), places.clone()), expected)
        with pytest.raises(LayoutError, match="places"):
            fn(latents(), text(), places.flip(0))
        places[:2] = places[:2].flip(0)  # the very same tensor
        with pytest.raises(LayoutError, match="places"):
            fn(latents(), text(), places)
    torch._dynamo.reset()
    with torch.no_grad():
        shuffled = compiled(model)(latents(), text(), places)
    torch.testing.assert_close(shuffled, model(latents(), text(), places), atol=2e-5, rtol=0.0)


def test_a_buffer_that_is_written_to_is_an_error() -> None:
    model = Packed(by_index_copy, buffer=True)
    fn = compiled(model)
    with torch.no_grad():
        fn(latents(), text())
        model.places.copy_(model.places.flip(0))
        with pytest.raises(LayoutError, match="places"):
            fn(latents(), text())


def test_an_index_that_moves_no_video_may_change() -> None:
    def model(x: Tensor, shifts: Tensor, index: Tensor) -> Tensor:
        video = x.flatten(2).transpose(1, 2)
        return attend(video * (1 + shifts[index])[None, None])

    fn = compiled(model)
    shifts = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), sparse_calls() as calls:
        for row in (0, 2):
            index = torch.tensor(row)
            expected = model(latents(), shifts, index)
            out = fn(latents(), shifts, index)
            torch.testing.assert_close(out, expected, atol=2e-5, rtol=0.0)
    assert len(calls) == 2


def test_indices_that_only_the_data_tells_are_named() -> None:
    def model(x: Tensor, scores: Tensor) -> Tensor:
        return attend(x.flatten(2).transpose(1, 2)[:, scores.argsort()])

    scores = torch.randn(TOKENS, generator=torch.Generator().manual_seed(0))
    out, (site,) = run(model, latents(), scores)
    assert site.reason == "NO_PROVENANCE"
    assert "index tensor" in str(site.explanation)
    assert torch.equal(out, model(latents(), scores))


def test_the_order_of_values_read_from_a_float_input_is_not_trusted() -> None:
    """Only integers are read: the order of floats changes from call to call."""

    def model(x: Tensor, scores: Tensor) -> Tensor:
        kept = (scores > -10).nonzero()[:, 0][:TOKENS]
        return attend(x.flatten(2).transpose(1, 2).index_select(1, kept))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        _, sites = run(model, latents(), torch.zeros(TOKENS))
    assert not any(site.rewritten for site in sites)
