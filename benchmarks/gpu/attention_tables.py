"""The tables of one layer's attention: dense, sparse, memory, rounding, rivals."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.gpu.results import Record
from benchmarks.gpu.table import Grid, heads, ms, ok, spread, tile


def dense_table(records: Iterable[Record]) -> Grid:
    """Every dense kernel by size."""
    table = Grid(
        "Dense attention",
        ("size", "tokens", "heads", "kernel", "ms", "p25-p75", "TFLOP/s"),
    )
    for record in ok(records, "baselines"):
        for name, row in record["baselines"].items():
            about = (record["size"], str(record["tokens"]), heads(record), name)
            if "skipped" in row:
                table.rows.append((*about, "-", row["skipped"][:40], "-"))
            else:
                table.rows.append((*about, ms(row), spread(row), f"{row['tflops']:.0f}"))
    return table


def sparse_table(records: Iterable[Record]) -> Grid:
    """Our layer by size and density."""
    table = Grid(
        "Sparse attention against the best dense one",
        ("size", "tile", "executor", "density", "kept", "dense ms", "layer ms", "p25-p75",
         "select ms", "attend ms", "TFLOP/s kept", "layer", "kernel", "rest", "error"),
        note="Dense and sparse take turns. layer: the whole op, selection included, and its output "
        "joined for the projection. kernel: attend alone. rest: the share of the layer that is not "
        "the attention kernel. TFLOP/s counts kept tiles alone. error: relative, against exact "
        "attention over the same tiles in sampled rows.",
    )  # fmt: skip
    for record in ok(records, "layer"):
        table.rows.append(
            (
                record["size"],
                tile(record),
                record["executor"],
                str(record["density"]),
                f"{record['kept']:.3f}",
                ms(record["dense_layer"]),
                ms(record["layer"]),
                spread(record["layer"]),
                ms(record["select"]),
                ms(record["attend"]),
                f"{record['attend']['tflops']:.0f}",
                f"{record['speedup_layer']:.2f}x",
                f"{record['speedup_kernel']:.2f}x",
                f"{rest_share(record):.1%}",
                f"{record['errors']['exact']:.1e}",
            )
        )
    return table


def rest_share(record: Record) -> float:
    """The share of a sparse layer's time that is not its attention kernel, at least 0."""
    return max(1.0 - record["attend"]["median"] / record["layer"]["median"], 0.0)


def memory_table(records: Iterable[Record]) -> Grid:
    """Peaks of whole calls."""
    table = Grid(
        "Peak memory of a sparse layer's call above a dense one",
        ("size", "density", "q, k, v MiB", "dense MiB", "sparse MiB", "cached MiB", "above dense"),
        note="Peaks above q, k and v, outputs included; above dense as a share of q, k and v. "
        "cached: what the first call leaves for later ones, counted too.",
    )
    for record in ok(records, "memory_above_dense"):
        sizes = (record[f"{name}_bytes"] for name in ("qkv", "dense", "sparse", "cached"))
        table.rows.append(
            (
                record["size"],
                str(record["density"]),
                *(f"{size / 2**20:.1f}" for size in sizes),
                f"{record['memory_above_dense']:.1%}",
            )
        )
    return table


def rounding_table(records: Iterable[Record]) -> Grid:
    """Errors against float64."""
    table = Grid(
        "Rounding: relative L2 error against float64 on the same tokens",
        ("size", "density", "executor", "ours", "dense", "ours / best dense"),
        note="Dense attention gets the keys that a tile of queries keeps, in the same dtype.",
    )
    for record in ok(records, "rounding_ratio"):
        errors = dict(record["rounding"])
        ours = errors.pop("ours")
        table.rows.append(
            (
                record["size"],
                str(record["density"]),
                record["executor"],
                f"{ours:.2e}",
                ", ".join(f"{name} {error:.2e}" for name, error in errors.items()),
                f"{record['rounding_ratio']:.3f}",
            )
        )
    return table


def steps_table(records: Iterable[Record]) -> Grid:
    """GPU time by step."""
    table = Grid(
        "Where a sparse layer's time goes (ms of its GPU kernels)",
        ("size", "density", "statistics and scores", "selection", "attend", "host ms"),
    )
    for record in ok(records, "steps"):
        times = (f"{spent:.3f}" for spent in record["steps"].values())
        host = f"{record['layer']['host']:.3f}"
        table.rows.append((record["size"], str(record["density"]), *times, host))
    return table


def rivals_table(records: Iterable[Record]) -> Grid:
    """Other kernels beside ours."""
    table = Grid(
        "Other kernels on the same lists",
        ("size", "density", "tile", "kernel", "ms", "TFLOP/s kept", "against dense", "ours ms",
         "ours faster", "with permutation ms", "plan ms", "error"),
        note="Kernels alone, taking turns with ours on the same tiles. The others get their tokens "
        "in tile order beforehand; 'with permutation' brings them there and back. plan: turning "
        "the lists into the kernel's own form.",
    )  # fmt: skip
    for record in ok(records, "rival"):
        permuted = record.get("with_permutation")
        table.rows.append(
            (
                record["size"],
                str(record["density"]),
                tile(record),
                record["rival"],
                ms(record["kernel"]),
                f"{record['kernel']['tflops']:.0f}",
                f"{record['speedup_kernel']:.2f}x",
                ms(record["ours"]),
                f"{record['ours_faster']:.2f}x",
                ms(permuted) if permuted else "-",
                f"{record['plan_ms']:.2f}",
                f"{record['errors']['exact']:.1e}",
            )
        )
    return table
