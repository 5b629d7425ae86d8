"""Makes `backend="veda"` known where the package is not installed, then runs a script:
`python -m benchmarks.gpu.register SCRIPT ARGUMENTS...`."""

from __future__ import annotations

import runpy
import sys

import torch._dynamo

from veda_compile.backend import veda


def register() -> None:
    """Nothing where an installed package has told torch already."""
    if "veda" not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(veda, name="veda")


if __name__ == "__main__":
    register()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
