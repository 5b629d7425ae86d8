"""From which length on sparse attention is worth it."""

from __future__ import annotations

_BREAK_EVEN = {"cpu": 2048, "cuda": 8192}


def break_even_tokens(device: str) -> int:
    """Video tokens below which a site on `device` ("cpu", "cuda", ...) stays dense.

    cpu: measured by `python -m benchmarks.attention --break-even` (density 0.2, 4 heads of 64,
        2 cores). At 2,048 tokens whole op calls are 4 to 5.6 times as fast as dense ones by the
        compiled kernels and 1.6 times in plain torch, which loses at 1,024 (0.9).
    Every other device: provisional, not yet measured. Kernel launches cost more there, against
        faster dense attention.
    """
    return _BREAK_EVEN.get(device, _BREAK_EVEN["cuda"])
