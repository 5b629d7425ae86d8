"""The launches of one layer side by side: where one runs out of programs the next has begun."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def _streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    """Streams of their own for `count` launches; the same ones for every layer."""
    return tuple(torch.cuda.Stream(device) for _ in range(count))


def side_by_side(device: torch.device, launches: Sequence[Callable[[], None]]) -> None:
    """Launch all on a GPU, none waiting for another; elsewhere in turn.

    They start after what is on the current stream, and what comes there later waits for all of
    them, so that callers need not know. CUDA graphs capture it as parallel branches.
    """
    if device.type != "cuda":
        for launch in launches:
            launch()
        return
    current = torch.cuda.current_stream(device)
    streams = _streams(device, len(launches) - 1)
    for stream, launch in zip(streams, launches[1:], strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            launch()
    launches[0]()
    for stream in streams:
        current.wait_stream(stream)
