"""What the zoo says of a model: how to build it, and the truth about its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from veda_compile.kernels.layout import Extra, Layout, Video

Grid = tuple[int, int, int]
Built = tuple[nn.Module, dict[str, Any]]
Builder = Callable[[Grid, int], Built]
"""(token grid of the video, batch) -> the model and the arguments of one call."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One model and its ground truth.

    layers: names of the layers whose video self-attention is to be rewritten, in the order they
        run; a layer that calls it twice stands twice.
    left: how often each reason must be reported for the other attention calls of a whole-model
        compilation. Where two reasons are true of a call, the key names both: "A or B".
    first, last: extra tokens before and after the video in the sequences of these calls.
    special: the layouts of these calls where they are more than that.
    model: the class in `diffusers.models.transformers`; None for models of our own.
    latent: sides of the input `hidden_states`, such as "BCTHW"; None where it is packed.
    batch: the usual one. batches: those the truth holds for.
    unit: the grid's sides must be multiples of these. frames: the only number of frames it takes.
    dynamo: settings of `torch._dynamo.config` without which the attention is in no graph.
    blocks: lists of blocks to compile one by one; empty where `compile_repeated_blocks` will do.
    hint: whether the option `grid` is needed: "never", "regional" (where blocks are compiled one
        by one) or "always".
    exact: input names that keep their dtype when the model's changes.
    half: the model itself casts the operands of its attention to bfloat16.
    float32_only: the model itself does not run in bfloat16.
    cut: Dynamo cuts the model into graphs, some of attention alone, which no layer names.
    """

    name: str
    build: Builder
    layers: tuple[str, ...]
    left: Mapping[str, int] = field(default_factory=dict)
    first: int = 0
    last: int = 0
    special: Callable[[Grid], tuple[Layout, ...]] | None = None
    model: str | None = None
    latent: str | None = "BCTHW"
    batch: int = 1
    batches: tuple[int, ...] = (1, 2)
    unit: Grid = (1, 1, 1)
    frames: int | None = None
    dynamo: Mapping[str, bool] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    hint: Literal["never", "regional", "always"] = "never"
    exact: tuple[str, ...] = ()
    half: bool = False
    float32_only: bool = False
    cut: bool = False

    @property
    def sites(self) -> int:
        """Video self-attention calls to be rewritten."""
        return len(self.layers)

    @property
    def others(self) -> int:
        """Attention calls that must stay dense."""
        return sum(self.left.values())

    def fit(self, grid: Grid) -> Grid:
        """The smallest grid this model takes that is at least `grid`."""
        t, h, w = (-(-side // unit) * unit for side, unit in zip(grid, self.unit, strict=True))
        return (self.frames or t, h, w)

    def make(
        self, grid: Grid, batch: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Built:
        """The model for a token grid and the arguments of a call, the same ones every time.

        Leaves global seeds alone.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = self.build(grid, self.batch if batch is None else batch)
            _enliven(model, self.layers)
        if dtype != torch.float32:
            model = _cast(model, dtype)
            inputs = {
                name: value if name in self.exact else _as(value, dtype)
                for name, value in inputs.items()
            }
        return model.eval().requires_grad_(False), inputs

    def layouts(self, grid: Grid) -> tuple[Layout, ...]:
        """The true layouts of the calls to be rewritten, in the order they run."""
        if self.special is not None:
            return self.special(grid)
        first, last = ((Extra(n),) if n else () for n in (self.first, self.last))
        return (Layout((*first, Video(*grid), *last)),) * self.sites

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Dynamo's settings for this model, for the time of a `with` statement."""
        with torch._dynamo.config.patch(**self.dynamo):
            yield


def call(model: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
    """The model's output; several tensors as one row of numbers."""
    result = model(**inputs)
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return tensors[0] if len(tensors) == 1 else torch.cat([x.flatten() for x in tensors])


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another dtype, but for what diffusers keeps in float32 whatever is asked."""
    model = model.to(dtype)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, module in model.named_modules():
        if kept.intersection(name.split(".")):
            module.to(torch.float32)
    return model


def _as(value: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(
        Tensor, lambda x: x.to(dtype) if x.dtype == torch.float32 else x, value
    )


def _enliven(model: nn.Module, layers: tuple[str, ...]) -> None:
    """Weights with which the attention of these layers matters, as if trained.

    At default initialisation it is all but uniform, and an error in what is kept could hide;
    and some models start with gates of zero, behind which every error would hide.
    """
    for name, parameter in model.named_parameters():
        ours = any(name.startswith(f"{layer}.") for layer in layers)
        if ours and parameter.dim() == 2 and any(s in name for s in ("to_q", "to_k", "qkv")):
            parameter.data *= 4.0
        if not parameter.data.any():
            parameter.data.normal_(std=0.1)
