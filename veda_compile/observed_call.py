"""What observing hands on: one call of a video self-attention, and what was seen of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .kernels.layout import Layout
from .report import SiteRecord
from .sidecar_schema import LayerCard


@dataclass(frozen=True, eq=False)
class ObservedCall:
    """One dense call of a video self-attention. Its tensors are only valid during the callback.

    layer: whose call it is; its fingerprint is what the veda backend tells the layer by.
    q: (B, H, Nq, D); k, v: (B, Hkv, Nk, D); in the dtype attention computes in, detached, strides
        as they come. The video tokens stand in raster order, also where the model has another.
    layout: where the tokens stand, with the grids of this call.
    scale: of the logits. key_valid: (B, Nk) bool, which keys count; None where all do.
    timestep: () float32, the largest of the model's timestep input in this call, on its device;
        None where neither the graph nor the model's call tells it.
    """

    layer: LayerCard
    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    scale: float
    key_valid: Tensor | None
    timestep: Tensor | None


Observer = Callable[[ObservedCall], None]


@dataclass(eq=False)
class ObservedModel:
    """What was seen of a model that is being observed.

    model_class: the name of its class. active: set to False to let calls pass unobserved.
    """

    model_class: str
    active: bool = True
    _layers: dict[str, LayerCard] = field(default_factory=dict)
    _left: dict[tuple[str | None, str | None, int], SiteRecord] = field(default_factory=dict)

    @property
    def layers(self) -> list[LayerCard]:
        """The layers observed so far, in the order of their first calls."""
        return list(self._layers.values())

    @property
    def left(self) -> list[SiteRecord]:
        """The attention calls that are not observed because they would stay dense, with reasons."""
        return list(self._left.values())

    def note_layer(self, card: LayerCard) -> LayerCard:
        """`card`, or the equal one that is known; a layer whose contents changed is another."""
        known = self._layers.get(card.name)
        if known != card:
            known = self._layers[card.name] = card
        return known

    def note_left(self, sites: Sequence[SiteRecord]) -> None:
        """sites: of one graph. Those that an earlier compilation left too stand only once."""
        met: dict[tuple[str | None, str | None], int] = {}
        for site in sites:
            if not site.rewritten:
                key = (site.layer, site.reason)
                met[key] = met.get(key, -1) + 1
                self._left.setdefault((*key, met[key]), site)
