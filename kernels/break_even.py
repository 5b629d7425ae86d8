"""From which length on sparse attention is worth it, as far as the length alone can tell."""

from __future__ import annotations

_BREAK_EVEN = {"cpu": 2048, "cuda": 8192}


def break_even_tokens(device: str) -> int:
    """Video tokens below which sparse attention on `device` is not faster at the default density.

    For calls of which nothing else is known: `cost_model.forecast` knows better. cpu: by plain
    torch, without a C++ compiler. Every other device: provisional, not yet measured.
    """
    return _BREAK_EVEN.get(device, _BREAK_EVEN["cuda"])
