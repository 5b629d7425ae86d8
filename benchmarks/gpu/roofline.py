"""What a call should take on an H200 by counting bytes and operations; nothing here is measured.

    python -m benchmarks.gpu.roofline

B batch, H heads, N tokens, D head_dim, n tiles, F features of a tile. bfloat16, one tile shape,
closed-form scores, all heads scored. Times are sums over launches, none overlapping:

- pool:   2 B H N D * 2 bytes from memory, and 2 B H n F * 4 bytes of statistics to it
- scores: 2 B H n^2 F operations, each done as three TF32 ones, while a program reads the features
          of its query tiles and of its key tiles from the L2 cache: the longer of the two
- choice: B H n rows of C = n padded to a power of two, `HALVINGS` times a comparison, a choice and
          a sum per column; not fused, every score is written to the L2 cache and read from it
- attend: 4 B H N^2 D * density operations
- and `LAUNCH` for every launch

Memory above dense attention, at most at once: features and scores, lists of B H n * (longest list)
int32, the LSE and the tables of one tile shape. It is counted as if all were alive together; in
fact the workspace is free again before output and LSE are made.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.sizes import SIZES, Size
from veda_compile.kernels.budget import tiles_to_keep
from veda_compile.kernels.plan import Plan, count_tiles, least_padding_shape
from veda_compile.kernels.triton.configs import SCORE_CONFIG, fused_config
from veda_compile.kernels.triton.steps import Steps, padded_columns, steps_of

# assumptions, all of them: peaks from data sheets, shares of them by experience with such kernels
BANDWIDTH = 4.8e12 * 0.7
"""Bytes per second of scattered rows of 256 bytes."""
CACHE_BANDWIDTH = 5.5e12 * 0.6
"""Bytes per second of the L2 cache."""
HALF = 790e12 * 0.76
"""Operations per second of the attention kernel. A faster kernel raises the shares of the rest."""
TF32 = 395e12 * 0.35
"""Operations per second of warp-wide TF32 products whose operands are split on the way."""
INTEGER = 132 * 64 * 1.7e9 * 0.5
"""Integer operations per second."""
HALVINGS = 20
"""Until the k-th of some hundred scores and the next differ: sign, exponent, half the mantissa."""
LAUNCH = 4e-6
"""Seconds per launch."""
BYTES_SHARE = 0.05
"""Memory above dense attention allowed, in shares of q, k and v."""


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of one call."""

    size: Size
    tile_size: int
    density: float
    steps: Steps
    pool: float
    select: float
    attend: float
    memory: int
    allowed: float

    @property
    def share(self) -> float:
        """Everything but the attention kernel, over it."""
        return (self.pool + self.select) / self.attend


def estimate(size: Size, density: float, tile_size: int = 128) -> Estimate:
    """By the formulas above."""
    shape = least_padding_shape(size.layout, tile_size)
    tiles = sum(count_tiles(video.grid, shape) for _, video in size.layout.videos)
    plan = Plan.uniform(size.heads, shape, density)
    steps = steps_of(plan, size.head_dim, size.batch * size.heads, tiles)
    groups = -(-steps.total // steps.lines)
    statistics = 2 * steps.total * tiles * steps.features * 4
    half_bytes = 2 * steps.total * size.tokens * size.head_dim
    pool = (2 * half_bytes + statistics) / BANDWIDTH + groups * LAUNCH
    select = _select(steps) + (steps.launches - groups) * LAUNCH
    attended = steps.total * size.tokens**2
    keep = tiles_to_keep(size.layout, shape, density).sum(1)
    memory = (
        steps.workspace_bytes
        + steps.total * (tiles * (int(keep.max()) + 1) + size.tokens) * 4
        + 2 * tiles * tile_size * 4
    )
    return Estimate(
        size,
        tile_size,
        density,
        steps,
        pool,
        select,
        size.flops(attended * density) / HALF + LAUNCH,
        memory,
        BYTES_SHARE * 3 * half_bytes,
    )


def _select(steps: Steps) -> float:
    """Scores and choice, without launches."""
    columns = padded_columns(steps.tiles)
    config = fused_config(columns) if steps.fused else SCORE_CONFIG
    wide = -(-steps.tiles // config.columns)
    programs = steps.total * wide * -(-steps.tiles // config.rows)
    products = programs * config.rows * config.columns * steps.features
    read = programs * (config.rows + config.columns) * steps.features * 4
    through = 0 if steps.fused else 2 * steps.total * steps.tiles * steps.stride * 4
    rows = steps.total * steps.tiles
    return (
        max(3 * 2 * products / TF32, read / CACHE_BANDWIDTH)
        + through / CACHE_BANDWIDTH
        + HALVINGS * 3 * rows * columns / INTEGER
    )


def table() -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| size | tile | density | pool, ms | scores + choice, ms | attention, ms | all but that, "
        "shares of it | launches | workspace, MB | above dense, MB | allowed, MB |",
        "|" + "---|" * 11,
    ]
    for size in SIZES:
        for tile_size in (128, 64) if size.tokens > 200_000 else (128,):
            for density in (0.1, 0.05):
                e = estimate(size, density, tile_size)
                lines.append(
                    f"| {size.name} | {tile_size} | {density} | {1e3 * e.pool:.3f} "
                    f"| {1e3 * e.select:.3f} | {1e3 * e.attend:.2f} | {e.share:.1%} "
                    f"| {e.steps.launches} | {e.steps.workspace_bytes / 1e6:.1f} "
                    f"| {e.memory / 1e6:.1f} | {e.allowed / 1e6:.1f} |"
                )
    return lines


if __name__ == "__main__":
    print("\n".join(table()))  # noqa: T201
