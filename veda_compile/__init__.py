"""veda-compile: a torch.compile backend that makes video diffusion transformers fast."""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "passes").is_dir():
    # An uninstalled checkout: passes/ and kernels/ stand beside this folder, not inside it.
    __path__.append(str(_root))

from .attach import Attachment, attach  # noqa: E402
from .distill import Job, distill  # noqa: E402
from .errors import (  # noqa: E402
    DistillError,
    ExecutorError,
    LayoutError,
    OptionsError,
    PlanError,
    SidecarError,
    StrictError,
    VedaError,
)
from .functional import sparse_attention  # noqa: E402
from .kernels.layout import Context, Extra, Layout, Video  # noqa: E402
from .kernels.plan import Plan  # noqa: E402
from .report import Report, report, reset_report  # noqa: E402
from .sidecar import Sidecar  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "Context",
    "DistillError",
    "ExecutorError",
    "Extra",
    "Job",
    "Layout",
    "LayoutError",
    "OptionsError",
    "Plan",
    "PlanError",
    "Report",
    "Sidecar",
    "SidecarError",
    "StrictError",
    "VedaError",
    "Video",
    "attach",
    "distill",
    "report",
    "reset_report",
    "sparse_attention",
]
