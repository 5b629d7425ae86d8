"""What the commands of `veda` share."""

from __future__ import annotations

import torch

from .errors import OptionsError

EXIT_ERROR = 2
"""Exit code when the input was wrong; the error is one line on stderr."""


def dtype_of(name: str) -> torch.dtype:
    """The dtype that --dtype names. Raises OptionsError."""
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise OptionsError(f"--dtype is {name!r}: must be one of {', '.join(known)}")
    return known[name]
