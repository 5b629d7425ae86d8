"""A picture of what was chosen: every head's plan, and the tiles that some queries really kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from _demo_attention import plan_of
from torch import Tensor

from veda_compile.functional import sparse_attention
from veda_compile.kernels.budget import kept_density
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.selection import kept_map
from veda_compile.kernels.static_modes import StaticMode, mode_density
from veda_compile.kernels.tiles import tile_table
from veda_compile.options import Options
from veda_compile.planner import Planner
from veda_compile.report import SiteRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QKV = tuple[Tensor, Tensor, Tensor]

QUERIES = ((0.3, 0.3, 0.4), (0.7, 0.6, 0.7))
"""Places of the query tiles shown, as shares of frames, height and width."""

_HEADS_SHOWN = 3
_WORTH_SHOWING = (0.05, 0.6)
"""Densities between which a map says something: not one tile, not nearly all of them."""

_KEPT, _LEFT_OUT, _OUTLINE = (0.16, 0.44, 0.75), (0.86, 0.86, 0.86), "#d4380d"


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """What one head keeps. layer, head: their numbers. density: share of tile pairs kept."""

    layer: int
    head: int
    plan: Plan
    density: float

    @property
    def mode(self) -> StaticMode | None:
        """The head's static mode; None if it is scored."""
        return None if self.plan.modes is None else self.plan.modes[self.head]

    @property
    def shape(self) -> str:
        """The tile shape, as "1x8x8"."""
        return "x".join(map(str, self.plan.tile_shapes[self.head]))

    @property
    def name(self) -> str:
        """The static mode with its reach or number of columns; "scored" without one."""
        if self.mode is None:
            return "scored"
        kind = self.mode.kind.replace("_", "-")
        if kind == "stripe":
            return f"{kind} of {len(self.mode.columns)}"
        reach = {"diagonal": self.mode.reach[:1], "multi-diagonal": self.mode.reach}.get(kind, ())
        return f"{kind} {', '.join(map(str, reach))}".strip()


def head_plans(
    calls: Sequence[QKV], sites: Sequence[SiteRecord], options: Options
) -> list[list[HeadPlan]]:
    """Per layer and head what it keeps; an empty list for a layer that stays dense.

    calls: as `record_attention` returns them. sites: the report's, in the same order.
    """
    planner, found = Planner(options), []
    for layer, ((q, _, _), site) in enumerate(zip(calls, sites, strict=True)):
        if not site.rewritten:
            found.append([])
            continue
        plan, layout = plan_of(planner, site, q), _layout(site)
        modes = plan.modes or (None,) * q.shape[1]
        heads = zip(plan.tile_shapes, plan.density, modes, strict=True)
        found.append(
            [
                HeadPlan(
                    layer,
                    head,
                    plan,
                    kept_density(layout, shape, density)
                    if mode is None
                    else mode_density(layout, shape, mode),
                )
                for head, (shape, density, mode) in enumerate(heads)
            ]
        )
    return found


@torch.no_grad()
def kept_tokens(call: QKV, layout: Layout, chosen: HeadPlan, token: int) -> tuple[Tensor, Tensor]:
    """(kept, own): two (T, H, W) bool on CPU, of batch element 0 and the layout's only video.

    kept: keys in the tiles that the query tile of `token` keeps. own: the tokens of that tile.
    """
    (_, video), *_ = layout.videos
    table = tile_table(layout, chosen.plan.tile_shapes[chosen.head], torch.device("cpu"))
    _, selection = sparse_attention(*call, layout=layout, plan=chosen.plan, return_selection=True)
    tile = int(table.tile_of_token[token])
    kept = kept_map(selection, [chosen.head], table.tiles)[0, 0, tile].nonzero().cpu()
    of_token = table.tile_of_token.view(video.grid)
    return torch.isin(of_token, kept), of_token == tile


