"""The results for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from .variants import EVERYTHING

Row = dict[str, Any]


def ablation_table(rows: Sequence[Row], clips: int) -> Table:
    """One row for each variant and density, and what it says of the part that differs.

    Ratios are to the variant that has the part: everything, or what the second column says.
    """
    grid = " x ".join(map(str, rows[0]["grid"]))
    made = Table(
        title=f"Relative squared error of attention, {clips} held-out clips, {grid} tokens"
    )
    for column in ("density", "variant", "part left out"):
        made.add_column(column, justify="right" if column == "density" else "left")
    for column in ("kept", "error", "x with it (95 %)", "by head", "x (95 %)", "mass kept"):
        made.add_column(column, justify="right")
    made.add_column("the part")
    last = None
    for row in sorted(rows, key=lambda row: row["density"]):
        if last not in (None, row["density"]):
            made.add_section()
        last = row["density"]
        made.add_row(
            f"{row['density']:.2f}",
            row["variant"] + _against(row),
            row["part"],
            f"{row['kept']:.3f}",
            f"{row['error']:.4f}",
            _ratio(row, "ratio"),
            f"{row['head_error']:.4f}",
            _ratio(row, "head_ratio"),
            f"{row['retained_mass']:.3f}",
            row["verdict"],
        )
    return made


def _against(row: Row) -> str:
    usual = row["against"] in (EVERYTHING, row["variant"])
    return "" if usual else f" (to {row['against']})"


def _ratio(row: Row, name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3f} ({low:.3f}-{high:.3f})"
