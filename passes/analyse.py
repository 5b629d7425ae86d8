"""Analysis: everything the passes find out about a graph, without changing it.

Order: sites -> provenance -> token map -> layout -> mask -> sizes -> layer -> verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..kernels.cost_model import Forecast
from .attention_ops import provenance_rules
from .call_dimensions import dimensions, is_symbolic, token_size
from .chain_writes import written_on_the_way
from .codes import Tracked, reshape_codes
from .given import Given
from .grid_sizes import LayoutSizes, find_sizes
from .handed_video import HandedVideo
from .layers import Layer, find_layer, vector_parameters
from .layout import SiteLayout, find_layout
from .masks import KeyValidity, key_validity
from .nested_layers import find_nested_layer
from .origins import Origins
from .positions import Evidence
from .provenance import Provenance
from .reasons import Reason, Refusal
from .sites import Operand, Site, find_sites
from .token_map import TokenMap, token_map
from .verdict import Dimensions, Policy, judge_call, judge_gain, judge_identity, judge_layer
from .writes import Writes


@dataclass(frozen=True, eq=False)
class Finding:
    """One attention call and its verdict: `refusal` is None where it is to be rewritten.

    sizes: the layout in the graph's own sizes.
    unknown: operations of the whole graph that provenance could not follow.
    earlier: the site's number where the verdict rests on what earlier graphs tell.
    forecast: how much faster it is to be sparse, where that was asked and is known.
    """

    site: Site
    layer: Layer
    dims: Dimensions | None
    layout: SiteLayout | None
    sizes: LayoutSizes | None
    mask: KeyValidity | None
    refusal: Refusal | None
    unknown: tuple[str, ...] = ()
    earlier: int | None = None
    forecast: Forecast | None = None


def analyse(
    gm: fx.GraphModule, inputs: Sequence[object], policy: Policy, origins: Origins | None = None
) -> list[Finding]:
    """Findings for every attention call of a Dynamo graph, in execution order.

    inputs: the backend's example inputs, one per placeholder. origins: what earlier graphs tell of
    them; what is found then holds only for calls with inputs of like origins.
    """
    with torch.device("cpu"):  # torch.set_default_device must not move the integers of the analysis
        return _analyse(gm, inputs, policy, origins)


def _analyse(
    gm: fx.GraphModule, inputs: Sequence[object], policy: Policy, origins: Origins | None
) -> list[Finding]:
    sites = list(find_sites(gm))
    if not sites:
        return []
    provenance = Provenance(gm, inputs, provenance_rules(site.node for site in sites), origins)
    scene = _Scene(gm, inputs, provenance, policy.given, origins is not None)
    for site in sites:  # one of them may show the grid of tokens that another attends over as well
        scene.look(site)
    findings: list[Finding] = []
    videos = 0
    for site in sites:
        finding = _examine(site, scene, policy, videos)
        videos += finding.layout is not None
        findings.append(finding)
    if any(_shows_frames(finding) for finding in findings):
        findings = [_not_video(finding) for finding in findings]
    elif any(_lacks_grid(finding) for finding in findings):
        handed = HandedVideo(gm, provenance)
        findings = [_beside(finding, scene.tokens(finding.site), handed) for finding in findings]
    unknown = tuple(sorted(provenance.unknown))
    return [replace(finding, unknown=unknown) for finding in findings]


class _Scene:
    """What all sites of a graph share. Sites whose operands hold equal tokens are read once."""

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[object],
        provenance: Provenance,
        given: Given | None,
        earlier: bool,
    ) -> None:
        self._earlier = earlier
        placeholders = gm.graph.find_nodes(op="placeholder")
        self.provenance = provenance
        self.vectors = vector_parameters(gm)
        self._values = dict(zip(placeholders, inputs, strict=True))
        self._given = given
        self._tokens: dict[object, TokenMap] = {}
        self._writes: dict[fx.Graph, Writes] = {}
        self._layouts: dict[TokenMap, SiteLayout | Refusal] = {}

    def tokens(self, site: Site) -> TokenMap | None:
        """The site's token map; None if an operand's tokens are not known, or it has other sides
        than expected."""
        operands = (site.q, site.k, site.v)
        q, k, v = (self.provenance.codes_of(operand.node) for operand in operands)
        if q is None or k is None or v is None:
            return None
        for x, operand in zip((q, k, v), operands, strict=True):
            if x.rank != len(operand.axes) or "n" not in operand.axes:
                return None
        key = (q.key(), k.key(), v.key(), tuple((x.axes, x.samples) for x in operands))
        if key not in self._tokens:
            q, k, v = (_unpacked(x, o) for x, o in zip((q, k, v), operands, strict=True))
            of_q, of_k, of_v = (replace(o, axes=o.unpacked_axes, samples=1) for o in operands)
            self._tokens[key] = token_map(q, k, v, (of_q, of_k, of_v))
        return self._tokens[key]

    def writes(self, graph: fx.Graph) -> Writes:
        """The in-place writes of one of the graphs."""
        if graph not in self._writes:
            self._writes[graph] = Writes(graph)
        return self._writes[graph]

    def look(self, site: Site) -> None:
        """Find the layout of a site, if it is self-attention, for `layout` to know."""
        tokens = self.tokens(site)
        if tokens is not None and judge_identity(site, tokens, ()) is None:
            self._own_layout(tokens)

    def layout(self, tokens: TokenMap) -> SiteLayout | Refusal:
        """The layout of a self-attention with this token map: its own or, where that shows no grid,
        the one of another site over the very same tokens."""
        own = self._own_layout(tokens)
        if isinstance(own, SiteLayout) or own.reason not in (Reason.NO_GRID, Reason.TEXT_ONLY):
            return own
        for other, layout in self._layouts.items():
            if isinstance(layout, SiteLayout) and tokens.holds_what(other):
                if layout.order is not None and (tokens.before or tokens.after):
                    continue
                return replace(layout, before=tokens.before, after=tokens.after)
        return own

    def _own_layout(self, tokens: TokenMap) -> SiteLayout | Refusal:
        if tokens not in self._layouts:
            found = find_layout(tokens, self.provenance.sources, self._values, self._given)
            if self._earlier and isinstance(found, SiteLayout):
                found = _through_earlier(found)
            self._layouts[tokens] = found
        return self._layouts[tokens]


def _through_earlier(layout: SiteLayout) -> SiteLayout | Refusal:
    """A layout that rests on what earlier graphs tell, which changes from call to call."""
    if layout.order is not None:
        return Refusal(Reason.TOKEN_ORDER, "and the graph breaks before the attention")
    if layout.evidence in (Evidence.LATENT, Evidence.POSITIONS):
        return replace(layout, evidence=Evidence.EARLIER)
    return layout


def _examine(site: Site, scene: _Scene, policy: Policy, index: int) -> Finding:
    if site.calls:
        layer = find_nested_layer(scene.vectors, site)
    else:
        layer = find_layer(scene.vectors, site.node)
    dims = dimensions(site, layer)
    tokens = scene.tokens(site) if dims is not None else None
    refusal = judge_identity(site, tokens, sorted(scene.provenance.unknown))
    if refusal is not None or tokens is None or dims is None:
        return Finding(site, layer, dims, None, None, None, refusal)
    layout = scene.layout(tokens)
    writes = scene.writes(site.owner.graph)
    mask = key_validity(site, token_size(site.q), token_size(site.k), writes)
    refusal = judge_call(site, layout, mask, dims, policy)
    written = written_on_the_way(site, writes)
    if written is not None and not isinstance(layout, Refusal):
        refusal = Refusal(Reason.PLAIN_SOFTMAX, written)
    if isinstance(layout, Refusal):
        return Finding(site, layer, dims, None, None, None, refusal)
    refusal = refusal or judge_layer(layer, index, dims, policy)
    sizes = find_sizes(layout, token_size(site.q), scene.provenance, site.owner.graph)
    if sizes is None and policy.given is not None and layout.grids == policy.given.grids:
        layout = replace(layout, evidence=policy.given.evidence)
        sizes = find_sizes(layout, token_size(site.q), scene.provenance, site.owner.graph)
    if refusal is None and layout.order is not None and is_symbolic(site):
        refusal = Refusal(
            Reason.TOKEN_ORDER,
            "and sizes are symbolic: compile with dynamic=False",
            "compile with dynamic=False, or hand the tokens over in raster order",
        )
    split = layout.before > 0 and layout.after > 0
    if refusal is None and (sizes is None or (split and is_symbolic(site))):
        refusal = Refusal(Reason.UNPROVEN_SIZES)
    validity = mask if isinstance(mask, KeyValidity) else None
    expected = None
    if refusal is None:
        expected, refusal = judge_gain(layer, layout, dims, policy)
    return Finding(site, layer, dims, layout, sizes, validity, refusal, forecast=expected)


def _unpacked(x: Tracked, operand: Operand) -> Tracked:
    """Packed samples with a side of their own, the first."""
    if operand.samples == 1:
        return x
    place = operand.axes.index("n")
    length = x.shape[place] // operand.samples
    shape = (*x.shape[:place], operand.samples, length, *x.shape[place + 1 :])
    parted = x.map(shape, lambda c: reshape_codes(c, x.shape, shape))
    return parted.map(
        (operand.samples, *shape[:place], *shape[place + 1 :]), lambda c: c.movedim(place, 0)
    )


def _shows_frames(finding: Finding) -> bool:
    """Whether a site's tokens are those of a video or of frames, so that the graph holds them."""
    refusal = finding.refusal
    frames = (Reason.ONE_FRAME, Reason.FACTORISED)
    return finding.layout is not None or (refusal is not None and refusal.reason in frames)


def _lacks_grid(finding: Finding) -> bool:
    return finding.refusal is not None and finding.refusal.reason is Reason.NO_GRID


def _not_video(finding: Finding) -> Finding:
    """In a graph whose video is known, self-attention without a grid is over something else."""
    if finding.refusal is None or not _lacks_grid(finding):
        return finding
    return replace(finding, refusal=Refusal(Reason.TEXT_ONLY, finding.refusal.detail))


def _beside(finding: Finding, tokens: TokenMap | None, handed: HandedVideo) -> Finding:
    """So it is in a graph that makes the tokens of a video and hands them on."""
    if not _lacks_grid(finding) or tokens is None or not handed.outlasts(tokens):
        return finding
    detail = f"{tokens.tokens} tokens; the graph hands on a video of {handed.length}"
    return replace(finding, refusal=Refusal(Reason.TEXT_ONLY, detail))
