"""The results for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from benchmarks.measured_rows import Row, by_density, with_interval


def attention_table(rows: Sequence[Row], clips: int) -> Table:
    """Mean relative squared error, one column a density; beside it what was kept of the mass."""
    densities = sorted({row["density"] for row in rows})
    made = Table(title=f"Relative squared error of attention, {clips} held-out clips (95 %)")
    made.add_column("rule")
    for density in densities:
        made.add_column(f"{density:.2f}", justify="right")
    last = densities[-1] if len(densities) < 2 else densities[len(densities) // 2]
    for column in ("kept", "retained mass", "Tile Recall", "ms"):
        made.add_column(f"{column} at {last:.2f}", justify="right")
    for name in dict.fromkeys(row["rule"] for row in rows):
        mine = {row["density"]: row for row in rows if row["rule"] == name}
        errors = [with_interval(mine[d], "error", 4) if d in mine else "-" for d in densities]
        made.add_row(name, *errors, *_details(mine.get(last)))
    return made


def _details(row: Row | None) -> tuple[str, ...]:
    """What else the table shows of a rule at one density; dashes where it was not measured."""
    if row is None:
        return ("-",) * 4
    return (
        f"{row['kept']:.3f}",
        f"{row['retained_mass']:.3f}",
        _or_dash(row["tile_recall"]),
        f"{row['ms']:.0f} (dense {row['dense_ms']:.0f})",
    )


def clip_table(rows: Sequence[Row], clips: int) -> Table:
    """PSNR, SSIM and temporal difference error against the dense clips."""
    made = Table(title=f"Clips against dense ones of the same seed, {clips} clips (95 %)")
    for column in ("density", "rule", "kept", "PSNR dB", "SSIM", "temporal difference error"):
        made.add_column(column, justify="left" if column == "rule" else "right")
    for row in by_density(rows, made):
        made.add_row(
            f"{row['density']:.2f}",
            row["rule"],
            f"{row['kept']:.3f}",
            with_interval(row, "psnr", 1),
            with_interval(row, "ssim", 3),
            with_interval(row, "temporal", 4),
        )
    return made


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
