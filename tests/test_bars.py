"""The project's bars: measured, held, missed, each by the numbers of the records."""

import pytest

from benchmarks.gpu.bars import BARS, bars_table
from benchmarks.gpu.sizes import LONG, WAN_14B


def timing(median: float) -> dict[str, float]:
    return {"median": median}


def layer(size=WAN_14B.name, density=0.1, tile=(4, 4, 8), executor="triton", **more):
    record = {
        "stage": "attention", "status": "ok", "size": size, "density": density, "tile": tile,
        "shapes": 1, "executor": executor, "requested": "auto", "kept": density,
        "layer": timing(10.0), "attend": timing(9.5), "speedup_layer": 8.5, "speedup_kernel": 9.2,
    }  # fmt: skip
    return record | more


def step(density, speedup):
    return {
        "stage": "model", "status": "ok", "model": WAN_14B.name, "density": density, "layers": 4,
        "real_layers": 40, "sparse": timing(1.0), "speedup": speedup,
    }  # fmt: skip


def rows(*records):
    return {row[0]: row[1:] for row in bars_table(records).rows}


def test_without_records_nothing_is_measured():
    assert len(rows()) == len(BARS)
    assert {row[1:] for row in rows().values()} == {("nothing yet", "not measured")}


@pytest.mark.parametrize(
    ("bar", "record", "verdict"),
    [
        ("batch 2, density 10 %", layer(f"{WAN_14B.name}, batch 2"), "held"),
        ("batch 2, density 5 %", layer(f"{WAN_14B.name}, batch 2", 0.05), "**missed**"),
        ("245,760 tokens", layer(LONG.name, 0.05, speedup_layer=15.0), "held"),
        ("TFLOP/s", layer(), "held in 1 of 4"),
        ("TFLOP/s", layer(kept=0.09), "**missed**"),
        ("tiles of 64", layer(tile=(4, 4, 4), kept=0.08), "**missed**"),
        ("tiles of 64", layer(tile=(4, 4, 4)), "held in 1 of 3"),
        ("kernel, density 10 %", layer(), "held in 1 of 3"),
        ("kernel, density 10 %", layer(attend=timing(8.9)), "**missed**"),
        ("denoising step", step(0.05, 2.63), "held"),
        ("denoising step", step(0.05, 2.62), "**missed**"),
        ("memory", {"stage": "details", "status": "ok", "size": "a", "density": 0.1,
                    "memory_above_dense": 0.051}, "**missed**"),
        ("rounding", {"stage": "details", "status": "ok", "size": "a", "density": 0.1,
                      "rounding_ratio": 1.1}, "held"),
        ("every rival", {"stage": "rivals", "status": "ok", "size": "a", "density": 0.1,
                         "rival": "flex", "ours_faster": 0.9}, "**missed**"),
    ],
)  # fmt: skip
def test_a_bar_is_judged_by_its_records(bar, record, verdict):
    found = [told for name, told in rows(record).items() if bar in name]
    assert verdict in [told[-1] for told in found]
    failed = {**record, "status": "failed"}
    assert {told[-1] for told in rows(failed).values()} == {"not measured"}


def test_other_executors_and_shapes_do_not_count_for_the_default():
    asked = layer(f"{WAN_14B.name}, batch 2", requested="triton")
    mixed = layer(shapes=8)
    assert {told[-1] for told in rows(asked, mixed).values()} == {"not measured"}


def test_the_worst_case_decides_and_stands_first():
    slow = layer(density=0.2, kept=0.2, speedup_kernel=4.0)
    (told,) = [told for name, told in rows(layer(), slow).items() if name.startswith("TFLOP")]
    assert told[1].startswith("0.80x (density 0.2); 0.92x") and told[2] == "**missed**"


def test_hoppers_kernel_is_set_beside_the_portable_one_on_equal_calls():
    portable = layer(requested="triton", attend=timing(13.0))
    (told,) = [
        told
        for name, told in rows(portable, layer(executor="hopper", attend=timing(10.0))).items()
        if "Hopper" in name
    ]
    assert told[1].startswith("1.30x") and told[2] == "held"


def test_two_executors_in_one_case_count_too():
    record = {
        "stage": "attention", "status": "ok", "size": "a", "density": 0.1, "tile": (4, 4, 8),
        "hopper": timing(10.0), "triton": timing(12.0), "speedup": 1.2, "shapes": 1,
    }  # fmt: skip
    (told,) = [told for name, told in rows(record).items() if "Hopper" in name]
    assert told[1].startswith("1.20x") and told[2] == "**missed**"


def test_steps_at_other_densities_are_told():
    (told,) = [t for n, t in rows(step(0.05, 3.0), step(0.2, 1.9)).items() if "step" in n]
    assert told[1] == "3.00x (4 of 40 layers); 1.90x at 20%"
