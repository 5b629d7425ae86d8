"""Faults put into the Hopper kernel's source: each is caught, whatever order its roles run in."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from gluon_in_numpy import Launcher
from gluon_memory import Fault
from hopper_calls import (  # noqa: F401
    REFERENCE,
    TEXT,
    assert_right,
    make_call,
    padded,
    poisoned_memory,
)

from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.layout import Extra, Layout, Video


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stages", [2, 3])
def test_roles_may_run_in_any_order(seed: int, stages: int) -> None:
    call = mutation_call()
    assert_right(call, REFERENCE.select(call), Launcher(1000 * seed), stages)


def mutation_call() -> AttentionCall:
    """More steps than stages, a ragged border, tokens of no grid."""
    return make_call(Layout.of(Video(5, 8, 17), Extra(20)), density=(0.5,), kv_heads=1)


WAIT_FULL = "mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)"
MUTATIONS = {
    "keys are not waited for": ("begin_logits", WAIT_FULL, "pass"),
    "values are not waited for": ("begin_values", WAIT_FULL, "pass"),
    "the wrong round is waited for": ("begin_values", "(step // STAGES) & 1", "0"),
    "a stage is filled while in use": (
        "load_step", "mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)", "pass"),
    "the parity of free stages": ("load_step", "& 1) ^ 1", "& 1)"),
    "the bytes expected": ("load_step", "BLOCK_N * D * 2", "BLOCK_N * D * 4"),
    "values are given back too early": (
        "attend_rows",
        "acc = warpgroup_mma_wait(0, deps=[acc])\n"
        "            mbarrier.arrive(v_free.index((step - 1) % STAGES))",
        "mbarrier.arrive(v_free.index((step - 1) % STAGES))\n"
        "            acc = warpgroup_mma_wait(0, deps=[acc])"),
    "logits are used too early": ("attend_rows", "wait(1, deps", "wait(2, deps"),
    "values are never given back": (
        "attend_rows", "mbarrier.arrive(v_free.index((step - 1) % STAGES))", "pass"),
    "the turns' parity": ("attend_rows", "(step ^ group) & 1", "step & 1"),
    "the turn is kept": ("attend_rows", "mbarrier.arrive(turns.index(1 - group))", "pass"),
    "no fence": ("attend_rows", "fence_async_shared()", "pass"),
    "the output is not waited for": ("attend_rows", "wait_for_stores(0)", "pass"),
    "the last values are not waited for": (
        "attend_rows", "wait(0, deps=[acc])\n\n", "wait(1, deps=[acc])\n\n"),
    "no decay of the sum": ("attend_rows", "total * decay", "total"),
    "the place of a tile": ("corner", "(line % tiles_h) * BOX[1]", "(line % tiles_h) * BOX[1] + 1"),
    "the second group's share": ("share_of", "group * (BOX[0] - SHARE[0])", "group * BOX[0]"),
    "a border column too many": ("hide_absent", "column % BOX[2] <", "column % BOX[2] <="),
    "a text key too many": ("hide_absent", "there = column <", "there = column <="),
    "an entry past the list": ("box_at", "mask=(step < listed)", "mask=(step <= listed)"),
    "text is loaded a box late": (
        "load_step", "(run - before_steps) *", "(run - before_steps + 1) *"),
    "no fence after the barriers": (
        "attend_kernel", "fence_async_shared()", "pass"),
    "the barriers' count": (
        "attend_kernel", "k_free.index(stage), GROUPS)", "k_free.index(stage), 1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_faults_are_caught(name: str) -> None:
    function, old, new = MUTATIONS[name]
    call = mutation_call()
    assert_caught(call, function, old, new)


PADDED_MUTATIONS = {
    "rows without a key so far": (
        "shift_of", 'gl.where(highest == -float("inf"), 0.0, shift)', "shift"),
    "keys that do not count": ("hide_absent", "+ columns) >= 0", "+ columns) >= -1"),
    "the keys of another box": ("hide_absent", "box * BLOCK_N", "(box ^ 1) * BLOCK_N"),
    "boxes that lack a key or two": ("hide_absent", "nearly_whole(BLOCK_N)", "nearly_whole(2)"),
    "the keys of another batch element": (
        "attend_kernel", "gl.cast(batch, gl.int64) * boxes * BLOCK_N", "0 * boxes"),
    "the numbers of another batch element": (
        "attend_kernel", "contents_ptr + gl.cast(batch, gl.int64) * boxes", "contents_ptr"),
    "the first box": ("attend_rows", "here = box_at(tile_list, 0,", "here = box_at(tile_list, 1,"),
    "the box of a step": ("attend_rows", "here = box\n", "here = box + 1\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", PADDED_MUTATIONS)
def test_faults_with_padding_are_caught(name: str) -> None:
    function, old, new = PADDED_MUTATIONS[name]
    call = padded(make_call(TEXT, batch=2, density=(0.5, 1.0)))
    assert_caught(call, function, old, new)


def assert_caught(call: AttentionCall, function: str, old: str, new: str) -> None:
    """The last head keeps every tile if its density is 1.0, those without a key too."""
    selection = REFERENCE.select(call)
    if call.plan.density[-1] == 1.0:
        selection.counts[:, -1] = REFERENCE.select(replace(call, key_valid=None)).counts[:, -1]
    past = torch.arange(selection.indices.shape[-1]) >= selection.counts[..., None]
    selection = Selection(selection.indices.masked_fill(past, 2**31 - 1), selection.counts)
    assert_right(call, selection, Launcher(), stages=2)
    launcher = Launcher(edits={function: (old, new)})
    with pytest.raises(AssertionError):  # a Fault, or other numbers
        assert_right(call, selection, launcher, stages=2)
    assert issubclass(Fault, AssertionError)
