"""Figures: error and PSNR against density, and error against time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .clip_quality import ROUNDED

Row = dict[str, Any]

_MARKERS = "osv^D<>Pphd*"


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write the figures that a report has numbers for; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    if report["attention"]:
        rows = report["attention"]
        made.append(_curves(rows, "error", "relative squared error", folder / "quality_error.png"))
        made.append(_against_time(rows, folder / "quality_error_time.png"))
    clips = [row for row in report["clips"] if row["rule"] != ROUNDED]
    if clips:
        made.append(_curves(clips, "psnr", "PSNR, dB", folder / "quality_psnr.png"))
    return made


def _style(name: str, number: int) -> dict[str, Any]:
    """Ours in black, oracles dotted and grey, the others in colours of their own."""
    marker = _MARKERS[number % len(_MARKERS)]
    if name.startswith("veda"):
        return {"color": "black", "linewidth": 2.2, "marker": marker}
    if name.startswith("oracle"):
        return {"color": "grey", "linestyle": ":", "marker": marker}
    return {"color": f"C{number % 10}", "marker": marker, "linewidth": 1.2}


def _by_rule(rows: Sequence[Row]) -> dict[str, list[Row]]:
    ordered: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["density"]):
        ordered.setdefault(row["rule"], []).append(row)
    return {name: ordered[name] for name in dict.fromkeys(row["rule"] for row in rows)}


def _curves(rows: Sequence[Row], value: str, label: str, path: Path) -> Path:
    """A value against the density that was really kept, with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, mine) in enumerate(_by_rule(rows).items()):
        kept = [row["kept"] for row in mine]
        style = _style(name, number)
        axes.plot(kept, [row[value] for row in mine], label=name, markersize=4, **style)
        low, high = zip(*(row[f"{value}_interval"] for row in mine), strict=True)
        axes.fill_between(kept, low, high, alpha=0.08, color=style["color"], linewidth=0)
    axes.set_xlabel("density (kept share of tile pairs)")
    axes.set_ylabel(label)
    if value == "error":
        axes.set_yscale("log")
    _finish(figure, axes, path)
    return path


def _against_time(rows: Sequence[Row], path: Path) -> Path:
    """Error against the time of a call as a share of the dense call's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, mine) in enumerate(_by_rule(rows).items()):
        if name.startswith("oracle"):
            continue  # it computes dense attention first
        share = [row["ms"] / row["dense_ms"] for row in mine]
        axes.plot(
            share, [row["error"] for row in mine], label=name, markersize=4, **_style(name, number)
        )
    axes.set_xlabel("time of a call, tiles chosen and attended, over dense (CPU executor)")
    axes.set_ylabel("relative squared error")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _finish(figure, axes, path)
    return path


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
