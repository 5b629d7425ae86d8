"""Whether a graph's layers are calibrated, and which model they belong to."""

from __future__ import annotations

import logging

from torch import fx, nn

from .model_search import find_model
from .options import AUTO, Options

logger = logging.getLogger(__name__)


def model_to_calibrate(gm: fx.GraphModule, options: Options) -> nn.Module | None:
    """The model that option `sidecar="auto"` calibrates; None where nothing can be, or need be."""
    if options.sidecar != AUTO or options.density == 1.0:  # which keeps everything in any shape
        return None
    if _has_cuda_graphs(options):
        why = "calls cannot be measured in CUDA graphs: make a sidecar with veda_compile.distill"
    elif (search := find_model(gm)) is None:
        why = "the graph belongs to no model: compile the model itself, not a function around it"
    else:
        return search.model
    logger.info("veda: all heads keep one tile shape, no layer is calibrated: %s", why)
    return None


def _has_cuda_graphs(options: Options) -> bool:
    from torch._inductor import config  # slow to import, and other inner compilers do without

    patched = options.config_patches().get("triton.cudagraphs")
    return bool(config.triton.cudagraphs if patched is None else patched)
