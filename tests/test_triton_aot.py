"""Every kernel as it ships compiles for each GPU generation, without register spills.

Compiled and interpreted kernels cannot share a process: one subprocess compiles them all.
"""

import itertools

import pytest
from ahead_of_time import compiled_by

pytest.importorskip("triton")

_SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_by("aot_compile.py", tmp_path_factory.mktemp("aot"), timeout=1500)


def test_every_kernel_and_shape_was_compiled(compiled):
    for capability in _SHARED_MEMORY:
        of_one = [item for item in compiled if item["capability"] == capability]
        assert {item["kernel"] for item in of_one} == {
            "keys",
            "attend",
            "choose",
            "place",
            "pool",
            "project",
            "score",
            "score_choose",
        }
        shapes = {
            (item["dtype"], item["constants"]["HEAD_DIM"], item["constants"]["TILE"])
            for item in of_one
            if item["kernel"] == "attend"
        }
        wanted = {(t, d, s) for t in ("bf16", "fp32") for d in (64, 96, 128) for s in (64, 128)}
        assert shapes == wanted | {("fp16", 128, 128)}


def test_selection_is_compiled_with_and_without_the_flag(compiled):
    for kernel in ("choose", "place", "score_choose"):
        flags = {item["constants"]["FLAGGED"] for item in compiled if item["kernel"] == kernel}
        assert flags == {True, False}


def test_the_forward_is_compiled_with_offsets_of_both_widths(compiled):
    widths = {item["constants"]["WIDE"] for item in compiled if item["kernel"] == "attend"}
    assert widths == {True, False}


def test_statistics_are_compiled_for_all_heads_and_for_some(compiled):
    for kernel in ("choose", "pool", "score", "score_choose"):
        picked = {item["constants"]["PICKED"] for item in compiled if item["kernel"] == kernel}
        assert picked == {True, False}


def test_every_count_of_tiles_was_compiled(compiled):
    """Up to 256 in registers as it ships, and up to 512 if that is asked for."""
    for kernel, wanted in (
        ("score_choose", {16, 32, 64, 128, 256, 512}),
        ("choose", {512, 1024, 2048, 4096}),
    ):
        found = [
            (item["capability"], item["constants"]["COLUMNS"])
            for item in compiled
            if item["kernel"] == kernel
        ]
        assert set(found) == set(itertools.product(_SHARED_MEMORY, wanted))


def test_no_register_spills(compiled):
    assert [item for item in compiled if item["stack"] > 0] == []


def test_shared_memory_suffices(compiled):
    assert [item for item in compiled if item["shared"] > _SHARED_MEMORY[item["capability"]]] == []


def test_hopper_uses_warpgroup_products(compiled):
    halves = [
        item
        for item in compiled
        if item["kernel"] == "attend" and item["capability"] == 90 and item["dtype"] != "fp32"
    ]
    assert halves
    assert [item for item in halves if item["wgmma"] == 0] == []
