"""What a distillation chose, as a table."""

from __future__ import annotations

from collections import Counter

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .distilled_plan import LayerChoice
from .distilled_sidecar import held_out_figures
from .distiller import Distiller


def job_table(learned: Distiller, model_class: str) -> RenderableType:
    """One table per grid: what each layer's heads take, and how good it is."""
    head = (
        f"{model_class}: {len(learned.layers)} layers, {learned.measured} of {learned.calls} calls "
        f"measured in {learned.runs} generations"
    )
    parts: list[RenderableType] = [Text(head)]
    for grid in learned.grids():
        names = [name for name in learned.layers if (name, grid) in learned.studies]
        choices = learned.choices(grid)
        table = Table(title=f"grid {grid[0]} x {grid[1]} x {grid[2]}")
        for column in ("layer", "tile shapes", "static heads", "density", "error"):
            table.add_column(column, overflow="fold")
        for name in names:
            table.add_row(name, *_row(choices[name]))
        parts.append(table)
        if len(names) == len(learned.layers):
            figures = held_out_figures(learned, grid, choices)
            of = "calls set apart" if figures["calls"] == "set apart" else "the calls learned from"
            parts.append(
                Text(
                    f"relative squared error of the attention output on {of}: "
                    f"{_shown(figures['error'])} at mean density {figures['density']:.3f}; "
                    f"{_shown(figures['uniform'])} with the same density for all heads, "
                    f"{_shown(figures['oracle'])} choosing by true mass; "
                    f"mass retained {_shown(figures['retained_mass'])} of the oracle's"
                )
            )
        else:
            parts.append(Text("not all layers have been measured yet"))
    return Group(*parts)


def _row(choice: LayerChoice) -> tuple[str, str, str, str]:
    scored = [head for head in choice.heads if head.mode is None]
    shapes = Counter("x".join(map(str, head.shape)) for head in scored)
    modes = Counter(head.mode.kind for head in choice.heads if head.mode is not None)
    density = [head.density for head in choice.heads]
    error = sum(h.error * w for h, w in zip(choice.heads, choice.weights, strict=True))
    return (
        ", ".join(f"{count} {name}" for name, count in shapes.most_common()) or "-",
        ", ".join(f"{count} {name}" for name, count in modes.most_common()) or "-",
        f"{sum(density) / len(density):.3f} ({min(density):.3f}-{max(density):.3f})",
        f"{error:.4f}",
    )


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
