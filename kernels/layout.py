"""Token layouts: an attention sequence as an ordered list of video and extra segments.

A *video* segment is a T x H x W grid of tokens in raster order (t slowest, w fastest). An *extra*
segment is a run of tokens that stand on no grid: text, registers, references, audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import LayoutError

INTS_PER_SEGMENT = 4
"""A segment travels through the op as (kind, t, h, w); an extra one as (0, length, 1, 1)."""

_EXTRA, _VIDEO = 0, 1


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


Segment = Video | Extra


@dataclass(frozen=True)
class Layout:
    """The segments of one sequence, in order. At least one of them is a video segment."""

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
        """Tokens in all segments together."""
        return sum(segment.length for segment in self.segments)

    @property
    def videos(self) -> tuple[tuple[int, Video], ...]:
        """(first token, segment) of every video segment, in order."""
        found, offset = [], 0
        for segment in self.segments:
            if isinstance(segment, Video):
                found.append((offset, segment))
            offset += segment.length
        return tuple(found)

    def encode(self) -> list[int]:
        """Four integers per segment, the form the op takes."""
        flat: list[int] = []
        for segment in self.segments:
            if isinstance(segment, Video):
                flat += [_VIDEO, *segment.grid]
            else:
                flat += [_EXTRA, segment.length, 1, 1]
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
            if kind == _VIDEO:
                segments.append(Video(t, h, w))
            elif kind == _EXTRA and h == w == 1:
                segments.append(Extra(t))
            else:
                raise LayoutError(f"segment {i // INTS_PER_SEGMENT} is {(kind, t, h, w)}: no such")
        return cls(tuple(segments))

    def check_length(self, tokens: int) -> None:
        """Raise LayoutError unless the segments cover exactly `tokens` tokens."""
        if self.length != tokens:
            raise LayoutError(
                f"layout {self} holds {self.length} tokens but the sequence has {tokens}"
            )

    def __str__(self) -> str:
        parts = [
            f"video {s.t}x{s.h}x{s.w}" if isinstance(s, Video) else f"extra {s.length}"
            for s in self.segments
        ]
        return "[" + ", ".join(parts) + "]"
