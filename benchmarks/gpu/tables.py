"""The records of each stage as a table: rows of strings, for the terminal and for Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.gpu.results import Record


@dataclass(frozen=True)
class Grid:
    """A table. note: what the reader must know."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""


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


def _dense(records: Iterable[Record]) -> Grid:
    table = Grid(
        "Dense attention",
        ("size", "tokens", "heads", "kernel", "ms", "p25-p75", "TFLOP/s"),
    )
    for record in _ok(records, "baselines"):
        for name, row in record["baselines"].items():
            about = (record["size"], str(record["tokens"]), _heads(record), name)
            if "skipped" in row:
                table.rows.append((*about, "-", row["skipped"][:40], "-"))
            else:
                table.rows.append((*about, _ms(row), _spread(row), f"{row['tflops']:.0f}"))
    return table


def _sparse(records: Iterable[Record]) -> Grid:
    table = Grid(
        "Sparse attention against the best dense one",
        ("size", "density", "kept", "dense ms", "layer ms", "p25-p75", "select ms", "attend ms",
         "TFLOP/s kept", "layer", "kernel", "error"),
        note="Dense and sparse take turns. layer: the whole op, selection included, and its output "
        "joined for the projection. kernel: attend alone. TFLOP/s counts kept tiles alone. error: "
        "relative, against exact attention over the same tiles in sampled rows.",
    )  # fmt: skip
    for record in _ok(records, "layer"):
        table.rows.append(
            (
                record["size"],
                str(record["density"]),
                f"{record['kept']:.3f}",
                _ms(record["dense_layer"]),
                _ms(record["layer"]),
                _spread(record["layer"]),
                _ms(record["select"]),
                _ms(record["attend"]),
                f"{record['attend']['tflops']:.0f}",
                f"{record['speedup_layer']:.2f}x",
                f"{record['speedup_kernel']:.2f}x",
                f"{record['errors']['exact']:.1e}",
            )
        )
    return table


def _steps(records: Iterable[Record]) -> Grid:
    table = Grid(
        "Where a sparse layer's time goes (ms of its GPU kernels)",
        ("size", "density", "statistics and scores", "selection", "attend", "host ms"),
    )
    for record in _ok(records, "steps"):
        times = (f"{spent:.3f}" for spent in record["steps"].values())
        host = f"{record['layer']['host']:.3f}"
        table.rows.append((record["size"], str(record["density"]), *times, host))
    return table


def _rivals(records: Iterable[Record]) -> Grid:
    table = Grid(
        "Other kernels on the same lists",
        ("size", "density", "kernel", "ms", "TFLOP/s kept", "against dense", "with permutation ms",
         "plan ms", "error"),
        note="Tokens are in tile order beforehand; 'with permutation' brings them there and back. "
        "plan: turning the lists into the kernel's own form.",
    )  # fmt: skip
    for record in _ok(records, "rival"):
        permuted = record.get("with_permutation")
        plan = record["plan_ms"] if "plan_ms" in record else record["plan"]["median"]
        table.rows.append(
            (
                record["size"],
                str(record["density"]),
                record["rival"],
                _ms(record["kernel"]),
                f"{record['kernel']['tflops']:.0f}",
                f"{record['speedup_kernel']:.2f}x",
                _ms(permuted) if permuted else "-",
                f"{plan:.2f}",
                f"{record['errors']['exact']:.1e}",
            )
        )
    return table


def _models(records: Iterable[Record]) -> Grid:
    table = Grid(
        "One denoising step under torch.compile, random weights",
        ("model", "layers", "what", "ms", "p25-p75", "speed-up", "rewritten", "to dense",
         "compile s", "GiB"),
        note="to dense: relative difference of the outputs; random weights make it no measure of "
        "quality. It is a check at density 1.0 alone.",
    )  # fmt: skip
    for record in _ok(records, "model"):
        sparse = record.get("sparse")
        what = f"veda, density {record['density']}" if sparse else record["case"].split(", ")[-1]
        table.rows.append(
            (
                record["model"],
                f"{record['layers']} of {record['real_layers']}",
                what,
                _ms(sparse or record["dense"]),
                _spread(sparse or record["dense"]),
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
    for record in _ok(records, "result"):
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
    for record in _ok(records, "times"):
        times = record["times"]
        table.rows.append(
            (
                str(record["heads"]),
                str(record["tokens"]),
                "x".join(map(str, record["tile"])),
                _ms(times[record["best"]]),
                _ms(times["sparse"]),
                f"{times['sparse']['host']:.3f}",
                f"{record['speedup']:.2f}x",
                f"{record['speedup_with_launching']:.2f}x",
            )
        )
    return table


def _least_tokens(records: Sequence[Record]) -> str:
    """From which length on sparse is faster at every measured length."""
    sentences = []
    for heads in sorted({record["heads"] for record in _ok(records, "times")}):
        found = [record for record in _ok(records, "times") if record["heads"] == heads]
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
    for record in _ok(records, "config"):
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
                    _ms(row),
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


def _ok(records: Iterable[Record], key: str) -> Iterable[Record]:
    return (record for record in records if record["status"] == "ok" and key in record)


def _ms(timing: Record) -> str:
    return f"{timing['median']:.3f}" if timing["median"] < 10 else f"{timing['median']:.1f}"


def _spread(timing: Record) -> str:
    digits = 3 if timing["median"] < 10 else 1
    return f"{timing['p25']:.{digits}f}-{timing['p75']:.{digits}f}"


def _heads(record: Record) -> str:
    batch = f"{record['batch']} x " if record["batch"] > 1 else ""
    return f"{batch}{record['heads']} of {record['head_dim']}"


_TABLES: dict[str, tuple[Callable[[Sequence[Record]], Grid], ...]] = {
    "check": (_check,),
    "attention": (_dense, _sparse, _steps, _rivals),
    "model": (_models,),
    "demo": (_demo,),
    "break_even": (_break_even,),
    "tune": (_tune,),
}
