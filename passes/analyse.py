"""Analysis: everything the passes find out about a graph, without changing it.

Order: sites -> provenance -> token map -> layout -> mask -> sizes -> layer -> verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .attention_ops import provenance_rules
from .grid_sizes import LayoutSizes, find_sizes
from .layers import Layer, find_layer, vector_parameters
from .layout import Grid, SiteLayout, find_layout
from .masks import KeyValidity, key_validity
from .positions import Evidence
from .provenance import Provenance
from .reasons import Reason, Refusal
from .sites import Operand, Site, find_sites
from .sizes import Size, example_tensor, hint
from .token_map import TokenMap, token_map
from .verdict import Dimensions, Policy, judge_call, judge_identity, judge_layer


@dataclass(frozen=True, eq=False)
class Finding:
    """One attention call and its verdict: `refusal` is None where it is to be rewritten.

    sizes: the layout in the graph's own sizes, None where the grid is told per call.
    """

    site: Site
    layer: Layer
    dims: Dimensions | None
    layout: SiteLayout | None
    sizes: LayoutSizes | None
    mask: KeyValidity | None
    refusal: Refusal | None


def analyse(gm: fx.GraphModule, inputs: Sequence[object], policy: Policy) -> list[Finding]:
    """Findings for every attention call of a Dynamo graph, in execution order.

    inputs: the backend's example inputs, one per placeholder.
    """
    with torch.device("cpu"):  # torch.set_default_device must not move the integers of the analysis
        return _analyse(gm, inputs, policy)


def _analyse(gm: fx.GraphModule, inputs: Sequence[object], policy: Policy) -> list[Finding]:
    sites = list(find_sites(gm))
    if not sites:
        return []
    provenance = Provenance(gm, inputs, provenance_rules())
    scene = _Scene(gm, inputs, provenance, policy.grid)
    findings: list[Finding] = []
    videos = 0
    for site in sites:
        finding = _examine(site, scene, policy, videos)
        videos += finding.layout is not None
        findings.append(finding)
    if any(finding.layout is not None for finding in findings):
        findings = [_not_video(finding) for finding in findings]
    return findings


class _Scene:
    """What all sites of a graph share. Sites whose operands hold equal tokens are read once."""

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[object],
        provenance: Provenance,
        grid: Grid | None,
    ) -> None:
        placeholders = gm.graph.find_nodes(op="placeholder")
        self.provenance = provenance
        self.vectors = vector_parameters(gm)
        self._values = dict(zip(placeholders, inputs, strict=True))
        self._grid = grid
        self._tokens: dict[object, TokenMap] = {}
        self._layouts: dict[TokenMap, SiteLayout | Refusal] = {}

    def tokens(self, site: Site) -> TokenMap | None:
        """The site's token map; None if an operand's tokens are not known."""
        operands = (site.q, site.k, site.v)
        q, k, v = (self.provenance.codes_of(operand.node) for operand in operands)
        if q is None or k is None or v is None:
            return None
        key = (q.key(), k.key(), v.key(), tuple(operand.axes for operand in operands))
        if key not in self._tokens:
            self._tokens[key] = token_map(q, k, v, operands)
        return self._tokens[key]

    def layout(self, tokens: TokenMap) -> SiteLayout | Refusal:
        """The layout of a self-attention with this token map."""
        if tokens not in self._layouts:
            self._layouts[tokens] = find_layout(
                tokens, self.provenance.sources, self._values, self._grid
            )
        return self._layouts[tokens]


def _examine(site: Site, scene: _Scene, policy: Policy, index: int) -> Finding:
    layer = Layer(None, ()) if site.calls else find_layer(scene.vectors, site.node)
    dims = _dimensions(site)
    tokens = scene.tokens(site) if dims is not None else None
    refusal = judge_identity(site, tokens, sorted(scene.provenance.unknown))
    if refusal is not None or tokens is None or dims is None:
        return Finding(site, layer, dims, None, None, None, refusal)
    layout = scene.layout(tokens)
    mask = key_validity(site, _token_size(site.k))
    refusal = judge_call(site, layout, mask, dims, policy)
    if isinstance(layout, Refusal):
        return Finding(site, layer, dims, None, None, None, refusal)
    refusal = refusal or judge_layer(layer, index, dims, policy)
    sizes = _sizes(site, layout, scene.provenance)
    if refusal is None and sizes is None and not _told_per_call(layout):
        refusal = Refusal(Reason.UNPROVEN_SIZES)
    validity = mask if isinstance(mask, KeyValidity) else None
    return Finding(site, layer, dims, layout, sizes, validity, refusal)


def _sizes(site: Site, layout: SiteLayout, provenance: Provenance) -> LayoutSizes | None:
    """In-graph sizes, where the grid is a function of the graph's sizes."""
    if layout.evidence is Evidence.VALUES:
        return None
    return find_sizes(layout, _token_size(site.q), provenance, site.owner.graph)


