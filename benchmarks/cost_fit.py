"""Costs from measured times: least squares of relative errors, no cost below zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from veda_compile.kernels.cost_model import Work, from_table
from veda_compile.kernels.cost_tables import PLAIN_CPU, TABLES, CostTable

_FILE = Path(__file__).resolve().parents[1] / "kernels" / "cost_tables.py"
_LEAST_FACTOR = 1.15


@dataclass(frozen=True)
class Timed:
    """A measured call: medians in milliseconds; gain is the median of ratios of runs that followed
    each other."""

    name: str
    work: Work
    dense: float
    sparse: float
    gain: float


def fitted(measured: Sequence[Timed], about: str) -> CostTable:
    """The costs that explain the measurements best.

    factor: a call must promise such a gain to run sparse. It is as much as the worst prediction was
    too high, among calls of which dense or sparse is less than twice as fast, and at least 1.15.
    """
    works = [found.work for found in measured]
    dense = costs([work.dense_parts() for work in works], [found.dense for found in measured])
    sparse = costs([work.sparse_parts() for work in works], [found.sparse for found in measured])
    table = CostTable(dense, sparse, 1.0, True, 0, about)
    near = [
        from_table(table, work).gain / found.gain
        for work, found in zip(works, measured, strict=True)
        if 0.5 < found.gain < 2.0  # where a decision can be wrong
    ]
    worst = max(near, default=1.0)
    return table._replace(factor=round(max(worst, _LEAST_FACTOR), 2))


def costs(parts: Sequence[Sequence[float]], times: Sequence[float]) -> tuple[float, ...]:
    """Non-negative costs whose sums over `parts` come nearest to `times`, relative to these."""
    rows = torch.tensor(parts, dtype=torch.float64)
    weights = 1.0 / torch.tensor(times, dtype=torch.float64)
    rows = rows * weights[:, None]
    scale = rows.norm(dim=0).clamp(min=1e-300)
    rows = rows / scale
    wanted = torch.ones(len(times), dtype=torch.float64)
    used = list(range(rows.shape[1]))
    found = torch.zeros(rows.shape[1], dtype=torch.float64)
    while used:
        solved = torch.linalg.lstsq(rows[:, used], wanted[:, None], driver="gelsd").solution[:, 0]
        if bool((solved >= 0.0).all()):
            found[used] = solved
            break
        used.remove(used[int(solved.argmin())])
    return tuple(float(f"{value:.4g}") for value in found / scale)


def write_tables(tables: dict[str, CostTable]) -> None:
    """Put measured tables into kernels/cost_tables.py; what is not among them stays."""
    text = _FILE.read_text()
    head = text[: text.index("PLAIN_CPU = ")]
    lines = [head + f"PLAIN_CPU = {PLAIN_CPU}"]
    lines.append('"""So many times longer sparse calls take where no C++ compiler is."""\n')
    lines.append("TABLES: dict[str, CostTable] = {")
    for name, table in sorted((TABLES | tables).items()):
        lines.append(f'    "{name}": CostTable(')
        for field, value in table._asdict().items():
            shown = f'"{value}"' if isinstance(value, str) else repr(value)
            lines.append(f"        {field}={shown},")
        lines.append("    ),")
    lines.append('}\n"""By device and, where it was measured, dtype."""')
    _FILE.write_text("\n".join(lines) + "\n")
