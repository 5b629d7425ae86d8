"""Builds and loads the compiled CPU kernels."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("cpu_attend.cpp", "cpu_select.cpp"))
_HEADERS = tuple(_FOLDER / name for name in ("cpu_common.h", "cpu_products.h"))
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The kernels' numbers of the dtypes they take."""


_GRAIN = 1 << 15


def threads_for(elements: int) -> int:
    """Threads that work on so many elements is worth: each costs what some 10^4 elements do."""
    return max(1, min(torch.get_num_threads(), elements // _GRAIN))


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded on this machine; the message says why."""


class TensorView(ctypes.Structure):
    """`Tensor` of the C++ sources: where a (B, H, N, D) tensor lies, strides in elements."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("column", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, x: torch.Tensor) -> TensorView:
        """The view of x, which must outlive it."""
        return cls(x.data_ptr(), *x.stride())


@lru_cache(maxsize=4)
def load_library(march: str = "native") -> ctypes.CDLL:
    """The kernels, compiled for this CPU on first use and kept in the user's cache folder.

    The folder is $XDG_CACHE_HOME/veda_compile (~/.cache/veda_compile). A build is used again only
    for the same sources, compiler and instruction set. Raises BuildError.

    march: the instruction set, as the compiler's -march names it.
    """
    compiler = _find_compiler()
    command = [compiler, *_FLAGS, f"-march={march}"]
    try:
        # names the compiler's version and every instruction set that "native" stands for here
        target = subprocess.run(
            [*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=True
        ).stdout
        sources = b"".join(path.read_bytes() for path in _SOURCES + _HEADERS)
        key = hashlib.sha256(sources + target + " ".join(_FLAGS).encode()).hexdigest()
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = root / "veda_compile" / f"cpu-{key[:24]}.so"
        if not path.exists():
            _build(command, path)
        library = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        message = error.stderr.decode(errors="replace").strip()
        raise BuildError(f"{compiler} failed: {message}") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        raise BuildError(f"the compiled kernels cannot be stored or loaded: {error}") from error
    for function in (library.veda_attend, library.veda_statistics, library.veda_choose):
        function.argtypes = [ctypes.c_void_p]
        function.restype = None
    return library


def _find_compiler() -> str:
    """$CXX, else g++, else clang++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C++ compiler found (looked for {', '.join(names)})")


def _build(command: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        subprocess.run(
            [*command, "-o", str(fresh), *map(str, _SOURCES)], capture_output=True, check=True
        )
        fresh.replace(path)  # atomic: of several processes that build at once, any may win