def write_plans(
    calls: Sequence[QKV], sites: Sequence[SiteRecord], options: Options, path: Path
) -> Path:
    """Write the picture as a PNG. Arguments as of `head_plans`; some layer must be sparse."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = head_plans(calls, sites, options)
    shown = _telling([head for heads in layers for head in heads])
    names = [site.name for site in sites]
    columns, rows = max(map(len, layers)), len(shown) * len(QUERIES)
    table_height, row_height = 0.5 * len(layers) + 0.9, 0.95
    figure = pyplot.figure(
        figsize=(max(12.0, 1.2 * columns), table_height + row_height * rows + 0.4),
        layout="constrained",
    )
    axes = figure.subplots(
        1 + rows, 1, squeeze=False, height_ratios=[table_height, *[row_height] * rows]
    )[:, 0]
    _draw_table(axes[0], layers, names)
    places = [(head, query) for head in shown for query in QUERIES]
    for axis, (head, query) in zip(axes[1:], places, strict=True):
        layout = _layout(sites[head.layer])
        (_, video), *_ = layout.videos
        t, h, w = (int(share * side) for share, side in zip(query, video.grid, strict=True))
        token = (t * video.h + h) * video.w + w
        kept, own = kept_tokens(calls[head.layer], layout, head, token)
        _draw_frames(axis, kept, own, head.plan.tile_shapes[head.head])
        axis.set_title(
            f"{names[head.layer]}, head {head.head}, {head.name}, {head.shape}: the tile of "
            f"(frame {t}, row {h}, column {w}) keeps {kept.float().mean():.0%} of the video",
            fontsize=8, loc="left",
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _layout(site: SiteRecord) -> Layout:
    assert site.grid is not None
    return Layout.of(Video(*site.grid))


def _telling(heads: Sequence[HeadPlan]) -> list[HeadPlan]:
    """A few heads to show: a static one if there is one, and scored ones of rising density."""
    low, high = _WORTH_SHOWING
    worth = [head for head in heads if low <= head.density <= high] or list(heads)
    worth.sort(key=lambda head: head.density)
    scored = [head for head in worth if head.mode is None]
    static = [head for head in worth if head.mode is not None]
    static = _spread(static, 1 if scored else _HEADS_SHOWN)
    return _spread(scored, _HEADS_SHOWN - len(static)) + static


def _spread(heads: Sequence[HeadPlan], count: int) -> list[HeadPlan]:
    """`count` of them, or all if they are fewer, evenly spread."""
    count = min(count, len(heads))
    return [heads[(2 * i + 1) * len(heads) // (2 * count)] for i in range(count)]


def _draw_table(axis: Axes, layers: Sequence[Sequence[HeadPlan]], names: Sequence[str]) -> None:
    """One row a layer, one cell a head: colour is density, text says what it keeps by."""
    columns = max(map(len, layers))
    density = np.full((len(layers), columns), np.nan)
    for heads in layers:
        for head in heads:
            density[head.layer, head.head] = head.density
            axis.text(
                head.head,
                head.layer,
                f"{head.name}\n{head.shape}   {head.density:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                style="normal" if head.mode is None else "italic",
                color="white" if head.density > 0.5 else "black",
            )
    image = axis.imshow(density, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axis.figure.colorbar(image, ax=axis, label="density", pad=0.01, fraction=0.03)
    axis.set_xticks(range(columns), [f"head {head}" for head in range(columns)], fontsize=8)
    axis.set_yticks(
        range(len(layers)),
        [name if heads else f"{name} (dense)" for name, heads in zip(names, layers, strict=True)],
        fontsize=8,
    )
    axis.set_title(
        "Each head: scored or a static mode (italics), tile shape (frames x rows x columns of "
        "tokens), density.\nBelow: the keys kept (blue) by a query tile (outlined), by frame.",
        fontsize=9, loc="left",
    )  # fmt: skip


def _draw_frames(axis: Axes, kept: Tensor, own: Tensor, shape: tuple[int, int, int]) -> None:
    """All frames of a token grid side by side, kept keys filled, the query's own tile outlined."""
    from matplotlib.patches import Rectangle

    frames, height, width = kept.shape
    pixels = np.where(kept[..., None].numpy(), _KEPT, _LEFT_OUT)
    for t in range(frames):
        left = t * (width + 1)
        axis.imshow(pixels[t], extent=(left, left + width, height, 0), interpolation="nearest")
        axis.vlines(range(left, left + width, shape[2]), 0, height, colors="white", linewidths=0.4)
        axis.hlines(range(0, height, shape[1]), left, left + width, colors="white", linewidths=0.4)
        inside = own[t].nonzero()
        if len(inside):
            (top, start), (bottom, end) = inside.amin(0).tolist(), inside.amax(0).tolist()
            axis.add_patch(
                Rectangle(
                    (left + start, top), end - start + 1, bottom - top + 1,
                    fill=False, edgecolor=_OUTLINE, linewidth=1.6,
                )
            )  # fmt: skip
    axis.set_xlim(-0.5, frames * (width + 1) - 0.5)
    axis.set_ylim(height + 0.5, -0.5)
    axis.axis("off")
