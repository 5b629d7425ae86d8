"""Token layouts: an attention sequence as an ordered list of segments.

A *video* segment is a T x H x W grid of tokens in raster order (t slowest, w fastest). An *extra*
segment is a run of tokens that stand on no grid: text, registers, references, audio. A *context*
segment is a run of keys without queries: a cache, or text that is only attended to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .errors import LayoutError

INTS_PER_SEGMENT = 4
"""A segment travels through the op as (kind, t, h, w); without a grid as (kind, length, 1, 1)."""

EXTRA, VIDEO, CONTEXT = 0, 1, 2
"""The kinds of segments in an encoded layout."""


@dataclass(frozen=True)
class Video:
    """A grid of `t` frames, `h` rows and `w` columns of tokens, in raster order."""

    t: int
    h: int
    w: int

    def __post_init__(self) -> None:
        # side by side: min() of symbolic sizes would make a graph depend on their order
        if self.t < 1 or self.h < 1 or self.w < 1:
            raise LayoutError(
                f"video segment {self.t} x {self.h} x {self.w}: every side must be at least 1"
            )

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w)."""
        return (self.t, self.h, self.w)

    @property
    def length(self) -> int:
        """Tokens of the segment."""
        return self.t * self.h * self.w


@dataclass(frozen=True)
class Extra:
    """A run of `length` tokens without a grid; attention to and from them is always exact."""

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise LayoutError(
                f"extra segment of length {self.length}: leave out segments that hold no tokens"
            )


@dataclass(frozen=True)
class Context:
    """A run of `length` keys without queries; attention to them is always exact."""

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise LayoutError(
                f"context segment of length {self.length}: leave out segments that hold no tokens"
            )


Segment = Video | Extra | Context


@dataclass(frozen=True)
class Layout:
    """The segments of one sequence, in order. At least one of them is a video segment.

    The keys are the tokens of all segments, the queries those of all but the context segments.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not any(isinstance(segment, Video) for segment in self.segments):
            raise LayoutError("a layout needs at least one video segment, got none")

    @classmethod
    def of(cls, *segments: Segment) -> Layout:
        """`Layout.of(Video(21, 45, 80), Extra(512))`."""
        return cls(tuple(segments))

    @property
    def length(self) -> int:
        """Tokens in all segments together: the keys."""
        return sum(segment.length for segment in self.segments)

    @property
    def query_length(self) -> int:
        """Tokens in all but the context segments: the queries."""
        return self.length - sum(segment.length for _, segment in self.contexts)

    @property
    def videos(self) -> tuple[tuple[int, Video], ...]:
        """(first key, segment) of every video segment, in order."""
        return tuple((at, s) for at, s in self._placed() if isinstance(s, Video))

    @property
    def contexts(self) -> tuple[tuple[int, Context], ...]:
        """(first key, segment) of every context segment, in order."""
        return tuple((at, s) for at, s in self._placed() if isinstance(s, Context))

    def _placed(self) -> Iterator[tuple[int, Segment]]:
        offset = 0
        for segment in self.segments:
            yield offset, segment
            offset += segment.length

    def encode(self) -> list[int]:
        """Four integers per segment, the form the op takes."""
        flat: list[int] = []
        for segment in self.segments:
            if isinstance(segment, Video):
                flat += [VIDEO, *segment.grid]
            else:
                kind = EXTRA if isinstance(segment, Extra) else CONTEXT
                flat += [kind, segment.length, 1, 1]
        return flat

    @classmethod
    def decode(cls, flat: Sequence[int]) -> Layout:
        """Inverse of `encode`. Raises LayoutError on a malformed list."""
        if not flat or len(flat) % INTS_PER_SEGMENT:
            raise LayoutError(
                f"an encoded layout has {INTS_PER_SEGMENT} integers a segment, got {len(flat)}"
            )
        segments: list[Segment] = []
        for i in range(0, len(flat), INTS_PER_SEGMENT):
            kind, t, h, w = (int(value) for value in flat[i : i + INTS_PER_SEGMENT])
            if kind == VIDEO:
                segments.append(Video(t, h, w))
            elif kind in (EXTRA, CONTEXT) and h == w == 1:
                segments.append(Extra(t) if kind == EXTRA else Context(t))
            else:
                raise LayoutError(f"segment {i // INTS_PER_SEGMENT} is {(kind, t, h, w)}: no such")
        return cls(tuple(segments))

    def check_length(self, keys: int, queries: int | None = None) -> None:
        """Raise LayoutError unless the segments cover exactly so many keys and queries."""
        if self.length != keys:
            raise LayoutError(
                f"layout {self} holds {self.length} tokens but the sequence has {keys}"
            )
        if queries is not None and self.query_length != queries:
            raise LayoutError(
                f"layout {self} has {self.query_length} queries but q holds {queries}"
            )

    def __str__(self) -> str:
        parts = [
            f"video {s.t}x{s.h}x{s.w}"
            if isinstance(s, Video)
            else f"{type(s).__name__.lower()} {s.length}"
            for s in self.segments
        ]
        return "[" + ", ".join(parts) + "]"
