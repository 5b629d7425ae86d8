"""Masks: what is proven of them by the operations that make them, whatever their values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiling import capture
from torch import Tensor

from veda_compile.passes.masks import KeyValidity, Nothing, key_validity
from veda_compile.passes.sites import find_sites
from veda_compile.passes.writes import Writes

pytestmark = pytest.mark.usefixtures("fresh_compiler")

N = 20
SHAPE = (2, 3, N, 8)
LOWEST = torch.finfo(torch.float32).min
PADDING = torch.ones(2, N, dtype=torch.bool)

Mask = Callable[..., Tensor]


def proven(mask: Mask, *args: Tensor) -> KeyValidity | str | None:
    """What is found of the mask that `mask` computes from graph inputs."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *args: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask(*args))

    captured = capture(attend, *(torch.randn(SHAPE) for _ in range(3)), *args)
    (site,) = find_sites(captured.gm)
    return key_validity(site, N, N, Writes(captured.gm.graph))


def outer_and(m: Tensor) -> Tensor:
    rows = m.view(2, 1, 1, N).repeat(1, 1, N, 1)
    return (rows & rows.transpose(2, 3)).bool()


def outer_by_writes(m: Tensor) -> Tensor:
    mask = torch.ones(2, 1, N, N, dtype=torch.bool)
    mask.logical_and_(m[:, None, None])
    mask &= m[:, None, :, None]
    return mask


def outer_by_index(m: Tensor) -> Tensor:
    mask = torch.ones(2, 1, N, N, dtype=torch.bool)
    mask[~(m[:, None, None] & m[:, None, :, None])] = False
    return mask


def lengths_by_slices(m: Tensor) -> Tensor:
    mask = torch.zeros(2, N, dtype=torch.bool)
    mask[0, :7] = True
    mask[1, 3:9] = m[1, 3:9]
    return mask[:, None, None]


def longer_by_arange(lengths: Tensor) -> Tensor:
    return (torch.arange(N)[None] < lengths[:, None])[:, None, None]


@pytest.mark.parametrize(
    ("mask", "args", "both", "nothing"),
    [
        (lambda m: m[:, None, None], (PADDING,), False, Nothing.ZEROS),
        (lambda m: ~m[:, None, None], (PADDING,), False, Nothing.ZEROS),
        (lambda m: m[:1], (PADDING,), False, Nothing.ZEROS),
        (lambda m: m[:, None, None].expand(2, 3, N, N), (PADDING,), False, Nothing.ZEROS),
        (lambda m, n: (m | n)[:, None, None], (PADDING, PADDING), False, Nothing.ZEROS),
        (lengths_by_slices, (PADDING,), False, Nothing.ZEROS),
        (longer_by_arange, (torch.tensor([3, 4]),), False, Nothing.ZEROS),
        (outer_and, (PADDING,), True, Nothing.ZEROS),
        (outer_by_writes, (PADDING,), True, Nothing.ZEROS),
        (outer_by_index, (PADDING,), True, Nothing.ZEROS),
        (lambda m, n: m[:, None, None] & n[:, None, :, None], (PADDING, PADDING), True,
         Nothing.ZEROS),
        (lambda m: torch.zeros(2, 1, 1, N).masked_fill(~m[:, None, None], -math.inf), (PADDING,),
         False, Nothing.ZEROS),
        (lambda m: torch.where(m, 0.0, -math.inf)[:, None, None], (PADDING,), False,
         Nothing.ZEROS),
        (lambda m: (1 - m[:, None, None].float()) * LOWEST, (PADDING,), False, Nothing.MEAN),
        (lambda m: (m[:, None, None] == 0).float() * LOWEST, (PADDING.float(),), False,
         Nothing.MEAN),
        (lambda m: torch.where(m[:, None, None], torch.zeros(()), torch.full((), -1e9)),
         (PADDING,), False, Nothing.MEAN),
        (lambda m: torch.zeros(2, 1, N, N).masked_fill(~outer_and(m), LOWEST), (PADDING,), True,
         Nothing.MEAN),
    ],
)  # fmt: skip
def test_padding_is_key_validity(
    mask: Mask, args: tuple[Tensor, ...], both: bool, nothing: Nothing
) -> None:
    found = proven(mask, *args)
    assert isinstance(found, KeyValidity), found
    assert found.keys is not None
    assert (found.queries is not None) == both
    assert found.nothing is nothing


@pytest.mark.parametrize(
    "mask",
    [
        lambda: torch.ones(2, 1, N, N, dtype=torch.bool),
        lambda: torch.zeros(N, N),
        lambda: torch.zeros(2, 1, N, N, dtype=torch.bool).logical_not(),
        lambda: torch.full((1, 1, N, N), True),
        lambda: torch.zeros(1, 1, N, N).masked_fill(torch.zeros(N, N, dtype=torch.bool), -math.inf),
    ],
)
def test_a_mask_that_hides_nothing_is_no_mask(mask: Mask) -> None:
    assert proven(mask) is None


