"""The observing backend: compiles graphs dense, and hands their video self-attention on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from .earlier_graphs import EarlierGraphs, analyse_after
from .graph_records import graph_record, require_sparse
from .handing_on import tagger
from .inner import Compiled, compile_inner, fake_input
from .kernels.observe_op import idle_ticket, receiving
from .layer_names import ModelNames
from .observed_call import ObservedModel, Observer
from .observed_graph import ObservedGraph
from .options import Options
from .passes.analyse import Finding
from .passes.observe import observe_sites
from .passes.owned_graph import own_copy
from .planner import Planner
from .report import SiteRecord


class ObservingBackend:
    """A backend for torch.compile. Its graphs are those of Inductor, plus ops that only look on."""

    def __init__(
        self,
        seen: ObservedModel,
        observer: Observer,
        names: ModelNames,
        options: Options,
        patches: Mapping[str, Any],
    ) -> None:
        """patches: Inductor settings of the compilation this one stands in for."""
        self._seen = seen
        self._observer = observer
        self._names = names
        self._options = options
        self._patches = {**patches, **options.config_patches()}

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        """Compile a Dynamo graph as torch.compile's backends do. Raises as `veda` does."""
        planner = Planner(self._options)
        owned = own_copy(gm)
        findings, earlier = analyse_after(gm, owned, example_inputs, planner.policy)
        handing = tagger(gm, example_inputs)
        record = graph_record(gm, findings, planner)
        if self._options.strict:
            require_sparse(record)
        self._seen.note_left(record.sites)
        accepted = [
            (finding, site)
            for finding, site in zip(findings, record.sites, strict=True)
            if finding.refusal is None
        ]
        if accepted:
            compiled = self._observed(owned, example_inputs, accepted, earlier)
        else:
            compiled = self._compiled(owned, example_inputs)
        return compiled if handing is None else handing.wrap(compiled)

    def _compiled(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        return compile_inner(gm, inputs, self._options.inner, self._patches)

    def _observed(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        accepted: Sequence[tuple[Finding, SiteRecord]],
        earlier: EarlierGraphs | None,
    ) -> Compiled:
        seen, observer = self._seen, self._observer
        graph = ObservedGraph(gm, inputs, accepted, self._names, earlier)
        idle = idle_ticket()
        stand_in = fake_input(idle)
        watching = observe_sites(gm, [finding for finding, _ in accepted], stand_in)
        compiled = self._compiled(watching, [*inputs, stand_in])

        def run(*args: Any) -> Any:
            if not seen.active:
                return compiled(*args, idle)[:-1]
            now = graph.run(args, seen, observer)
            with receiving(now.receive) as ticket:
                return compiled(*args, ticket)[:-1]

        return run
