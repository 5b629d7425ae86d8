"""Names that differ in numbers alone, written as one: forty equal layers are one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"\d+")
_LISTED = 8


def pattern(name: str) -> str:
    """A name without its numbers: equal for layers of the same kind."""
    return _NUMBER.sub("#", name)


def joint_name(names: Sequence[str]) -> str:
    """One name for names of one pattern, and how many they are: "blocks.0..39.attn1 x40"."""
    return joint_text(names) + (f" x{len(names)}" if len(names) > 1 else "")


def joint_text(texts: Sequence[str]) -> str:
    """One text for texts of one pattern; each number becomes the span of its values."""
    columns = zip(*(map(int, _NUMBER.findall(text)) for text in texts), strict=True)
    spans = [_span(sorted(set(numbers))) for numbers in columns]
    return _NUMBER.sub(lambda _: spans.pop(0), texts[0])


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    more = ",..." if len(numbers) > _LISTED else ""
    return ",".join(map(str, numbers[:_LISTED])) + more
