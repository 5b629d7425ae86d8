"""What this project asks of its kernels, and whether the measurements meet it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.gpu.attention_tables import rest_share
from benchmarks.gpu.results import Record
from benchmarks.gpu.sizes import LONG, WAN_14B
from benchmarks.gpu.table import Grid, ok

_BATCH_2 = f"{WAN_14B.name}, batch 2"
_SHARES = (0.05, 0.1, 0.15, 0.2)

Values = dict[str, float]
"""What was measured, by what it was measured at."""


@dataclass(frozen=True)
class Bar:
    """One demand. wanted: the least value, or the largest where `most`.

    cases: how many values it needs. values: from the records of one device. more: what else is
    told beside them. unit: "x" or "%".
    """

    name: str
    wanted: float
    values: Callable[[Sequence[Record]], Values]
    most: bool = False
    unit: str = "x"
    cases: int = 1
    more: Callable[[Sequence[Record]], str] = lambda records: ""

    def verdict(self, values: Values) -> str:
        """held, missed, not measured, or held as far as it was measured."""
        if not values:
            return "not measured"
        sign = -1.0 if self.most else 1.0
        if any(not sign * value >= sign * self.wanted for value in values.values()):
            return "**missed**"
        return "held" if len(values) >= self.cases else f"held in {len(values)} of {self.cases}"

    def shown(self, value: float) -> str:
        """A value in the bar's unit."""
        return f"{value:.1%}" if self.unit == "%" else f"{value:.2f}x"


def bars_table(records: Sequence[Record]) -> Grid:
    """Every bar with what was measured of it, the worst case first.

    records: of one device, one for each case.
    """
    table = Grid("The bars", ("bar", "wanted", "measured", "verdict"))
    for bar in BARS:
        values = bar.values(records)
        ordered = sorted(values.items(), key=lambda item: item[1], reverse=bar.most)
        told = [f"{bar.shown(value)} ({at})" for at, value in ordered[:6]]
        if len(ordered) > 6:
            told.append(f"{len(ordered) - 6} more")
        more = bar.more(records)
        sign = "at most" if bar.most else "at least"
        table.rows.append(
            (
                bar.name,
                f"{sign} {bar.shown(bar.wanted)}",
                "; ".join(told + [more] * bool(more)) or "nothing yet",
                bar.verdict(values),
            )
        )
    return table


def _layers(records: Iterable[Record], size: str | None, density: float) -> Iterator[Record]:
    """Records of our layers, by the executor that users get."""
    for record in ok(records, "layer"):
        ours = record["stage"] in ("attention", "details") and record["requested"] == "auto"
        if ours and record["density"] == density and size in (None, record["size"]):
            yield record


def _tile_size(record: Record) -> int:
    t, h, w = record["tile"]
    return int(t * h * w)


def _plain(record: Record, tile_size: int) -> bool:
    return _tile_size(record) == tile_size and record["shapes"] == 1


def _layer_speedup(size: str, density: float) -> Callable[[Sequence[Record]], Values]:
    def values(records: Sequence[Record]) -> Values:
        return {
            f"{record['executor']}": record["speedup_layer"]
            for record in _layers(records, size, density)
            if _plain(record, 128)
        }

    return values


def _kernel_share(tile_size: int) -> Callable[[Sequence[Record]], Values]:
    """TFLOP/s over kept tiles as a share of the best dense attention's, which took turns."""

    def values(records: Sequence[Record]) -> Values:
        return {
            f"density {density}": record["kept"] * record["speedup_kernel"]
            for density in _SHARES
            for record in _layers(records, WAN_14B.name, density)
            if _plain(record, tile_size)
        }

    return values


def _rest(density: float) -> Callable[[Sequence[Record]], Values]:
    def values(records: Sequence[Record]) -> Values:
        return {
            record["size"]: rest_share(record)
            for record in _layers(records, None, density)
            if record["size"] in (WAN_14B.name, _BATCH_2, LONG.name) and _plain(record, 128)
        }

    return values


def _steps(density: float) -> Callable[[Sequence[Record]], Values]:
    def values(records: Sequence[Record]) -> Values:
        return {
            f"{record['layers']} of {record['real_layers']} layers": record["speedup"]
            for record in ok(records, "sparse")
            if record["model"] == WAN_14B.name and record["density"] == density
        }

    return values


def _other_steps(records: Sequence[Record]) -> str:
    found = {
        record["density"]: record["speedup"]
        for record in ok(records, "sparse")
        if record["model"] == WAN_14B.name and record["density"] != 0.05
    }
    return ", ".join(f"{found[density]:.2f}x at {density:.0%}" for density in sorted(found))


def _rivals(records: Sequence[Record]) -> Values:
    return {
        f"{record['rival']}, {record['size']}, {record['density']:.0%}": record["ours_faster"]
        for record in ok(records, "rival")
    }


def _field(key: str) -> Callable[[Sequence[Record]], Values]:
    def values(records: Sequence[Record]) -> Values:
        return {
            f"{record['size']}, {record['density']:.0%}": record[key] for record in ok(records, key)
        }

    return values


def _against_portable(records: Sequence[Record]) -> Values:
    """Time of the portable kernel over that of the one for Hopper, on equal calls."""
    times: dict[tuple[object, ...], dict[str, float]] = {}
    for record in ok(records, "attend"):
        if record["stage"] in ("attention", "details") and record["shapes"] == 1:
            key = (record["size"], record["density"], _tile_size(record))
            times.setdefault(key, {})[record["executor"]] = record["attend"]["median"]
    for record in ok(records, "hopper"):  # both in one case, taking turns
        if record["shapes"] != 1:
            continue
        key = (record["size"], record["density"], _tile_size(record))
        times[key] = {name: record[name]["median"] for name in ("hopper", "triton")}
    return {
        f"{size}, {density:.0%}, tile {tile_size}": found["triton"] / found["hopper"]
        for (size, density, tile_size), found in times.items()
        if {"triton", "hopper"} <= set(found)
    }


BARS = (
    Bar("attention, Wan2.1-14B 720p batch 2, density 10 %", 8.0, _layer_speedup(_BATCH_2, 0.1)),
    Bar("attention, Wan2.1-14B 720p batch 2, density 5 %", 14.0, _layer_speedup(_BATCH_2, 0.05)),
    Bar("attention, 245,760 tokens, density 5 %", 15.0, _layer_speedup(LONG.name, 0.05)),
    Bar("TFLOP/s over kept tiles against the best dense, 75,600 tokens, tiles of 128, densities "
        "5-20 %", 0.90, _kernel_share(128), cases=len(_SHARES)),
    Bar("the same with tiles of 64", 0.75, _kernel_share(64), cases=3),
    Bar("everything but the attention kernel, density 10 %", 0.10, _rest(0.1), True, "%", 3),
    Bar("everything but the attention kernel, density 5 %", 0.20, _rest(0.05), True, "%", 3),
    Bar("denoising step, Wan2.1-14B 720p, density 5 %", 2.63, _steps(0.05), more=_other_steps),
    Bar("our kernel against every rival that ran, on the same tiles", 1.0, _rivals),
    Bar("peak memory above dense, as a share of q, k and v", 0.05, _field("memory_above_dense"),
        True, "%"),
    Bar("rounding error against that of dense attention", 1.2, _field("rounding_ratio"), True),
    Bar("the kernel for Hopper against the portable one", 1.25, _against_portable),
)  # fmt: skip
"""Most important first."""
