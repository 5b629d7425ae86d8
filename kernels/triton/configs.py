"""The launch configurations that ship: one table, chosen by hand, no autotuning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

HEAD_DIMS = (64, 96, 128)
TILE_SIZES = (64, 128)


@dataclass(frozen=True)
class AttendConfig:
    """How the forward kernel is launched.

    block_m: query rows per program; block_n: key rows per step; both divide the tile size.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# by (head_dim, tile_size); each compiles without register spills
_HALF = {
    (64, 64): AttendConfig(64, 64, 4, 2),
    (64, 128): AttendConfig(128, 64, 8, 3),
    (96, 64): AttendConfig(64, 32, 4, 3),
    (96, 128): AttendConfig(128, 32, 8, 5),
    (128, 64): AttendConfig(64, 32, 4, 3),
    (128, 128): AttendConfig(128, 32, 8, 5),
}
# where the matrix unit reads operands from shared memory, registers are left for wider steps
_HALF_FROM_SHARED = {
    (64, 64): AttendConfig(64, 64, 4, 3),
    (64, 128): AttendConfig(128, 64, 8, 5),
    (96, 64): AttendConfig(64, 64, 4, 3),
    (96, 128): AttendConfig(128, 64, 8, 5),
    (128, 64): AttendConfig(64, 64, 4, 3),
    (128, 128): AttendConfig(128, 64, 8, 5),
}
# 128 keys a step halve the rescaling of the output per key; registers are full, and so is the
# shared memory, with three steps of keys and values in it
_HALF_ON_HOPPER = _HALF_FROM_SHARED | {
    (96, 128): AttendConfig(128, 128, 8, 5),
    (128, 128): AttendConfig(128, 128, 8, 5),
}
# float32 products are three TF32 ones each, with both parts of each operand in registers
_SINGLE = {
    64: AttendConfig(32, 32, 4, 2),
    96: AttendConfig(16, 32, 4, 2),
    128: AttendConfig(32, 16, 8, 2),
}


def attend_config(
    head_dim: int, tile_size: int, dtype: torch.dtype, generation: int, wide: bool = False
) -> AttendConfig:
    """The forward kernel's launch for calls that `TritonExecutor.verify` accepts.

    generation: see `gpu_generation`. wide: offsets take 64 bits, hence more registers.
    """
    if dtype == torch.float32:
        return _SINGLE[head_dim]
    if generation == 9 and not wide:
        return _HALF_ON_HOPPER[head_dim, tile_size]
    table = _HALF_FROM_SHARED if generation in (9, 10) else _HALF
    return table[head_dim, tile_size]


@lru_cache(maxsize=64)
def gpu_generation(device: torch.device) -> int:
    """The major compute capability, 9 for Hopper; 0 for what is no GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def pool_warps(tile_size: int) -> int:
    """Warps for pooling one tile: at most 64 elements of it per thread, read again when needed."""
    return tile_size // 16


def choose_warps(columns: int) -> int:
    """Warps for choosing among `columns` scores: about 16 of them per thread."""
    return min(max(columns // 512, 1), 16)


@dataclass(frozen=True)
class ProductConfig:
    """How a kernel of feature products is launched.

    rows, columns: of the product, per program (query tiles, and key tiles or features); block_f:
    features per step, a divisor of `FEATURE_STEP`.
    """

    rows: int
    columns: int
    block_f: int
    num_warps: int
    num_stages: int


FEATURE_STEP = 32
"""The number of features of a tile is a multiple of this, as head_dim is."""

WORKSPACE_BYTES = 64 * 2**20
"""What features and scores may take at a time. They always take one line's features and the rows of
its scores that one program makes."""

# each product is three TF32 ones
SCORE_CONFIG = ProductConfig(64, 64, 32, 4, 3)
PROJECT_CONFIG = ProductConfig(32, 128, 16, 4, 3)

MOST_FUSED_COLUMNS = 256
"""Up to so many key tiles scores stay in registers, with two or three programs on a multiprocessor.
Above, one program fills it and waits alone at every halving, which should cost more than sending
scores through the L2 cache; not measured. `fused_config` has launches up to 512."""


def fused_config(columns: int) -> ProductConfig:
    """The launch that scores and chooses in one, for up to 512 columns, a power of two."""
    return ProductConfig(16, columns, 16, max(columns // 32, 1), 3)