def through_a_view(m: Tensor) -> Tensor:
    mask = torch.ones(2, 1, N, N, dtype=torch.bool)
    mask[:, 0].logical_and_(m[:, None])
    return mask


def in_part(m: Tensor) -> Tensor:
    mask = torch.zeros(2, 1, N, N, dtype=torch.bool)
    mask[:, :, :7, :9] = True
    mask[:, :, 7:, 3:] = True
    return mask


def by_position(places: Tensor) -> Tensor:
    mask = torch.zeros(N, N, dtype=torch.bool)
    mask[places] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "args", "words"),
    [
        (lambda m: m[:, None, None] | m[:, None, :, None], (PADDING,), "query to query"),
        (lambda m: m[:, None, None] ^ m[:, None, :, None], (PADDING,), "query to query"),
        (lambda: torch.ones(N, N, dtype=torch.bool).tril(), (), "tril"),
        (lambda: torch.arange(N)[:, None] // 5 == torch.arange(N) // 5, (), "not followed"),
        (lambda m: m, (torch.ones(2, 1, N, N, dtype=torch.bool),), "outside the graph"),
        (lambda m: m, (torch.zeros(2, 1, N, N),), "outside the graph"),
        (lambda m: m[:, None, None], (torch.zeros(2, N),), "outside the graph"),
        (lambda m: m[:, :, None], (torch.ones(2, 3, N, dtype=torch.bool),), "head to head"),
        (lambda m: (1 - m[:, None, None].float()) * -10000.0, (PADDING,), "adds -10000"),
        (lambda m: (1 - m[:, None, None]) * LOWEST, (PADDING.float(),), "outside the graph"),
        (lambda m: (1 - m[:, None, None].float()) * -math.inf, (PADDING,), "nan"),
        (lambda: torch.zeros(2, 1, N, N, dtype=torch.bool), (), "hides everything"),
        (lambda m: in_part(m), (PADDING,), "query to query|part of the mask"),
        (through_a_view, (PADDING,), "view"),
        (by_position, (torch.tensor([3, 4]),), "indexed write"),
    ],
)  # fmt: skip
def test_anything_else_is_named(mask: Mask, args: tuple[Tensor, ...], words: str) -> None:
    found = proven(mask, *args)
    assert isinstance(found, str)
    assert any(word in found for word in words.split("|")), found


def test_writes_after_a_value_was_taken_are_not_mixed_up() -> None:
    """The inputs no longer hold what the mask was made of: nothing can be read from them."""

    def inverted_later(m: Tensor) -> Tensor:
        mask = torch.where(m, 0.0, -math.inf)[:, None, None]
        m.logical_not_()
        return mask

    def a_view_inverted_later(m: Tensor) -> Tensor:
        mask = m[:, None, None]
        m.logical_not_()
        return mask

    assert isinstance(proven(inverted_later, PADDING.clone()), str)
    assert isinstance(proven(a_view_inverted_later, PADDING.clone()), KeyValidity)


def test_the_example_values_do_not_matter() -> None:
    for example in (PADDING, ~PADDING, torch.rand(2, N) > 0.5):
        assert isinstance(proven(outer_and, example), KeyValidity)
        assert isinstance(proven(lambda m: m[:, None, None] | m[:, None, :, None], example), str)


def spelled_out(mask: Any) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return torch.softmax(mask(q @ k.mT * 0.3, m), -1) @ v

    return attend


@pytest.mark.parametrize(
    ("mask", "nothing"),
    [
        (lambda x, m: x.masked_fill(~m[:, None, None], -math.inf), Nothing.NAN),
        (lambda x, m: x.masked_fill(m[:, None, None] == 0, LOWEST), Nothing.MEAN),
        (lambda x, m: torch.where(m[:, None, None], x, -math.inf), Nothing.NAN),
        (lambda x, m: x + torch.where(m, 0.0, -math.inf)[:, None, None], Nothing.NAN),
        (lambda x, m: x.masked_fill(m[:, None, None], -1e9), Nothing.MEAN),
        (lambda x, m: x.masked_fill(m[:, None, None], -1e4), None),
        (lambda x, m: x + m[:, None, None], None),
    ],
)
def test_masks_on_written_out_logits(mask: Any, nothing: Nothing | None) -> None:
    qkv = [torch.randn(SHAPE) for _ in range(3)]
    captured = capture(spelled_out(mask), *qkv, PADDING)
    (site,) = find_sites(captured.gm)
    found = key_validity(site, N, N, Writes(captured.gm.graph))
    if nothing is None:
        assert isinstance(found, str)
    else:
        assert isinstance(found, KeyValidity)
        assert found.nothing is nothing


def test_a_product_that_is_added_is_no_mask() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(torch.add(q @ k.mT, k @ q.mT), -1) @ v

    captured = capture(attend, *(torch.randn(SHAPE) for _ in range(3)))
    (site,) = find_sites(captured.gm)
    found = key_validity(site, N, N, Writes(captured.gm.graph))
    assert isinstance(found, str) and "not followed" in found
