"""Handed videos: the video whose tokens a graph makes and returns.

Where Dynamo cuts a model before its blocks, the first graph may hold no attention but that of a
text encoder; the patches of the video leave it for the next one.
"""

from __future__ import annotations

import torch
from torch import fx

from .codes import NONE, Source, SourceKind
from .provenance import Provenance
from .reasons import Refusal
from .runs import spans_of, video_runs
from .subgraphs import output_value
from .token_map import TokenMap, varying_axes


class HandedVideo:
    """The longest video among the outputs of a graph.

    length: its tokens, 0 where no output holds a video. sources: latents of all such videos.
    """

    def __init__(self, gm: fx.GraphModule, provenance: Provenance) -> None:
        self.length = 0
        self.sources: set[Source] = set()
        returned = output_value(gm.graph)
        for node in returned if isinstance(returned, (tuple, list)) else (returned,):
            tracked = provenance.codes_of(node)
            for source, codes in ({} if tracked is None else tracked.codes).items():
                self._note(source, codes)

    def outlasts(self, tokens: TokenMap) -> bool:
        """Whether a self-attention is over something else: over whole sequences of known tokens,
        none of them of a video that is handed on, and too few to be another as long."""
        if not tokens.content or tokens.before or tokens.after:
            return False
        held = torch.stack([codes != NONE for codes in tokens.content.values()]).any(0)
        return (
            tokens.tokens < self.length
            and bool(held.all())
            and all(
                source.root not in self.sources and tokens.batch_axes[source] <= {0}
                for source in tokens.content
            )
        )

    def _note(self, source: Source, codes: torch.Tensor) -> None:
        if source.kind is not SourceKind.INPUT or len(source.shape) < 4:
            return
        for side in range(codes.dim()):
            line = codes[tuple(slice(None) if d == side else 0 for d in range(codes.dim()))]
            for start, stop in spans_of(line != NONE):
                part = line[start:stop]
                runs = video_runs(source, varying_axes(source, part), part, start)
                for run in [] if isinstance(runs, Refusal) else runs:
                    self.sources.add(source.root)
                    self.length = max(self.length, run.length)
