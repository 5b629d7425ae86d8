"""Token maps: what q, k and v of one site hold along the sequence, source by source."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .codes import NONE, Source, SourceKind, Tracked
from .sites import Operand

_ORDER = "bhnd"


def to_bhnd(codes: torch.Tensor, axes: str) -> torch.Tensor:
    """Codes with sides `axes` as a (B, H, N, D) tensor; absent sides get size 1."""
    present = [axes.index(letter) for letter in _ORDER if letter in axes]
    codes = codes.permute(present)
    for place, letter in enumerate(_ORDER):
        if letter not in axes:
            codes = codes.unsqueeze(place)
    return codes


@dataclass(frozen=True, eq=False)
class TokenMap:
    """How one site's operands relate.

    tokens: sequence length (hint). content: per source that reaches v, the (N,) codes of the first
    batch element. positional: per source that reaches q and k but not v, its (N, F) codes.
    same: q, k and v hold the same tokens in the same order. shared: they have a source in common.
    batch_axes: per content source, its axes that vary over the batch side.
    by_head: the tokens differ from head to head.
    """

    tokens: int
    content: Mapping[Source, torch.Tensor]
    positional: Mapping[Source, torch.Tensor]
    same: bool
    shared: bool
    batch_axes: Mapping[Source, frozenset[int]]
    by_head: bool


def token_map(
    q: Tracked, k: Tracked, v: Tracked, axes: tuple[Operand, Operand, Operand]
) -> TokenMap:
    """The token map of operands with the given sides."""
    views = [
        {s: to_bhnd(c, operand.axes) for s, c in x.codes.items()}
        for x, operand in zip((q, k, v), axes, strict=True)
    ]
    rows = [{s: _row(c) for s, c in view.items() if _varies(c)} for view in views]
    content_sources = [s for s in rows[2] if s.kind is SourceKind.INPUT]
    positional = {
        s: _columns(views[0][s])
        for s in rows[0]
        if s in rows[1] and (s not in rows[2] or s.kind is not SourceKind.INPUT)
    }
    others = {
        s for row in rows[:2] for s in row if s.kind is SourceKind.INPUT and s not in positional
    }
    same = bool(content_sources) and others <= set(content_sources)
    for source in content_sources if same else ():
        a, b, c = (row.get(source) for row in rows)
        same = (
            same
            and a is not None
            and b is not None
            and c is not None
            and torch.equal(a, c)
            and torch.equal(b, c)
        )
    return TokenMap(
        q.shape[axes[0].axes.index("n")],
        {s: rows[2][s] for s in content_sources},
        positional,
        same,
        any(s in rows[0] for s in content_sources),
        {s: _batch_axes(s, views[2][s]) for s in content_sources},
        any(views[2][s].shape[1] > 1 for s in content_sources),
    )


def _varies(codes: torch.Tensor) -> bool:
    """Whether the codes of the first batch element and head change along the sequence."""
    if codes.shape[2] == 1:
        return False
    row = _row(codes)
    return bool((row != row[0]).any())


def _row(codes: torch.Tensor) -> torch.Tensor:
    """(N,) codes of the first batch element and head; features hold one token."""
    return codes[0, 0].amax(-1)


def _columns(codes: torch.Tensor) -> torch.Tensor:
    """(N, H * D) codes of the first batch element; positions may differ by feature and head."""
    return codes[0].transpose(0, 1).flatten(1)


def _batch_axes(source: Source, codes: torch.Tensor) -> frozenset[int]:
    firsts = codes[:, 0, 0, 0]
    if codes.shape[0] == 1 or bool((firsts == NONE).all()):
        return frozenset()
    return frozenset(varying_axes(source, firsts[firsts != NONE]))


def coordinates(source: Source, codes: torch.Tensor) -> list[torch.Tensor]:
    """Per axis of `source`, the index each code has there."""
    strides = itertools.accumulate(reversed((*source.shape[1:], 1)), lambda a, b: a * b)
    steps = list(reversed(list(strides)))
    return [codes.long() // step % side for step, side in zip(steps, source.shape, strict=True)]


def varying_axes(source: Source, codes: torch.Tensor) -> list[int]:
    """The axes of `source` along which the given codes differ."""
    return [
        axis
        for axis, index in enumerate(coordinates(source, codes))
        if bool((index != index[0]).any())
    ]
