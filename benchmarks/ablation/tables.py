"""The results for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from benchmarks.measured_rows import Row, by_density, with_interval

from .variants import EVERYTHING


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
    for row in by_density(rows, made):
        made.add_row(
            f"{row['density']:.2f}",
            row["variant"] + _against(row),
            row["part"],
            f"{row['kept']:.3f}",
            f"{row['error']:.4f}",
            with_interval(row, "ratio", 3),
            f"{row['head_error']:.4f}",
            with_interval(row, "head_ratio", 3),
            f"{row['retained_mass']:.3f}",
            row["verdict"],
        )
    return made


def _against(row: Row) -> str:
    usual = row["against"] in (EVERYTHING, row["variant"])
    return "" if usual else f" (to {row['against']})"
