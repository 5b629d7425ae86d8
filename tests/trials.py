"""Trials: ways to compile and call a model, and the remedies that make their attention sparse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import veda_compile
from veda_compile.report import SiteRecord


@dataclass
class Trial:
    """One way to compile and call a model. prepare: what is done to the compiled model first.

    cure is another trial, which differs in what the remedy says and nothing else.
    """

    model: Callable[[], Any]
    args: Callable[[], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    dynamic: bool | None = None
    blocks: str | None = None
    prepare: Callable[[Any], Any] = lambda _: None
    mode: Callable[[], Any] = torch.no_grad

    def sites(self) -> list[SiteRecord]:
        """The attention calls of a first call after compiling."""
        torch._dynamo.reset()
        veda_compile.reset_report()
        model = self.model()
        chosen = {
            "min_tokens": 0,
            "sidecar": None,
            "inner": "eager",
            "density": 1.0,
            **self.options,
        }
        fn = model
        if self.blocks is None:
            fn = torch.compile(model, backend="veda", dynamic=self.dynamic, options=chosen)
        for block in model.get_submodule(self.blocks) if self.blocks else ():
            block.compile(backend="veda", dynamic=self.dynamic, options=chosen)
        self.prepare(fn)
        with self.mode():
            fn(*self.args())
        return veda_compile.report().sites


def changed(trial: Trial, **what: Any) -> Trial:
    return Trial(**{**vars(trial), **what})


def check(reason: str, phrase: str, trial: Trial, cure: Trial) -> None:
    """`trial` stays dense for the reason, and its remedy, which says `phrase`, makes it sparse."""
    sick = [site for site in trial.sites() if not site.rewritten]
    assert sick and {site.reason for site in sick} == {reason}, [s.explanation for s in sick]
    assert all(phrase in str(site.remedy) for site in sick), sick[0].remedy
    cured = cure.sites()
    assert cured and all(site.rewritten for site in cured), [s.explanation for s in cured]


def frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)
