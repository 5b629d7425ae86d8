"""The launch configurations that ship: one table, chosen by hand, no autotuning."""

from __future__ import annotations

from dataclasses import dataclass

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


_HALF = {
    # (head_dim, tile_size)
    (64, 64): AttendConfig(64, 64, 4, 3),
    (64, 128): AttendConfig(128, 64, 8, 3),
    (96, 64): AttendConfig(64, 64, 4, 3),
    (96, 128): AttendConfig(128, 64, 8, 3),
    (128, 64): AttendConfig(64, 64, 4, 3),
    (128, 128): AttendConfig(128, 64, 8, 3),
}
_SINGLE = {
    (64, 64): AttendConfig(64, 32, 4, 2),
    (64, 128): AttendConfig(64, 32, 4, 2),
    (96, 64): AttendConfig(64, 32, 8, 2),
    (96, 128): AttendConfig(64, 32, 8, 2),
    (128, 64): AttendConfig(64, 32, 8, 2),
    (128, 128): AttendConfig(64, 32, 8, 2),
}


def attend_config(head_dim: int, tile_size: int, dtype: torch.dtype) -> AttendConfig:
    """The forward kernel's launch for calls that `TritonExecutor.verify` accepts."""
    table = _SINGLE if dtype == torch.float32 else _HALF
    return table[head_dim, tile_size]


def pool_warps(head_dim: int, tile_size: int) -> int:
    """Warps for pooling one tile: about 64 elements of it per thread."""
    return 4 if head_dim == 64 or tile_size == 64 else 8


def choose_warps(columns: int) -> int:
    """Warps for choosing among `columns` scores: about 16 of them per thread."""
    return min(max(columns // 512, 1), 16)
