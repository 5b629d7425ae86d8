"""How the lists of scored heads are made in steps, so that their workspace stays small."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from ..plan import Plan
from . import configs

_FLOAT = 4  # bytes
_STRIDE_STEP = 16  # rows of scores begin at aligned addresses
_MOST_LINES = 65535  # programs along an axis of a launch


def padded_columns(tiles: int) -> int:
    """Key tiles a program holds that chooses among so many: a power of two."""
    return int(max(triton.next_power_of_2(tiles), 16))


@dataclass(frozen=True)
class Steps:
    """How `total` lines of up to `tiles` tiles are worked on; see `lines` for what lines are.

    lines: of them at a time; rows: query tiles of these that are scored at a time. pooled: floats
    of statistics per tile, features: of what scores are products of. weighted: the features are
    made from the statistics by weights of the plan, else they are the statistics. fused: scores
    stay in registers.
    """

    total: int
    tiles: int
    lines: int
    rows: int
    pooled: int
    features: int
    weighted: bool
    fused: bool

    @property
    def stride(self) -> int:
        """Floats from one row of scores to the next."""
        return _padded(self.tiles, _STRIDE_STEP)

    @property
    def workspace_bytes(self) -> int:
        """What statistics, features and scores take."""
        scores = 0 if self.fused else self.lines * self.rows * self.stride * _FLOAT
        return self.lines * _line_bytes(self) + scores

    @property
    def launches(self) -> int:
        """Kernels launched for all lines."""
        parts = 1 if self.fused else 2 * -(-self.tiles // self.rows)
        return -(-self.total // self.lines) * (1 + self.weighted + parts)


def steps_of(plan: Plan, head_dim: int, total: int, tiles: int) -> Steps:
    """The steps for `total` lines, at least one: as many lines at a time as the workspace holds.

    All rows of evenly many lines; where not even one line's scores fit, some rows of one line.
    """
    weighted = plan.projection is not None or plan.factors is not None
    pooled = head_dim * (1 + 2 * (plan.projection is not None) + (plan.score != "mean"))
    features = pooled
    if weighted:
        rank = head_dim if plan.factors is None else plan.factors.shape[3]
        features = head_dim + _padded(rank, configs.FEATURE_STEP)
    fused = padded_columns(tiles) <= configs.MOST_FUSED_COLUMNS
    one = Steps(total, tiles, 1, tiles, pooled, features, weighted, fused)
    lines = min(configs.WORKSPACE_BYTES // one.workspace_bytes, _MOST_LINES)
    rows = tiles
    if lines:
        lines = -(-total // -(-total // lines))
    else:
        lines, least = 1, configs.SCORE_CONFIG.rows
        room = (configs.WORKSPACE_BYTES - _line_bytes(one)) // (one.stride * _FLOAT)
        rows = tiles if fused else min(max(room // least, 1) * least, tiles)
    return Steps(total, tiles, lines, rows, pooled, features, weighted, fused)


def _line_bytes(steps: Steps) -> int:
    """Statistics and features of the query and the key tiles of one line."""
    return 2 * steps.tiles * (steps.features + steps.pooled * steps.weighted) * _FLOAT


def _padded(number: int, step: int) -> int:
    return -(-number // step) * step
