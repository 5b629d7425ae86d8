"""Rows of results as tables show them: with their intervals, and parted by density."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

Row = dict[str, Any]


def with_interval(row: Row, name: str, digits: int) -> str:
    """A value and the interval it lies in."""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def by_density(rows: Sequence[Row], made: Table) -> Iterator[Row]:
    """The rows in the order of their densities, with a line in `made` between two of them."""
    last = None
    for row in sorted(rows, key=lambda row: row["density"]):
        if last not in (None, row["density"]):
            made.add_section()
        last = row["density"]
        yield row
