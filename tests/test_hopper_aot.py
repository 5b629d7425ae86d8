"""The Hopper kernel as it ships compiles, with the instructions it is written for and no spills.

Compiled kernels need a process without the interpreter: one subprocess compiles them all.
"""

import pytest
from ahead_of_time import compiled_by

pytest.importorskip("triton.experimental.gluon")

_SHARED_MEMORY = 227 * 1024
_PER_MULTIPROCESSOR = 228 * 1024
_RESERVED = 1024
"""Bytes of shared memory: a program's most, all programs' on one multiprocessor, the system's."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_by("aot_hopper.py", tmp_path_factory.mktemp("aot"), timeout=900)


def test_every_configuration_was_compiled(compiled):
    found = {(item["head_dim"], item["tile"]) for item in compiled}
    assert found == {(d, s) for d in (64, 96, 128) for s in (64, 128)}
    padded = {(i["head_dim"], i["tile"]) for i in compiled if "padded=True" in i["case"]}
    assert padded == found
    assert any("float16" in item["case"].replace("bfloat16", "") for item in compiled)


def test_no_register_spills(compiled):
    assert [item for item in compiled if item["stack"] or item["spills"]] == []


def test_registers_and_shared_memory_suffice(compiled):
    for item in compiled:
        # all threads at launch, then what the first group of warps may take from the others
        threads, most = (384, 232) if item["groups"] == 2 else (256, 216)
        programs = 1 if item["groups"] == 2 else 2
        assert item["registers"] * threads * programs <= 65536, item
        assert item["highest_register"] < most, item
        assert item["shared"] <= _SHARED_MEMORY, item
        assert programs * (item["shared"] + _RESERVED) <= _PER_MULTIPROCESSOR, item


def test_boxes_are_copied_by_the_tensor_memory_accelerator(compiled):
    for item in compiled:
        with_text = "Extra" in item["case"]
        assert item["boxes"] == ([3, 5] if with_text else [5]), item
        assert item["stores"] == item["groups"] * (3 if with_text else 1), item


def test_products_are_asynchronous_warpgroup_instructions(compiled):
    for item in compiled:
        # 16 channels or keys each: the logits of a step and the values of a step, both twice (the
        # loop and what stands before or after it), with one wait each; serialised there were more
        channels = {64: 64, 96: 128, 128: 128}[item["head_dim"]]
        by_step = channels // 16 + item["tile"] // 16
        assert item["products"] == item["groups"] * 2 * by_step, item
        assert item["waits"] == item["groups"] * 4, item
