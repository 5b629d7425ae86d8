"""What the results were measured on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).resolve().parents[2]
_CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def describe(device: str, commit: str | None) -> dict[str, Any]:
    """Device, driver, versions and commit. commit: as told, where the folder has no .git."""
    about: dict[str, Any] = {
        "device_type": device,
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "diffusers": _version("diffusers"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or _commit(),
    }
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        about |= {
            "device": torch.cuda.get_device_name(),
            "capability": f"{major}.{minor}",
            "driver": _ask_gpu("driver_version"),
            "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
            "cudnn": torch.backends.cudnn.version(),
        }
    return about


def clocks() -> dict[str, str] | None:
    """Clocks in MHz, power in W and temperature in C at this moment; None where unreadable."""
    answer = _ask_gpu(",".join(_CLOCKS))
    return answer and dict(zip(_CLOCKS, answer.split(", "), strict=False))


def missing(module: str) -> str | None:
    """Why a module cannot be used, or None where it is installed."""
    found = importlib.util.find_spec(module.partition(".")[0])
    return None if found else f"{module} is not installed"


def _ask_gpu(query: str) -> str | None:
    command = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    return _output(command)


def _commit() -> str:
    return _output(["git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD"]) or "unknown"


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
