"""Recorded times of GPUs become a cost table."""

import pytest

from benchmarks.gpu.cost_records import LEAST, timed_records
from benchmarks.gpu.results import Results

ABOUT = {"device_type": "cuda", "device": "NVIDIA Z1", "capability": "9.0"}


def timing(median: float, host: float = 0.1) -> dict[str, float]:
    return {"median": median, "host": host}


def break_even(place: int) -> dict[str, object]:
    return {
        "grid": (8, 16, 16), "text": 0, "heads": 12 + place, "batch": 1, "head_dim": 128,
        "density": 0.2, "dtype": "bfloat16", "tile": (4, 4, 4), "best": "sdpa",
        "times": {"sdpa": timing(4.0), "sparse": timing(1.0, host=2.0)},
    }  # fmt: skip


def layer(**changes: object) -> dict[str, object]:
    record = {
        "grid": (8, 16, 16), "text": 256, "heads": 12, "batch": 2, "head_dim": 128, "shapes": 1,
        "density": 0.1, "dtype": "bfloat16", "tile": (4, 4, 4), "requested": "auto",
        "dense_layer": timing(8.0), "layer": timing(2.0),
    }  # fmt: skip
    return record | changes


def test_whole_layers_are_read_with_their_launching(tmp_path, setting):
    results = Results(tmp_path / "gpu.json", ABOUT)
    for place in range(LEAST - 1):
        results.add("break_even", f"{place}", "ok", break_even(place))
    results.add("attention", "ours", "ok", layer())
    results.add("attention", "portable", "ok", layer(requested="triton"))
    results.add("details", "mixed", "ok", layer(shapes=8))
    results.add("attention", "broken", "failed", layer())
    setting.results.add("attention", "on a CPU", "ok", layer())
    found = timed_records(tmp_path)
    assert list(found) == ["cuda 9 bfloat16"]
    calls = found["cuda 9 bfloat16"]
    assert len(calls) == LEAST
    assert (calls[0].dense, calls[0].sparse, calls[0].gain) == (4.0, 2.0, 2.0)
    last = calls[-1]
    assert (last.name, last.gain) == ("ours", 4.0)
    work = last.work
    assert (work.heads, work.video, work.keys, work.tiles) == (24, 2048, 2304, 32.0)
    assert work.kept == pytest.approx(0.1, abs=0.01)


def test_a_handful_of_calls_is_no_table(tmp_path):
    results = Results(tmp_path / "gpu.json", ABOUT)
    results.add("attention", "ours", "ok", layer())
    assert timed_records(tmp_path) == {}
