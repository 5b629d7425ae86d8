"""Executor "auto" on GPUs: the kernel for Hopper where it was measured faster, and never silently.

The GPU is pretended, and the kernel's source runs in numpy.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton.experimental.gluon")

from gluon_in_numpy import Launcher
from toys import latents, toy

import veda_compile
from veda_compile import planner, site_executor
from veda_compile.explain import explain
from veda_compile.explain_subject import Subject
from veda_compile.kernels import executors
from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.errors import ExecutorError
from veda_compile.kernels.executors import Choice, Executor, Traits, choose, choose_executor
from veda_compile.kernels.hopper import attend as hopper_attend
from veda_compile.kernels.hopper import executor as hopper_executor
from veda_compile.kernels.hopper import views
from veda_compile.kernels.kernel_tables import FASTER, Kind
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.reference import ReferenceExecutor
from veda_compile.report import Report, SiteRecord

HALF = Traits("cuda", torch.float16, 64, 64)
KIND = Kind(9, "float16", 64, 64)


@pytest.fixture(autouse=True)
def empty_table() -> Iterator[None]:
    hopper_executor._warn_once.cache_clear()
    with mock.patch.dict(FASTER, clear=True):
        yield


@pytest.fixture
def on_hopper() -> Iterator[None]:
    with capability(9, 0):
        yield


@pytest.fixture
def measured(on_hopper: None) -> None:
    FASTER[KIND] = 1.31


def capability(*pretended: int) -> AbstractContextManager[Any]:
    return mock.patch.multiple(
        torch.cuda, is_available=lambda: True, get_device_capability=lambda: pretended
    )


def traits() -> Iterator[Traits]:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for dtype, head_dim, tile in itertools.product(dtypes, (64, 96, 128), (64, 128)):
        yield Traits("cuda", dtype, head_dim, tile)


@pytest.mark.usefixtures("on_hopper")
def test_without_a_measurement_auto_means_triton() -> None:
    for found in traits():
        assert choose("auto", found) == Choice("triton")
        assert choose_executor("auto", found).name == "triton"


@pytest.mark.usefixtures("measured")
def test_what_was_measured_faster_is_chosen_and_nothing_else() -> None:
    for found in traits():
        wanted = "hopper" if found == HALF else "triton"
        assert choose("auto", found) == Choice(wanted)
        assert choose_executor("auto", found).name == wanted
    assert choose("triton", HALF) == Choice("triton")
    assert choose("auto", replace(HALF, device="cpu")).name == "cpu"
    assert choose("auto", replace(HALF, device="xpu")).name == "triton"
    for other in ((8, 9), (10, 0)):
        with capability(*other):
            assert choose("auto", HALF) == Choice("triton")


@pytest.mark.usefixtures("measured")
def test_where_the_kernel_cannot_run_the_reason_is_told() -> None:
    with capability(9, 4):
        name, reason = choose("auto", HALF)
        assert choose_executor("auto", HALF).name == name == "triton"
    assert "1.31x" in reason and "(9, 4)" in reason
    with mock.patch.object(torch.version, "hip", "7.0"):  # such a 9 is another maker's
        assert choose("auto", HALF) == Choice("triton")
        assert not hopper_executor.HopperExecutor().verify(HALF).ok
    ours = [n for n in sys.modules if n.startswith("veda_compile.kernels.hopper")]
    with mock.patch.dict(sys.modules, {"triton.experimental.gluon": None}):
        for name in ours:
            del sys.modules[name]
        name, reason = choose("auto", HALF)
        assert choose_executor("auto", HALF).name == name == "triton"
    assert "Gluon" in reason


def make_call() -> AttentionCall:
    layout = Layout.of(Video(3, 6, 9))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, layout.length, 2, 64, generator=generator).half().transpose(1, 2)
        for _ in range(3)
    )
    return AttentionCall(q, k, v, layout, Plan.uniform(2, (4, 4, 4), 0.5), 0.15)


def run(executor: Executor, call: AttentionCall) -> int:
    """Programs of the kernel for Hopper in a call with right results."""
    launcher = Launcher()
    with mock.patch.object(hopper_attend, "attend_kernel", launcher):
        selection = executor.select(call)
        out, lse = executor.attend(call, selection)
    right, right_lse = ReferenceExecutor().attend(call, selection)
    torch.testing.assert_close(out, right, rtol=3e-3, atol=3e-3)
    torch.testing.assert_close(lse, right_lse, rtol=1e-3, atol=1e-3)
    return launcher.programs


@pytest.mark.usefixtures("measured")
def test_chosen_calls_run_on_the_kernel(caplog: pytest.LogCaptureFixture) -> None:
    assert run(choose_executor("auto", HALF), make_call()) > 0
    FASTER.clear()
    assert run(choose_executor("auto", HALF), make_call()) == 0
    assert not caplog.records


REFUSED: dict[str, Callable[[AttentionCall], AttentionCall]] = {
    "channels must be contiguous": lambda c: replace(c, q=c.q.mT.contiguous().mT),
    "first element": lambda c: replace(c, k=torch.cat([c.k, c.k], -1)[..., 1:65]),
    "scale -0.5": lambda c: replace(c, scale=-0.5),
    "2 video segments": lambda c: replace(c, layout=Layout.of(Video(1, 6, 9), Video(2, 6, 9))),
}


@pytest.mark.usefixtures("measured")
def test_refused_calls_run_on_triton_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for count, (reason, change) in enumerate(REFUSED.items(), 1):
        call = change(make_call())
        for _ in range(2):
            assert run(choose_executor("auto", HALF), call) == 0
        assert len(caplog.records) == count
        text = caplog.messages[-1]
        assert reason in text and "on executor 'triton' in place of 'hopper'" in text
        executor = choose_executor("hopper", HALF)
        with pytest.raises(ExecutorError, match=reason):
            executor.attend(call, executor.select(call))
        told = choose("auto", HALF, call)
        assert told.name == "triton" and reason in told.reason
    assert choose("auto", HALF, make_call()) == Choice("hopper")


class Model(torch.nn.Module):
    """One attention over a (B, 128, T, H, W) latent, two heads of 64."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.project = torch.nn.Linear(128, 128).half().requires_grad_(False)
        self.options = options

    def forward(self, latent: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.project(latent.flatten(2).transpose(1, 2))
        x = x.unflatten(2, (2, 64)).transpose(1, 2)
        valid = None if mask is None else mask[:, None, None, :]
        return scaled_dot_product_attention(x, x, x, attn_mask=valid, **self.options)


def site_of(
    model: torch.nn.Module, *more: torch.Tensor, fake: bool = False, **options: Any
) -> tuple[SiteRecord, Report]:
    """What the report says of the model's attention on a GPU like Hopper."""
    inputs = (torch.ones(1, 128, 3, 6, 9, dtype=torch.float16), *more)
    mode = None
    if fake:
        mode = FakeTensorMode()
        _without_values(model, mode)
        inputs = tuple(mode.from_tensor(x) for x in inputs)
    chosen = {"sidecar": None, "min_tokens": 0, "density": 0.5, **options}
    # not torch's own answers, which Dynamo asks for as well
    pretended = mock.Mock(return_value=(9, 0))
    with (
        mock.patch.object(executors, "capability_here", pretended),
        mock.patch.object(hopper_executor, "capability_here", pretended),
    ):
        report = explain(Subject(model, inputs, mode), chosen).report
    (site,) = report.sites
    assert site.rewritten, site.explanation
    return site, report


def _without_values(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.nn.Parameter(mode.from_tensor(parameter.data), requires_grad=False)
            module.register_parameter(name, fake)


@pytest.mark.usefixtures("fresh_compiler")
class TestReport:
    def test_it_names_what_was_measured_faster(self) -> None:
        site, _ = site_of(Model())
        assert (site.executor, site.executor_reason) == ("triton", None)
        FASTER[KIND] = 1.31
        site, report = site_of(Model())
        assert (site.executor, site.executor_reason) == ("hopper", None)
        assert "hopper" in str(report) and "measured faster" not in str(report)
        site, _ = site_of(Model(), executor="triton")
        assert (site.executor, site.executor_reason) == ("triton", None)

    def test_the_tiles_of_the_plan_decide(self) -> None:
        FASTER[Kind(9, "float16", 64, 128)] = 1.5
        assert site_of(Model(), tile_size=64)[0].executor == "triton"
        assert site_of(Model(), tile_size=128)[0].executor == "hopper"

    @pytest.mark.parametrize("fake", [False, True])
    def test_calls_that_are_known_to_be_refused_run_on_triton(self, fake: bool) -> None:
        FASTER[KIND] = 1.31
        site, report = site_of(Model(scale=-1.0), fake=fake)
        assert site.executor == "triton" and "scale -1.0" in str(site.executor_reason)
        data = report.to_dict()["graphs"][0]["sites"][0]
        assert data["executor_reason"] == site.executor_reason
        printed = " ".join(str(report).split())
        assert "measured faster: triton: hopper, measured 1.31x as fast" in printed
        assert "scale -1.0: must be above 0" in printed

    @pytest.mark.parametrize("fake", [False, True])
    def test_masked_keys_are_known_of(self, fake: bool) -> None:
        FASTER[KIND] = 1.31
        mask = torch.ones(1, 162, dtype=torch.bool)

        def refusal(call: AttentionCall) -> str | None:
            assert type(call.q) is torch.Tensor  # a fake one has no address to ask for
            return None if call.key_valid is None else f"keys {tuple(call.key_valid.shape)}"

        with mock.patch.object(views, "refusal", refusal):
            assert site_of(Model(), fake=fake)[0].executor == "hopper"
            site, _ = site_of(Model(), mask, fake=fake)
        assert site.executor == "triton" and "keys (1, 162)" in str(site.executor_reason)

    def test_it_follows_the_sizes_of_later_calls(self) -> None:
        def by_tiles(requested: str, found: Traits, call: AttentionCall | None = None) -> Choice:
            return Choice(f"{requested}, tiles of {found.tile_size}", "slow" * (call is None))

        options = {"sidecar": None, "min_tokens": 0, "inner": "eager"}
        with (
            mock.patch.object(site_executor, "choose", by_tiles),
            mock.patch.object(planner, "tile_size_for", lambda tokens: 64 + 64 * (tokens > 200)),
        ):
            model = torch.compile(toy(), backend="veda", options=options, dynamic=True)
            for grid, tiles in (((3, 6, 9), 64), ((4, 8, 12), 128)):
                model(latents(grid))
                sites = veda_compile.report().sites
                assert {site.executor for site in sites} == {f"auto, tiles of {tiles}"}
                assert len(veda_compile.report().graphs) == 1
