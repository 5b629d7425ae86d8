"""The demo, run as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import missing
from benchmarks.gpu.stage import Job, Setting, SkippedError

_ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = _ROOT / "examples" / "quickstart.py"
_NEEDS = ("diffusers", "imageio", "av", "matplotlib")


def jobs(setting: Setting) -> Iterator[Job]:
    """One job."""
    yield Job("quickstart", partial(_run, setting), 30.0)


def _run(setting: Setting) -> dict[str, Any]:
    for module in _NEEDS:
        reason = missing(module)
        if reason is not None:
            raise SkippedError(f"the demo needs it: {reason}")
    with tempfile.TemporaryDirectory() as pictures:
        return _quickstart(setting, pictures)


def _quickstart(setting: Setting, pictures: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu.register", str(_SCRIPT), "--json"]
    command += ["--device", setting.device, "--output", pictures]
    if setting.smoke:
        command += ["--inner", "eager", "--steps", "1", "--clips", "1", "--size", "4", "16", "16"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=_ROOT,
        env=os.environ | {"PYTHONPATH": _python_path()}, timeout=max(setting.seconds_left, 10.0),
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.split())[-280:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"result": found}


def _python_path() -> str:
    """The checkout, the demo's own folder and what was there before."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join(str(p) for p in (_ROOT, _SCRIPT.parent, given) if p)
