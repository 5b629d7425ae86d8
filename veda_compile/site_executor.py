"""What the calls of a rewritten site run on, as far as its graph shows."""

from __future__ import annotations

import math

import torch

from .kernels.call import AttentionCall
from .kernels.executors import Choice, Traits, choose
from .kernels.layout import Context, Extra, Layout, Video
from .kernels.plan import Plan
from .passes.analyse import Finding
from .passes.layout import SiteLayout
from .passes.rewrite import hides_keys


def site_executor(requested: str, finding: Finding, tile_size: int) -> Choice:
    """The executor of a site that is rewritten, with tiles of so many tokens.

    Strides and addresses are known at run time alone: what they rule out is logged there.
    """
    dims = finding.dims
    assert dims is not None
    traits = Traits(dims.device, dims.dtype, dims.head_dim, tile_size)
    choice = choose(requested, traits)
    if requested != "auto" or choice.name != "hopper":
        return choice
    return choose(requested, traits, _stand_in(finding, tile_size))


def _stand_in(finding: Finding, tile_size: int) -> AttentionCall:
    """A call like those of the site, on device meta, stored as most models do, (B, N, H, D)."""
    dims, site = finding.dims, finding.site
    assert dims is not None and finding.layout is not None
    layout = _segments(finding.layout)

    def tensor(tokens: int, heads: int) -> torch.Tensor:
        shape = (dims.batch, tokens, heads, dims.head_dim)
        return torch.empty(shape, dtype=dims.dtype, device="meta").transpose(1, 2)

    k = tensor(layout.length, dims.kv_heads)
    valid = None
    if hides_keys(finding):
        valid = torch.empty((dims.batch, layout.length), dtype=torch.bool, device="meta")
    return AttentionCall(
        tensor(layout.query_length, dims.heads),
        k,
        k,
        layout,
        Plan.uniform(dims.heads, (1, 1, tile_size), 1.0),
        1.0 / math.sqrt(dims.head_dim) if site.scale is None else site.scale,
        valid,
    )


def _segments(layout: SiteLayout) -> Layout:
    """The layout of the call that is compiled."""
    before, after = ([Context(n)] if n else [] for n in (layout.before, layout.after))
    runs = [Extra(run.length) if run.grid is None else Video(*run.grid) for run in layout.runs]
    return Layout((*before, *runs, *after))
