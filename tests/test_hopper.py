"""The Hopper kernel's own source, run in numpy, against the reference executor."""

import contextlib
import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from gluon_in_numpy import Launcher
from hopper_calls import (  # noqa: F401
    CUBE,
    MIXED,
    RAGGED,
    REFERENCE,
    ROW,
    TEXT,
    WHOLE,
    assert_right,
    make_call,
    padded,
    poisoned_memory,
)
from same_lists import unlisted

from veda_compile.kernels.call import Selection
from veda_compile.kernels.errors import ExecutorError
from veda_compile.kernels.executors import Traits, choose_executor
from veda_compile.kernels.hopper import overlap
from veda_compile.kernels.hopper.executor import HopperExecutor
from veda_compile.kernels.hopper.views import refusal
from veda_compile.kernels.layout import Layout, Video


def unequal(selection: Selection) -> Selection:
    """Lists cut to 0, 1, 2, ... tiles in turn; what is cut off holds a number out of range."""
    width = selection.indices.shape[-1]
    rows = torch.arange(selection.counts.shape[2], dtype=torch.int32)
    counts = torch.minimum(selection.counts, rows % (width + 1))
    past = torch.arange(width) >= counts[..., None]
    return Selection(selection.indices.masked_fill(past, torch.iinfo(torch.int32).max), counts)


