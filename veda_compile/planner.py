"""Plans for sites: from the sidecar where there is one, else one shape for all heads."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace

import torch

from .errors import OptionsError, SidecarError
from .grids import total_tokens
from .kernels.break_even import break_even_tokens
from .kernels.cost_model import Forecast, forecast, work_of
from .kernels.executors import Answer, Choice, Traits, choose_executor, default_name, get_executor
from .kernels.layout import Layout, Video
from .kernels.plan import Plan, least_padding_shape
from .options import AUTO, DEFAULT_DENSITY, Options, tile_size_for
from .passes.analyse import Finding
from .passes.given import Given
from .passes.layers import Layer
from .passes.layout import SiteLayout
from .passes.positions import Evidence
from .passes.reasons import Reason, Refusal
from .passes.verdict import Dimensions, Policy
from .searched_modes import MOST_COLUMNS
from .sidecar import LayerCard, Sidecar
from .sidecar_weights import factors_of_rank
from .site_executor import site_executor
from .told import Grids, running_call

logger = logging.getLogger(__name__)


def _template(name: str | None) -> str | None:
    """A layer's name without its numbers: siblings share it."""
    return None if name is None else re.sub(r"\d+", "#", name)


class Planner:
    """Decides what every layer keeps. One per backend call.

    Layers are told by name (whole-model compilation) or, where a graph serves many layers, by the
    content fingerprint of their parameters.
    """

    def __init__(self, options: Options, calibrated: Sidecar | None = None) -> None:
        """Load the sidecar, if any. Raises SidecarError, or OptionsError if they disagree.

        calibrated: the sidecar that option `sidecar="auto"` came to; None while there is none.
        """
        self._options = options
        self.sidecar = calibrated
        if options.sidecar is not None and options.sidecar != AUTO:
            self.sidecar = Sidecar.load(options.sidecar)
        if self.sidecar is not None and options.tile_size not in (None, self.sidecar.tile_size):
            raise OptionsError(
                f"option tile_size is {options.tile_size} but sidecar {self.sidecar.source} was "
                f"made with tile size {self.sidecar.tile_size}: leave out tile_size, or use a "
                f"sidecar made with {options.tile_size}"
            )
        self._announced: set[tuple[object, object]] = set()

    @property
    def score(self) -> str:
        """The score all sites of a compilation use."""
        if self._options.score != "auto":
            return self._options.score
        return self.sidecar.score if self.sidecar is not None else "closed_form"

    @property
    def columns(self) -> int | None:
        """The most columns of any stripe of the sidecar; None where no head is static.

        Of plans that are not known yet, or change, it is the most that they can have.
        """
        if self._options.sidecar == AUTO:
            return MOST_COLUMNS
        return None if self.sidecar is None else self.sidecar.columns

    def factor_rank(self, head_dim: int) -> int:
        """The rank of the factors that plans for this head_dim bring; 0 where they bring none."""
        if self.sidecar is None or self.score == "mean":
            return 0
        return self.sidecar.factor_rank(head_dim)

    def policy(self) -> Policy:
        """What the verdicts need to know."""
        minimum = self._options.min_tokens
        return Policy(
            given=self._given(),
            dense_layers=self._options.dense_layers,
            min_tokens=lambda device: (
                break_even_tokens(device) if isinstance(minimum, str) else minimum
            ),
            verify=self._verify,
            plan=self._refuse_layer,
            forecast=self._forecast if isinstance(minimum, str) else None,
        )

    def _given(self) -> Given | None:
        """The grids the user names: by the option, else by `attach` for the call that compiles."""
        if self._options.grid is not None:
            return Given((self._options.grid,), Evidence.OPTION)
        call = running_call()
        if call is None or call.told.grids is None:
            return None
        return Given(call.told.grids, Evidence.ATTACHED, call.told.measured)

    def _tile_size(self, video_tokens: int) -> int:
        if self.sidecar is not None:
            return self.sidecar.tile_size
        return self._options.tile_size or tile_size_for(video_tokens)

    def _verify(self, device: str, dtype: torch.dtype, head_dim: int, tokens: int) -> Answer:
        traits = Traits(device, dtype, head_dim, self._tile_size(tokens))
        if self._options.executor != "auto":
            choose_executor(self._options.executor, traits)  # a named executor never gives way
            return Answer(True, "")
        return get_executor(default_name("auto", device)).verify(traits)

    def executor(self, finding: Finding, plan: Plan | None = None) -> Choice:
        """What the calls of a rewritten site run on, under `plan` or the one it is to get."""
        assert finding.layout is not None
        size = self._tile_size(total_tokens(finding.layout.grids))
        return site_executor(
            self._options.executor, finding, size if plan is None else plan.tile_size
        )

    def _forecast(self, layer: Layer, dims: Dimensions, layout: SiteLayout) -> Forecast | None:
        """What to expect of a site with its plan, or with the mean of those it may get."""
        videos = Layout(tuple(Video(*grid) for grid in layout.grids))
        works = [
            work_of(plan, videos, dims.batch, dims.head_dim)
            for plan in self._plans_for(layer, dims, layout.grids)
        ]
        work = replace(
            works[0],
            queries=dims.tokens,
            keys=dims.keys,
            tiles=sum(work.tiles for work in works) / len(works),
            kept=sum(work.kept for work in works) / len(works),
        )
        executor = default_name(self._options.executor, dims.device)
        return forecast(work, dims.device, dims.dtype, executor)

    def _plans_for(self, layer: Layer, dims: Dimensions, grids: Grids) -> list[Plan]:
        """The plan of a layer; those of all that it may be where that shows in its calls alone."""
        card = self.card_by_name(layer.name)
        cards = [] if self.sidecar is None else [card] if card else self.sidecar.model.layers
        found = [
            self.plan(c.name, c.heads, grids)
            for c in cards
            if (c.heads, c.head_dim) == (dims.heads, dims.head_dim)
        ]
        return found or [self._uniform(dims.heads, grids)]

    def _uniform(self, heads: int, grids: Grids) -> Plan:
        layout = Layout(tuple(Video(*grid) for grid in grids))
        shape = least_padding_shape(layout, self._tile_size(total_tokens(grids)))
        density = self._options.density or DEFAULT_DENSITY
        return Plan.uniform(heads, shape, density, self.score)

    def _refuse_layer(
        self, layer: Layer, heads: int, head_dim: int, heads_proven: bool
    ) -> Refusal | None:
        sidecar = self.sidecar
        if sidecar is None or self._options.sidecar == AUTO:
            # what has no plan of its own shares one, and a calibration is of the call as it stands
            return None
        if not heads_proven:
            return Refusal(Reason.HEAD_SPLIT_UNPROVEN, f"{heads} heads in the call")
        card = self.card_by_name(layer.name)
        if card is not None:
            sidecar.check_model([LayerCard(card.name, heads, head_dim, None)], complete=False)
            return None
        siblings = [c for c in sidecar.model.layers if _template(c.name) == _template(layer.name)]
        if siblings and _template(layer.name) != layer.name:
            return Refusal(Reason.NO_PLAN, f"{layer.name}: it has {len(siblings)} others like it")
        if not any((c.heads, c.head_dim) == (heads, head_dim) for c in sidecar.model.layers):
            raise SidecarError(
                f"sidecar {sidecar.source} was made for {sidecar.model.model_class}, of whose "
                f"layers none has {heads} heads of {head_dim}, as layer {layer.name} of the "
                "compiled model has: use a sidecar made for this model"
            )
        if sidecar.layer_independent or (layer.parameters and sidecar.fingerprints_unique()):
            return None
        return Refusal(
            Reason.LAYER_UNKNOWN,
            f"{layer.name}: not a layer of the sidecar, and its layers have no unique fingerprints",
        )

    def card_by_name(self, name: str | None) -> LayerCard | None:
        """The sidecar's layer of that name; the compiled module may lie above the model."""
        if self.sidecar is None or name is None:
            return None
        for card in self.sidecar.model.layers:
            if name == card.name or name.endswith("." + card.name):
                return card
        return None

    def card_by_fingerprint(self, mark: str | None, asked: str | None) -> LayerCard:
        """The sidecar's layer with that fingerprint. Raises SidecarError if there is none."""
        assert self.sidecar is not None
        card = self.sidecar.layer_by_fingerprint(mark) if mark is not None else None
        if card is None:
            raise SidecarError(
                f"sidecar {self.sidecar.source} was made for {self.sidecar.model.model_class}; it "
                f"has no layer with fingerprint {mark}, which layer {asked} of the compiled model "
                "has, so other weights: use a sidecar made for this model"
            )
        return card

    def plan(self, layer: str | None, heads: int, grids: Grids) -> Plan:
        """The plan of one layer (None: any, they are alike) for the grids of its segments.

        Factors are of `factor_rank`, so that plans of all layers fit one compiled graph.
        """
        if self.sidecar is None:
            return self._uniform(heads, grids)
        main = max(grids, key=math.prod)
        mean = self._options.density
        if self._options.sidecar == AUTO:
            mean = None  # it is what the plans were made for
        name = layer if layer is not None else self.sidecar.model.layers[0].name
        plan, match = self.sidecar.plan_for(
            name,
            main,
            density=mean,
            score=None if self._options.score == "auto" else self._options.score,
        )
        if not match.exact and (main, match.used) not in self._announced:
            self._announced.add((main, match.used))
            logger.warning(
                "sidecar %s has no plan for grid %s: using the nearest, made for %s",
                self.sidecar.source, main, match.used,
            )  # fmt: skip
        rank = self.factor_rank(head_dim := self._head_dim(name))
        if rank == 0:
            return plan
        return replace(plan, factors=factors_of_rank(plan, head_dim, rank))

    def _head_dim(self, layer: str) -> int:
        assert self.sidecar is not None
        return next(c.head_dim for c in self.sidecar.model.layers if c.name == layer)
