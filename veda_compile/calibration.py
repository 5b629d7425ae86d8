"""Calibration: a model's first calls run dense and are measured, the later ones have plans.

One object for each model and options. It is made when a graph of the model is compiled with option
`sidecar="auto"`, finds the plans of an earlier process in the cache, or has every layer searched,
a little in each call, and then chooses for all at once.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import torch
from torch import nn

from .calibration_cache import cache_key, cache_path, load_cached, provenance, save_cached
from .calibration_plan import calibrated_sidecar
from .errors import VedaError
from .kernels.op import OP_NAME
from .layer_names import ModelNames
from .layer_search import LayerSearch
from .observed_call import ObservedCall, ObservedModel
from .options import DEFAULT_DENSITY, Options, tile_size_for
from .planner import Planner
from .report import SiteRecord
from .sidecar_schema import Grid
from .time_account import TimeAccount

logger = logging.getLogger(__name__)

_FAILURES = (VedaError, RuntimeError, ArithmeticError, LookupError, ValueError)
"""What measuring and choosing may raise, out of memory for one."""


class State(Enum):
    """Where a calibration stands."""

    CALIBRATING = "calibrating"
    NOW = "sparse (calibrated now)"
    CACHED = "sparse (from cache)"
    GIVEN_UP = "sparse (not calibrated)"


class Calibration:
    """What one model's attention layers should keep, found out while it runs.

    planner: what sparse runs are planned by; replaced when the plans are there. names, seen: of the
    model's layers. account: the time it takes. path: its file in the cache, None where it has none.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        """Look into the cache. Options are those of a compilation, with `sidecar` "auto"."""
        self.options = options
        self.names = ModelNames(model)
        self.seen = ObservedModel(type(model).__name__)
        self.account = TimeAccount()
        self.state = State.CALIBRATING
        self.uniform = Planner(options)
        self.planner = self.uniform
        self.searches: dict[tuple[str, Grid], LayerSearch] = {}
        self.calls = 0
        self._key = cache_key(model, options)
        self.path: Path | None = None if self._key is None else cache_path(model, self._key)
        self._tile_size = options.tile_size
        self._stage: int | None = None
        self._records: list[SiteRecord] = []
        self._measuring = threading.Lock()
        if self.path is not None and self._key is not None:
            found = load_cached(self.path, self._key)
            if found is not None:
                self.planner, self.state = Planner(options, found), State.CACHED

    @property
    def calibrating(self) -> bool:
        """Whether the model is to run dense and be measured."""
        return self.state is State.CALIBRATING

    @property
    def described(self) -> str:
        """The state for the report."""
        if self.state is State.CACHED:
            return f"sparse (from cache {self.path})"
        return str(self.state.value)

    def begin(self, layers: Sequence[str]) -> None:
        """A graph that holds these layers is about to run. Chooses the plans where all is known."""
        if layers[0] != self.seen.layers[0].name:
            return
        # the first layer again: the model's next call
        if self.calls and self._complete():
            self._finish()
        self.calls += 1
        self.account.next_call()
        self._stage = None

    def observe(self, call: ObservedCall) -> None:
        """Measure as much of a call as there is time for. Never fails the model's own call."""
        if not self._measuring.acquire(blocking=False):  # another thread's call of the model
            return
        try:
            with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
                self._measure(call)
        except _FAILURES as error:
            self.give_up(str(error))
        finally:
            self._measuring.release()

    def give_up(self, reason: str) -> None:
        """Go on without plans: sparse with one tile shape for all heads."""
        if self.calibrating:
            self._change(State.GIVEN_UP, Planner(self.options))
            logger.warning(
                "veda: %s cannot be calibrated and runs with one tile shape for all heads: %s",
                self.seen.model_class, " ".join(reason.split())[:300],
            )  # fmt: skip

    def note(self, record: SiteRecord) -> None:
        """Keep what the report says of a layer of this model true to the state."""
        record.calibration = self.described
        if self.calibrating:
            self._records.append(record)

    def _change(self, state: State, planner: Planner) -> None:
        self.state, self.planner = state, planner
        for record in self._records:
            record.calibration = self.described
        self._records = []

    def _measure(self, call: ObservedCall) -> None:
        if not self.calibrating or not self.account.allows():
            return
        grid = max((video.grid for _, video in call.layout.videos), key=math.prod)
        place = (call.layer.name, grid)
        if self._tile_size is None:
            tokens = sum(video.length for _, video in call.layout.videos)
            self._tile_size = tile_size_for(tokens)
        if place not in self.searches:
            score = "closed_form" if self.options.score == "auto" else self.options.score
            self.searches[place] = LayerSearch.of(call, self._tile_size, self._density, score)
        if self._stage is None:
            found = [self.searches.get((card.name, grid)) for card in self.seen.layers]
            self._stage = min(0 if search is None else search.stage for search in found)
        search, sample = self.searches[place], None
        while search.stage == self._stage and not search.done and self.account.allows():
            with self.account.unit():
                sample = sample or search.sample(call, self.calls)
                search.step(sample)

    @property
    def _density(self) -> float:
        return self.options.density or DEFAULT_DENSITY

    def _complete(self) -> bool:
        """Whether on some grid all layers are searched."""
        names = [card.name for card in self.seen.layers]
        return any(
            all((search := self.searches.get((name, grid))) and search.done for name in names)
            for grid in {grid for _, grid in self.searches}
        )

    def _finish(self) -> None:
        account, kept = self.account, False
        with account.unit():
            facts = {
                "density": self._density,
                "model_calls": self.calls,
                "units": account.units,
                "versions": {"torch": torch.__version__, "op": OP_NAME},
            }
            try:
                sidecar = calibrated_sidecar(
                    self.seen.model_class,
                    self.seen.layers,
                    self.searches,
                    self._density,
                    provenance(self._key, facts),
                )
            except _FAILURES as error:  # the model's own call goes on
                self.give_up(str(error))
                return
            if self.path is not None:
                kept = save_cached(sidecar, self.path)
        self._change(State.NOW, Planner(self.options, sidecar))
        self.searches = {}
        dense = account.dense
        logger.info(
            "veda: calibrated %s in %d calls: measuring took %.2f s, %.1f %% of the %.2f s they "
            "took dense; %s",
            self.seen.model_class, self.calls, account.spent,
            100.0 * account.spent / dense if dense else 0.0, dense,
            f"kept in {self.path}" if kept else "not kept",
        )  # fmt: skip


class Calibrations:
    """The calibrations of this process, by model; models are not kept alive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: weakref.WeakKeyDictionary[nn.Module, dict[Options, Calibration]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, model: nn.Module, options: Options) -> Calibration:
        """The calibration of a model, begun if there is none."""
        with self._lock:
            known = self._models.setdefault(model, {})
            if options not in known:
                known[options] = Calibration(model, options)
            return known[options]

    def clear(self) -> None:
        """Forget all calibrations; what is compiled keeps its own."""
        with self._lock:
            self._models.clear()


CALIBRATIONS = Calibrations()
"""What graphs compiled with option `sidecar="auto"` share."""