CALLS = {
    "ragged, 128": lambda: make_call(RAGGED, 128),
    "ragged, 64 by 64": lambda: make_call(RAGGED, 64, 64),
    "ragged, 128 by 64": lambda: make_call(RAGGED, 128, 64, batch=2),
    "whole tiles": lambda: make_call(WHOLE, density=(1.0,), kv_heads=1),
    "text, two shapes, batch 2": lambda: make_call(TEXT, batch=2, shapes=(CUBE[128], ROW[128])),
    "text, two shapes, 64": lambda: make_call(TEXT, 128, 64, shapes=(CUBE[64], ROW[64])),
    "context": lambda: make_call(MIXED, batch=2),
    "96 channels": lambda: make_call(TEXT, 96, batch=2, shapes=(CUBE[128], ROW[128])),
    "96 channels, tiles of 64, heads apart": lambda: make_call(
        RAGGED, 96, 64, batch=2, by_head=True, kv_heads=1
    ),
    "heads apart": lambda: make_call(TEXT, batch=2, by_head=True),
    "GQA": lambda: make_call(TEXT, tile=64, density=(0.2, 0.4, 0.6, 1.0), batch=2),
    "GQA, heads apart": lambda: make_call(RAGGED, density=(0.2, 0.4), kv_heads=1, by_head=True),
    "smaller than a tile": lambda: make_call(Layout.of(Video(1, 3, 5)), density=(0.5,), kv_heads=1),
    "long and thin": lambda: make_call(
        Layout.of(Video(130, 1, 2)), shapes=((128, 1, 1), (64, 1, 2))
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_agrees_with_the_reference(name: str) -> None:
    call = CALLS[name]()
    assert_right(call, REFERENCE.select(call), Launcher())


@pytest.mark.parametrize("layout", [RAGGED, MIXED], ids=["video alone", "with text"])
def test_rows_of_unequal_length_and_of_none(layout: Layout) -> None:
    call = make_call(layout, tile=64, density=(0.6, 0.9))
    selection = unequal(REFERENCE.select(call))
    assert int(selection.counts.min()) == 0 < int(selection.counts.max())
    assert_right(call, selection, Launcher())


VALID_CALLS = {
    "video alone": lambda: make_call(RAGGED, batch=2),
    "whole tiles": lambda: make_call(WHOLE, tile=64),
    "text": lambda: make_call(TEXT, batch=2, shapes=(CUBE[128], ROW[128])),
    "context": lambda: make_call(MIXED, 128, 64, batch=2, density=(0.4, 1.0)),
    "96 channels": lambda: make_call(TEXT, 96, batch=2, kv_heads=1),
    "heads apart, keep all": lambda: replace(
        make_call(TEXT, 64, 64, batch=2, by_head=True), keep_all=torch.tensor(True)
    ),
}


@pytest.mark.parametrize("name", VALID_CALLS)
def test_keys_that_do_not_count(name: str) -> None:
    call = padded(VALID_CALLS[name]())
    assert_right(call, unlisted(REFERENCE.select(call), call), Launcher())
    every = replace(call, key_valid=torch.ones_like(call.key_valid), keep_all=None)
    every.k.nan_to_num_(0.5)
    assert_right(every, REFERENCE.select(every), Launcher())


def test_no_key_counts() -> None:
    call = make_call(TEXT, batch=2)
    valid = torch.ones(2, TEXT.length, dtype=torch.bool)
    valid[1] = False
    call = replace(call, key_valid=valid)
    selection = REFERENCE.select(replace(call, key_valid=None))
    assert_right(call, selection, Launcher())
    assert not REFERENCE.attend(call, selection)[0][1].any()


def test_rows_that_keep_everything_need_no_list() -> None:
    call = make_call(TEXT, density=(0.3, 1.0), shapes=(CUBE[128], ROW[128]))
    selection = unlisted(REFERENCE.select(call), call)
    tiles = int(selection.counts.max())
    assert selection.indices.shape[-1] < tiles and (selection.counts[:, 0] < tiles).all()
    assert_right(call, selection, Launcher())
    nothing = torch.full((*selection.counts.shape, 1), 2**31 - 1, dtype=torch.int32)
    everything = REFERENCE.select(replace(call, plan=replace(call.plan, density=(1.0, 1.0))))
    assert_right(call, Selection(nothing, everything.counts), Launcher())


@pytest.mark.parametrize("head_dim", [64, 96])
def test_fused_projections_and_shared_keys_are_read_in_place(head_dim: int) -> None:
    call = make_call(RAGGED, head_dim)
    both = torch.randn(1, RAGGED.length, 3, 2, head_dim).half()
    q, k, v = both.unbind(2)
    fused = replace(call, q=q.transpose(1, 2), k=k.transpose(1, 2), v=v.transpose(1, 2))
    assert_right(fused, REFERENCE.select(fused), Launcher())
    shared = replace(call, k=call.k[:, :1].expand_as(call.k), v=call.v[:, :1].expand_as(call.v))
    assert_right(shared, REFERENCE.select(shared), Launcher())


def test_launches_run_side_by_side_and_everything_else_waits() -> None:
    happened: list[tuple[str, ...]] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            happened.append((self.name, "waits for", other.name))

    on, made, current = ["main"], itertools.count(1), Stream("main")

    @contextlib.contextmanager
    def using(stream: Stream):
        on.append(stream.name)
        yield
        on.pop()

    overlap._streams.cache_clear()
    with (
        mock.patch.object(torch.cuda, "current_stream", lambda device: current),
        mock.patch.object(torch.cuda, "Stream", lambda device: Stream(f"side {next(made)}")),
        mock.patch.object(torch.cuda, "stream", using),
    ):
        launches = [lambda i=i: happened.append((on[-1], "launch", str(i))) for i in range(3)]
        for _ in range(2):
            overlap.side_by_side(torch.device("cuda", 0), launches)
    overlap._streams.cache_clear()
    assert happened == 2 * [
        ("side 1", "waits for", "main"),
        ("side 1", "launch", "1"),
        ("side 2", "waits for", "main"),
        ("side 2", "launch", "2"),
        ("main", "launch", "0"),
        ("main", "waits for", "side 1"),
        ("main", "waits for", "side 2"),
    ]


REFUSED = {
    "2 video segments": lambda c: replace(c, layout=Layout.of(Video(1, 6, 13), Video(2, 6, 13))),
    "scale -0.5": lambda c: replace(c, scale=-0.5),
    "channels must be contiguous": lambda c: replace(c, q=c.q.mT.contiguous().mT),
    "first element": lambda c: replace(c, k=torch.cat([c.k, c.k], -1)[..., 1:65]),
    "token stride": lambda c: replace(
        c, v=torch.zeros(1, 234, 132).half()[..., :128].unflatten(-1, (2, 64)).transpose(1, 2)),
    "batch stride must be above": lambda c: replace(
        c, **{n: getattr(c, n).expand(2, -1, -1, -1) for n in "qkv"}),
    "heads must lie": lambda c: replace(
        c, **dict.fromkeys("qkv", torch.zeros(2, 3, 234, 64).half()[:, :2])),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_cannot_run_is_refused_by_name(reason: str) -> None:
    call = REFUSED[reason](make_call(RAGGED))
    assert reason in (refusal(call) or "")
    selection = Selection(torch.empty(0), torch.empty(0))
    with pytest.raises(ExecutorError, match=f"{reason}.*executor='triton' can"):
        HopperExecutor().attend(call, selection)


@pytest.mark.parametrize(
    ("traits", "reason"),
    [
        (Traits("cpu", torch.float16, 128, 128), "device cpu is not cuda"),
        (Traits("cuda", torch.float32, 128, 128), "dtype torch.float32"),
        (Traits("cuda", torch.float16, 32, 128), "32/128 is not one of 64/64, 64/128"),
        (Traits("cuda", torch.float16, 128, 32), "128/32 is not one of"),
    ],
)
def test_traits_it_has_no_launch_for_are_refused(traits: Traits, reason: str) -> None:
    with pytest.raises(ExecutorError, match=f"'hopper' cannot run here: .*{reason}"):
        choose_executor("hopper", traits)


def test_only_its_own_generation_of_gpus_will_do() -> None:
    traits = Traits("cuda", torch.bfloat16, 128, 128)
    for there, capability, ok in (
        (False, None, False),
        (True, (8, 9), False),
        (True, (9, 0), True),
    ):
        with (
            mock.patch.object(torch.cuda, "is_available", lambda there=there: there),
            mock.patch.object(torch.cuda, "get_device_capability", lambda c=capability: c),
        ):
            assert HopperExecutor().verify(traits).ok is ok
