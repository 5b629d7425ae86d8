"""The records of each stage as a table: rows of strings, for the terminal and for Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from benchmarks.gpu.attention_tables import (
    dense_table,
    memory_table,
    rivals_table,
    rounding_table,
    sparse_table,
    steps_table,
)
from benchmarks.gpu.results import Record
from benchmarks.gpu.table import Grid, ms, ok, spread


def tables(stage: str, records: Sequence[Record]) -> list[Grid]:
    """The tables of one stage; what failed or was skipped stands in the last one."""
    found = [make(records) for make in _TABLES[stage]]
    found.append(_left_out(stage, records))
    return [table for table in found if table.rows]


def _check(records: Iterable[Record]) -> Grid:
    counts = Counter(record["status"] for record in records)
    worst = max((r["error"] for r in records if r["status"] == "ok"), default=0.0)
    return Grid(
        "Kernels against the reference",
        ("passed", "failed", "skipped", "largest |error|"),
        [(*(str(counts[s]) for s in ("ok", "failed", "skipped")), f"{worst:.1e}")],
    )


def _models(records: Iterable[Record]) -> Grid:
    table = Grid(
        "One denoising step under torch.compile, random weights",
        ("model", "layers", "what", "ms", "p25-p75", "speed-up", "rewritten", "to dense",
         "compile s", "GiB"),
        note="to dense: relative difference of the outputs; random weights make it no measure of "
        "quality. It is a check at density 1.0 alone.",
    )  # fmt: skip
    for record in ok(records, "model"):
        sparse = record.get("sparse")
        what = f"veda, density {record['density']}" if sparse else record["case"].split(", ")[-1]
        table.rows.append(
            (
                record["model"],
                f"{record['layers']} of {record['real_layers']}",
                what,
                ms(sparse or record["dense"]),
                spread(sparse or record["dense"]),
                f"{record['speedup']:.2f}x" if sparse else "-",
                f"{record['rewritten']} of {record['sites']}" if sparse else "-",
                f"{record['difference_to_dense']:.1e}" if sparse else "-",
                str(record["compile_s"]),
                str(record["peak_gib"]),
            )
        )
    return table


def _demo(records: Iterable[Record]) -> Grid:
    table = Grid("The demo", ("density", "step", "attention", "PSNR dB", "SSIM"))
    for record in ok(records, "result"):
        result = record["result"]
        table.rows.append(
            (
                str(result["density"]),
                f"{result['speedup_step']:.2f}x",
                f"{result['speedup_attention']:.2f}x",
                str(result["psnr_db"]),
                str(result["ssim"]),
            )
        )
    return table


def _break_even(records: Sequence[Record]) -> Grid:
    table = Grid(
        "Break-even at density 0.2",
        ("heads", "tokens", "tile", "dense ms", "sparse ms", "host ms", "speed-up",
         "with launching"),
        note="with launching: each side takes the longer of its device's and its host's time, as "
        f"where nothing runs ahead. {_least_tokens(records)}",
    )  # fmt: skip
    for record in ok(records, "times"):
        times = record["times"]
        table.rows.append(
            (
                str(record["heads"]),
                str(record["tokens"]),
                "x".join(map(str, record["tile"])),
                ms(times[record["best"]]),
                ms(times["sparse"]),
                f"{times['sparse']['host']:.3f}",
                f"{record['speedup']:.2f}x",
                f"{record['speedup_with_launching']:.2f}x",
            )
        )
    return table


def _least_tokens(records: Sequence[Record]) -> str:
    """From which length on sparse is faster at every measured length."""
    sentences = []
    for heads in sorted({record["heads"] for record in ok(records, "times")}):
        found = [record for record in ok(records, "times") if record["heads"] == heads]
        slow = max((r["tokens"] for r in found if r["speedup_with_launching"] < 1.0), default=0)
        fast = [r["tokens"] for r in found if r["tokens"] > slow]
        least = f"from {min(fast):,} tokens on" if fast else "at no length measured"
        sentences.append(f"With {heads} heads sparse is faster, launching counted, {least}.")
    return " ".join(sentences)


def _tune(records: Iterable[Record]) -> Grid:
    table = Grid(
        "Launch configurations: the shipped one, then the three fastest",
        ("head_dim", "tile", "configuration", "ms", "TFLOP/s kept", "against shipped"),
    )
    kinds: dict[tuple[int, int], list[Record]] = {}
    for record in ok(records, "config"):
        if record["stage"] == "tune":
            kinds.setdefault((record["head_dim"], record["tile_size"]), []).append(record)
    for (head_dim, tile_size), found in kinds.items():
        shipped = [record for record in found if record["shipped"]]
        fastest = sorted(found, key=lambda record: record["attend"]["median"])[:3]
        for record in shipped + [record for record in fastest if not record["shipped"]]:
            config = ", ".join(f"{name} {value}" for name, value in record["config"].items())
            row = record["attend"]
            ratio = shipped[0]["attend"]["median"] / row["median"] if shipped else float("nan")
            table.rows.append(
                (
                    str(head_dim),
                    str(tile_size),
                    config + (" (shipped)" if record["shipped"] else ""),
                    ms(row),
                    f"{row['tflops']:.0f}",
                    f"{ratio:.2f}x",
                )
            )
    return table


def _left_out(stage: str, records: Iterable[Record]) -> Grid:
    table = Grid(f"Failed or skipped in {stage}", ("case", "status", "why"))
    for record in records:
        if record["status"] != "ok":
            table.rows.append((record["case"], record["status"], str(record.get("error"))[:160]))
    return table


_TABLES: dict[str, tuple[Callable[[Sequence[Record]], Grid], ...]] = {
    "check": (_check,),
    "attention": (dense_table, sparse_table, steps_table),
    "details": (sparse_table, memory_table, rounding_table),
    "model": (_models,),
    "rivals": (dense_table, rivals_table),
    "demo": (_demo,),
    "break_even": (_break_even,),
    "tune": (_tune,),
}
