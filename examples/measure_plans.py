"""Write a sidecar for the reference model: per head a tile shape, and a budget by measured need.

Every self-attention of a few noised data clips is run with every tile shape; each head keeps the
shape with the least relative squared error. Then error is measured at several densities, and the
mean density asked for is spent where it lowers the error most. Takes minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "reference_model")]

from _demo_attention import record_attention  # noqa: E402
from dataset import class_embeddings, make_clips  # noqa: E402
from sampling import load_reference_model  # noqa: E402

from veda_compile.fingerprint import fingerprint, module_tensors  # noqa: E402
from veda_compile.functional import sparse_attention  # noqa: E402
from veda_compile.kernels.layout import Layout, Video  # noqa: E402
from veda_compile.kernels.plan import Plan, TileShape, count_tiles, factorisations  # noqa: E402
from veda_compile.sidecar import GridPlan, LayerCard, ModelCard, Sidecar  # noqa: E402

QKV = tuple[Tensor, Tensor, Tensor]
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
PROBES = ((0, 0.95, 1001), (3, 0.85, 1002), (5, 0.7, 1003), (6, 0.4, 1004))
"""(class, noise level, seed) of the clips measured; the demo uses other seeds."""
MOST_PADDING = 1.3


def probes(model: nn.Module, size: tuple[int, int, int]) -> list[list[QKV]]:
    """q, k, v of every layer, for every probe."""
    calls = []
    for number, level, seed in PROBES:
        label = torch.tensor([number])
        clip = make_clips(label, size, seed)
        noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
        inputs = {
            "hidden_states": (1 - level) * clip + level * noise,
            "timestep": torch.tensor([1000.0 * level]),
            "encoder_hidden_states": class_embeddings(label),
            "return_dict": False,
        }
        calls.append(record_attention(model, inputs))
    return calls


@torch.no_grad()
def head_errors(call: QKV, layout: Layout, plan: Plan) -> Tensor:
    """(H,) relative squared error of sparse attention against dense, per head."""
    dense = F.scaled_dot_product_attention(*call)
    sparse = sparse_attention(*call, layout=layout, plan=plan)
    return (sparse - dense).square().sum((0, 2, 3)) / dense.square().sum((0, 2, 3))


def best_shapes(
    layers: list[list[QKV]], layout: Layout, tile_size: int, density: float
) -> list[list[TileShape]]:
    """Per layer and head the shape with the least mean error over the probes."""
    (_, video), *_ = layout.videos
    least = math.ceil(video.length / tile_size)
    shapes = [
        shape
        for shape in factorisations(tile_size)
        if count_tiles(video.grid, shape) <= MOST_PADDING * least
    ]
    best = []
    for calls in track(layers, "shapes"):
        heads = calls[0][0].shape[1]
        table = torch.stack(
            [
                sum(head_errors(c, layout, Plan.uniform(heads, shape, density)) for c in calls)
                for shape in shapes
            ]
        )
        best.append([shapes[int(i)] for i in table.argmin(0)])
    return best


def error_curves(
    layers: list[list[QKV]], layout: Layout, shapes: list[list[TileShape]]
) -> list[Tensor]:
    """Per layer (densities, H): mean error of each head at `DENSITIES`."""
    curves = []
    for calls, chosen in zip(track(layers, "densities"), shapes, strict=True):
        rows = [
            sum(head_errors(c, layout, Plan(tuple(chosen), (d,) * len(chosen))) for c in calls)
            for d in DENSITIES
        ]
        curves.append(torch.stack(rows) / len(calls))
    return curves


def allocate(curves: list[Tensor], mean: float) -> list[list[float]]:
    """Densities per layer and head whose mean is at most `mean`.

    Each head starts at the lowest; the step with the largest drop in error per density goes first,
    looking over all steps ahead so that flat stretches of a curve do not stop it.
    """
    error = torch.cat([curve.T for curve in curves])  # (heads of all layers, densities)
    place = [0] * len(error)
    budget = mean * len(error) - DENSITIES[0] * len(error)
    while True:
        steps = [
            ((float(error[h, p] - error[h, n])) / (DENSITIES[n] - DENSITIES[p]), h, n)
            for h, p in enumerate(place)
            for n in range(p + 1, len(DENSITIES))
            if DENSITIES[n] - DENSITIES[p] <= budget + 1e-9
        ]
        if not steps or max(steps)[0] <= 0:
            break
        _, head, to = max(steps)
        budget -= DENSITIES[to] - DENSITIES[place[head]]
        place[head] = to
    flat = iter(DENSITIES[p] for p in place)
    return [[next(flat) for _ in range(curve.shape[1])] for curve in curves]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=HERE / "reference_model" / "plans.veda.safetensors"
    )
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--tile-size", type=int, default=64)
    parser.add_argument(
        "--size", type=int, nargs=3, default=(16, 32, 32), help="frames, height, width"
    )
    given = parser.parse_args()
    model = load_reference_model()
    frames, height, width = given.size
    grid = (frames, height // 2, width // 2)
    layout = Layout.of(Video(*grid))
    layers = [list(calls) for calls in zip(*probes(model, tuple(given.size)), strict=True)]
    shapes = best_shapes(layers, layout, given.tile_size, given.density)
    curves = error_curves(layers, layout, shapes)
    densities = allocate(curves, given.density)
    heads, head_dim = layers[0][0][0].shape[1], layers[0][0][0].shape[3]
    cards = tuple(
        LayerCard(f"blocks.{i}.attn1", heads, head_dim, fingerprint(module_tensors(block.attn1)))
        for i, block in enumerate(model.blocks)
    )
    plan = GridPlan(grid, tuple(map(tuple, shapes)), tuple(map(tuple, densities)))
    provenance = {
        "made_by": "examples/measure_plans.py",
        "probes": [list(probe) for probe in PROBES],
        "density": given.density,
    }
    Sidecar(
        ModelCard(type(model).__name__, cards), (plan,), "closed_form", given.tile_size, provenance
    ).save(given.output)


if __name__ == "__main__":
    main()
