"""Where the kernel for Hopper was faster: GPU records become `kernels/kernel_tables.py`.

What counts is the attention of executors "hopper" and "triton" timed in turn on the same lists, of
each case on each kind of GPU the newest record. Each side takes the longer of its device's and its
host's time, as where nothing runs ahead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from benchmarks.gpu.results import Record, Results
from veda_compile.kernels.kernel_tables import Kind

_FILE = Path(__file__).resolve().parents[1] / "kernels" / "kernel_tables.py"
_BESIDE = "hopper beside triton"

LEAST_GAIN = 1.02
"""What is not faster than this in every case is not told from noise, and stays as it is."""


@dataclass(frozen=True)
class Measured:
    """gains: how many times as fast the kernel for Hopper was, case by case.

    failed: the cases in which it failed, by generation: a kernel that is wrong, or hangs, is no
    choice, however fast.
    """

    gains: dict[Kind, list[float]] = field(default_factory=dict)
    failed: dict[int, list[str]] = field(default_factory=dict)

    def table(self, known: dict[Kind, float]) -> dict[Kind, float]:
        """`known` with the least gains of what was measured; without what was not faster."""
        found = {kind: gain for kind, gain in known.items() if kind not in self.gains}
        for kind, gains in self.gains.items():
            if min(gains) > LEAST_GAIN:
                found[kind] = round(min(gains), 3)
        return {kind: found[kind] for kind in sorted(found) if kind.generation not in self.failed}


def kernel_records(folder: Path) -> Measured:
    """What the results in a folder tell."""
    newest: dict[tuple[str, ...], Record] = {}
    for path in sorted(folder.glob("*.json")):
        for record in Results.load(path).records:
            if record["machine"]["device_type"] == "cuda" and record["status"] != "skipped":
                key = (record["machine"]["device"], record["stage"], record["case"])
                key += (str(record.get("requested")),)
                if key not in newest or newest[key]["date"] <= record["date"]:
                    newest[key] = record
    measured = Measured()
    for record in newest.values():
        generation = int(str(record["machine"]["capability"]).partition(".")[0])
        beside = _BESIDE in record["case"]
        if record["status"] == "failed" and (beside or record.get("requested") == "hopper"):
            measured.failed.setdefault(generation, []).append(record["case"])
        elif record["status"] == "ok" and "hopper" in record and "triton" in record:
            size = math.prod(record["tile"])
            kind = Kind(generation, record["dtype"], record["head_dim"], size)
            ours, portable = (
                max(record[name]["median"], record[name]["host"]) for name in ("hopper", "triton")
            )
            measured.gains.setdefault(kind, []).append(portable / ours)
    return measured


def write_table(table: dict[Kind, float]) -> None:
    """Put a table into kernels/kernel_tables.py."""
    text = _FILE.read_text()
    start = text.index("FASTER: ")
    end = text.index('"""', start)
    lines = [f'    Kind({k[0]}, "{k[1]}", {k[2]}, {k[3]}): {gain!r},' for k, gain in table.items()]
    body = "\n".join(["{", *lines, "}"]) if lines else "{}"
    _FILE.write_text(f"{text[:start]}FASTER: dict[Kind, float] = {body}\n{text[end:]}")


def shown(measured: Measured, table: dict[Kind, float]) -> Table:
    """What was measured, and what it comes to."""
    found = Table(title='The kernel for Hopper beside the portable one, and what "auto" means')
    for column in ("GPU", "dtype", "head_dim", "tile", "cases", "least gain", "auto"):
        found.add_column(column, justify="right")
    for kind, gains in sorted(measured.gains.items()):
        chosen = "hopper" if kind in table else "triton"
        numbers = (*map(str, kind), str(len(gains)), f"{min(gains):.3f}x", chosen)
        found.add_row(*numbers)
    for generation, cases in sorted(measured.failed.items()):
        told = f"failed: {cases[0]}" + (f" and {len(cases) - 1} more" if len(cases) > 1 else "")
        found.add_row(str(generation), "", "", "", told, "", "triton")
    return found
