"""A table of strings, and how times and shapes are written in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.gpu.results import Record


@dataclass(frozen=True)
class Grid:
    """A table. note: what the reader must know."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""


def ok(records: Iterable[Record], key: str) -> Iterable[Record]:
    """Records that hold `key` and are no failure."""
    return (record for record in records if record["status"] == "ok" and key in record)


def ms(timing: Record) -> str:
    """The median, in milliseconds."""
    return f"{timing['median']:.3f}" if timing["median"] < 10 else f"{timing['median']:.1f}"


def spread(timing: Record) -> str:
    """Quartiles, in milliseconds."""
    digits = 3 if timing["median"] < 10 else 1
    return f"{timing['p25']:.{digits}f}-{timing['p75']:.{digits}f}"


def tile(record: Record) -> str:
    """The tile shape, or how many there are."""
    shapes = record.get("shapes", 1)
    shape = "x".join(map(str, record["tile"]))
    return shape if shapes == 1 else f"{shape} and {shapes - 1} others"


def heads(record: Record) -> str:
    """Batch, heads and head_dim."""
    batch = f"{record['batch']} x " if record["batch"] > 1 else ""
    return f"{batch}{record['heads']} of {record['head_dim']}"
