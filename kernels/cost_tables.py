"""What the kinds of work of attention cost, by device and dtype; see `cost_model.py`.

Written by `python -m benchmarks.cost_table`; do not edit.
"""

from __future__ import annotations

from typing import NamedTuple


class CostTable(NamedTuple):
    """Costs in milliseconds per unit of work, in the order of `Work.dense_parts` and
    `Work.sparse_parts`; in no unit where not measured.

    factor: the gain a prediction must promise. least_tokens: video tokens below which the table
    promises nothing. about: what it was measured on.
    """

    dense: tuple[float, ...]
    sparse: tuple[float, ...]
    factor: float
    measured: bool
    least_tokens: int
    about: str


PLAIN_CPU = 4.0
"""So many times longer sparse calls take where no C++ compiler is."""

TABLES: dict[str, CostTable] = {
    "cpu bfloat16": CostTable(
        dense=(0.1586, 8.218e-07, 4.807e-08),
        sparse=(0.9005, 0.1177, 2.296e-06, 8.998e-05, 1.193e-06, 1.538e-08),
        factor=1.31,
        measured=True,
        least_tokens=0,
        about="torch 2.13.0+cpu, threads: 1, 42 cases",
    ),
    "cpu float16": CostTable(
        dense=(0.3215, 2.61e-06, 5.649e-08),
        sparse=(0.867, 0.1407, 3.49e-06, 4.124e-05, 1.012e-06, 4.242e-08),
        factor=1.64,
        measured=True,
        least_tokens=0,
        about="torch 2.13.0+cpu, threads: 1, 42 cases",
    ),
    "cpu float32": CostTable(
        dense=(0.1189, 2.915e-07, 5.286e-08),
        sparse=(0.9522, 0.01679, 3.932e-06, 0.0001659, 4.659e-07, 4.46e-08),
        factor=1.41,
        measured=True,
        least_tokens=0,
        about="torch 2.13.0+cpu, threads: 1, 42 cases",
    ),
    "cuda": CostTable(
        dense=(0.0, 0.0, 1.0),
        sparse=(0.0, 0.0, 3072.0, 0.0, 0.0, 1.0),
        factor=1.0,
        measured=False,
        least_tokens=8192,
        about="a guess: as fast per kept pair, overhead of 6,144 keys for each query",
    ),
}
"""By device and, where it was measured, dtype."""
