"""Where sparse attention begins to pay."""


def break_even_tokens(device: str) -> int:
    """Video tokens below which dense attention is faster on a device type."""
    return 2048 if device == "cpu" else 8192