def _told_per_call(layout: SiteLayout) -> bool:
    """Whether the position input can tell the grid anew on every call."""
    extras = len(layout.runs) - len(layout.videos)
    return layout.position_input is not None and len(layout.videos) == 1 and extras <= 1


def _token_size(operand: Operand) -> Size:
    tensor = example_tensor(operand.node)
    assert tensor is not None
    return tensor.shape[operand.axes.index("n")]


def _dimensions(site: Site) -> Dimensions | None:
    """Hints of the site's sizes; None if an operand is not one tensor of the expected rank."""
    operands = (site.q, site.k, site.v)
    tensors = [example_tensor(operand.node) for operand in operands]
    for operand, tensor in zip(operands, tensors, strict=True):
        if tensor is None or tensor.dim() != len(operand.axes) or "n" not in operand.axes:
            return None
    q, k, v = tensors
    assert q is not None and k is not None and v is not None

    def side(tensor: torch.Tensor, operand: Operand, letter: str) -> int:
        if letter not in operand.axes:
            return 1
        return hint(tensor.shape[operand.axes.index(letter)])

    mismatch = None
    for letter, name in (("b", "batch"), ("n", "tokens"), ("d", "head_dim")):
        sides = [side(tensor, operand, letter) for tensor, operand in
                 ((q, site.q), (k, site.k), (v, site.v))]  # fmt: skip
        if len(set(sides)) > 1:
            mismatch = f"{name} of q, k, v: {sides}"
    heads = [side(t, operand, "h") for t, operand in ((q, site.q), (k, site.k), (v, site.v))]
    if heads[1] != heads[2] or heads[0] % heads[1]:
        mismatch = f"heads of q, k, v: {heads}"
    return Dimensions(
        side(q, site.q, "b"),
        side(q, site.q, "h"),
        side(k, site.k, "h"),
        side(q, site.q, "n"),
        side(q, site.q, "d"),
        _computing_dtype(site, q, k, v),
        q.device.type,
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None),
        "h" in site.q.axes and not site.calls,
        mismatch,
    )


def _computing_dtype(site: Site, *operands: torch.Tensor) -> torch.dtype:
    """The dtype of the attention itself.

    Fused attention returns what it computes in, and under autocast casts its operands to it.
    Written-out attention computes in the widest of its operands' dtypes.
    """
    result = example_tensor(site.node)
    if site.fused and result is not None:
        return result.dtype
    widest = operands[0].dtype
    for operand in operands[1:]:
        widest = torch.promote_types(widest, operand.dtype)
    return widest


def _not_video(finding: Finding) -> Finding:
    """In a graph whose video is known, self-attention without a grid is over something else."""
    if finding.refusal is None or finding.refusal.reason is not Reason.NO_GRID:
        return finding
    return Finding(
        finding.site, finding.layer, finding.dims, None, None, None,
        Refusal(Reason.TEXT_ONLY, finding.refusal.detail),
    )  # fmt: skip
