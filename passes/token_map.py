"""Token maps: what q, k and v of one site hold along the sequence, source by source."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .batch_order import evenly_held, evenly_placed, starts_later, twins
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

    tokens: length of q (hint). before, after: keys and values beyond q's tokens on either side.
    content: per source that reaches v, the (N,) codes of q's tokens in the first batch element.
    positional: per source that only steers the weights, its (N, F) codes. It reaches q and k but
        not v, or only q, or only k, and what it is added to has tokens of its own.
    same: q, k and v hold the same tokens in the same order, but for the keys before and after.
    paired: k and v have a source in common; without one they come from separate inputs and nothing
        is known. asked: q comes from an input.
    batch_axes: per source, its axes that vary over the batch side.
    by_head: the tokens differ from head to head. by_batch: their order differs in the batch.
    apart: q is one token, or comes from other inputs than k and v, which share one.
    shared: some of q's tokens are among the keys or values.
    """

    tokens: int
    content: Mapping[Source, torch.Tensor]
    positional: Mapping[Source, torch.Tensor]
    same: bool
    paired: bool
    asked: bool
    batch_axes: Mapping[Source, frozenset[int]]
    by_head: bool
    by_batch: bool
    apart: bool
    shared: bool
    before: int = 0
    after: int = 0

    def holds_what(self, other: TokenMap) -> bool:
        """Whether the queries of both maps are the same tokens in the same order: a source that
        tells every token from all others stands in the same places, in every batch element."""
        return any(
            s in other.content
            and torch.equal(codes, other.content[s])
            and self.batch_axes[s] == other.batch_axes[s]
            and bool((codes != NONE).all())
            and torch.unique(codes).numel() == self.tokens
            for s, codes in self.content.items()
        )


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
    of_q, of_k = _steering(*rows)
    # a batch made of a list of samples: an input for every batch element
    later = [s for s, c in views[2].items() if s.kind is SourceKind.INPUT and starts_later(c)]
    named = dict.fromkeys(
        s
        for row in (*rows, later)
        for s in row
        if s.kind is SourceKind.INPUT and s not in (*positional, *of_q, *of_k)
    )
    lengths = [x.shape[o.axes.index("n")] for x, o in zip((q, k, v), axes, strict=True)]
    start = None
    if content_sources and lengths[1] == lengths[2]:
        start = _window(
            *(_lines(view, list(named), n) for view, n in zip(views, lengths, strict=True))
        )
    before = start or 0
    window = slice(None) if start is None else slice(start, start + lengths[0])
    content = {s: rows[2][s][window] for s in content_sources}
    if start is not None:
        content = {s: row for s, row in content.items() if bool((row != NONE).any())}
        positional |= {s: _columns(views[0][s]) for s in of_q}
        positional |= {s: _columns(views[1][s])[window] for s in of_k}
    return TokenMap(
        lengths[0],
        content,
        positional,
        start is not None,
        any(s in rows[1] for s in content_sources),
        any(s.kind is SourceKind.INPUT for s in rows[0]),
        {s: _batch_axes(s, views[2][s]) for s in content}
        | {s: _batch_axes_by_last(s, (views[0] | views[1])[s]) for s in positional},
        not all(_alike(view[s]) for view in views for s in content if s in view),
        not all(
            evenly_held(views[2][s], [views[2][t] for t in later if twins(t, s)]) for s in content
        )
        or not all(evenly_placed(view, positional) for view in views[:2]),
        lengths[0] == 1 or _are_apart(*views),
        _share_tokens(rows[0], [s for s in named if s in rows[0]], rows[1], rows[2]),
        before,
        0 if start is None else lengths[1] - before - lengths[0],
    )


def _are_apart(*views: Mapping[Source, torch.Tensor]) -> bool:
    q, k, v = ({s.root for s in view if s.kind is SourceKind.INPUT} for view in views)
    return bool(q and k & v and not q & (k | v))


_Rows = Mapping[Source, torch.Tensor]
"""Per source, (N,) codes."""


def _steering(q: _Rows, k: _Rows, v: _Rows) -> tuple[list[Source], list[Source]]:
    """Inputs that reach only q, and only k, where tokens that v holds too stand in every place of
    theirs: queries and keys may be turned by tables of their own."""
    held = [s for s in k if s in v and s.kind is SourceKind.INPUT]
    both = [s for s in held if s in q]

    def alone(row: _Rows, others: Sequence[_Rows], tokens: Sequence[Source]) -> list[Source]:
        roots = {s.root for other in others for s in other}
        return [
            s
            for s, codes in row.items()
            if s.kind is SourceKind.INPUT
            and s.root not in roots
            and tokens
            and bool(((codes == NONE) | _held(row, tokens)).all())
        ]

    return alone(q, (k, v), both), alone(k, (q, v), held)


def _held(rows: _Rows, sources: Sequence[Source]) -> torch.Tensor:
    """(N,) bool: where a token of any of the sources stands."""
    return torch.stack([rows[s] != NONE for s in sources]).any(0)


def _share_tokens(q: _Rows, sources: Sequence[Source], *others: _Rows) -> bool:
    """Whether a token that q holds of one of the sources is among those of `others`."""
    return any(
        bool(torch.isin(q[s][q[s] != NONE], codes).any())
        for s in sources
        for row in others
        for other, codes in row.items()
        if other.root is s.root
    )


_Lines = list[torch.Tensor]
"""Per content source, (B or 1, N) codes."""


def _lines(view: Mapping[Source, torch.Tensor], sources: list[Source], tokens: int) -> _Lines:
    return [
        view[s][:, 0].amax(-1).expand(-1, tokens)
        if s in view
        else torch.full((1, tokens), NONE, dtype=torch.int32)
        for s in sources
    ]


def _equal(a: _Lines, b: _Lines) -> bool:
    return all(bool((x == y).all()) for x, y in zip(a, b, strict=True))


def _window(q: _Lines, k: _Lines, v: _Lines) -> int | None:
    """Where the tokens of q stand among the keys and values; None if nowhere, or not once."""
    known = next((i for i, line in enumerate(q) if bool((line[0] != NONE).any())), None)
    if known is None:
        return None
    wanted = q[known].shape[1]
    first = int((q[known][0] != NONE).nonzero()[0])
    hits = (k[known][0] == q[known][0, first]).nonzero().flatten()
    starts = [
        start
        for start in (hits - first).tolist()
        if 0 <= start <= k[known].shape[1] - wanted
        and _equal(q, [line[:, start : start + wanted] for line in k])
    ]
    if len(starts) != 1:
        return None
    (start,) = starts
    same = _equal(q, [line[:, start : start + wanted] for line in v])
    return start if same else None


def _alike(codes: torch.Tensor) -> bool:
    """Whether all heads hold the same tokens."""
    return codes.shape[1] == 1 or bool((codes == codes[:, :1]).all())


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


def _batch_axes_by_last(source: Source, codes: torch.Tensor) -> frozenset[int]:
    lasts = codes.amax((1, 2, 3))
    if codes.shape[0] == 1 or bool((lasts == NONE).any()):
        return frozenset()
    return frozenset(varying_axes(source, lasts))


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
