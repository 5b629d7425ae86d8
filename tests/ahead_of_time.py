"""Compiling for GPUs where there is none, in a process apart from the interpreter's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def compiled_by(program: str, folder: Path, timeout: float) -> list[dict[str, Any]]:
    """What a program of this folder writes to the path it is given: JSON.

    Compiled and interpreted kernels cannot share a process. folder: for its files, Triton's too.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    result = folder / "result.json"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), str(result)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(result.read_text())
    return found
