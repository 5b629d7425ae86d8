"""Rules of arithmetic: which token each element of a computed tensor belongs to."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from .codes import Source, Tracked, aligned, collapse, reduce_dims, union
from .indexing import Shape
from .movement import Rule, Value

_KEEPS_PLACES = frozenset(
    """to float half bfloat16 double type type_as contiguous clone detach alias data cpu cuda
    identity dropout feature_dropout layer_norm rms_norm native_layer_norm group_norm batch_norm
    instance_norm normalize softmax log_softmax cumsum""".split()
)
"""Shape-preserving functions that are not elementwise but leave every token in its place."""


@lru_cache(maxsize=1024)
def is_elementwise(name: str) -> bool:
    """Whether torch tags the ATen operator of this name as pointwise."""
    base = name if name.endswith("__") else name.rstrip("_")
    base = {
        "truediv": "div",
        "floordiv": "floor_divide",
        "and": "bitwise_and",
        "or": "bitwise_or",
        "not": "bitwise_not",
        "invert": "bitwise_not",
        "iadd": "add",
        "imul": "mul",
        "isub": "sub",
        "itruediv": "div",
        "mod": "remainder",
        "negative": "neg",
    }.get(base, base)
    packet = getattr(torch.ops.aten, base, None)
    if packet is None:
        return False
    return any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def keeps_places(name: str) -> bool:
    """Whether the output has the tokens of its first argument, place by place."""
    return name in _KEEPS_PLACES


def tracked_in(args: Any) -> list[Tracked]:
    """Every tracked tensor among nested arguments, in order."""
    if isinstance(args, Tracked):
        return [args]
    if isinstance(args, (tuple, list)):
        return [x for arg in args for x in tracked_in(arg)]
    if isinstance(args, dict):
        return [x for arg in args.values() for x in tracked_in(arg)]
    return []


def elementwise(out: Shape, *args: Any, **kwargs: Any) -> Tracked:
    """Broadcast and merge all operands."""
    return union(out, tracked_in([args, kwargs]))


def linear(out: Shape, x: Tracked, *_: Any, **__: Any) -> Tracked:
    """F.linear: features are mixed, tokens stay."""
    return x.map(out, lambda c: reduce_dims(c, [c.dim() - 1]))


def reduction(out: Shape, x: Tracked, *args: Any, **kwargs: Any) -> Value:
    """mean, sum, amax, ... over named dimensions."""
    dims = kwargs.get("dim", kwargs.get("axis", args[0] if args else None))
    keep = kwargs.get("keepdim", args[1] if len(args) > 1 and isinstance(args[1], bool) else False)
    if dims is None or isinstance(dims, torch.dtype):
        return Tracked(out)
    named = [d % x.rank for d in (dims if isinstance(dims, (tuple, list)) else [dims])]

    def move(codes: torch.Tensor) -> torch.Tensor:
        reduced = reduce_dims(codes, named)
        if keep:
            return reduced
        return reduced.reshape([s for d, s in enumerate(reduced.shape) if d not in named])

    return x.map(out, move)


def convolution(
    out: Shape,
    x: Tracked,
    weight: Tracked,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *_: Any,
    **__: Any,
) -> Tracked:
    """conv1d/2d/3d: the token of an output is the centre of its receptive field."""
    rank = x.rank - 2
    if isinstance(padding, str):
        raise NotImplementedError(f"convolution padding {padding!r}")

    def each(value: Any) -> list[int]:
        values = list(value) if isinstance(value, (tuple, list)) else [value]
        return values * rank if len(values) == 1 else values

    steps, pads, dilations = each(stride), each(padding), each(dilation)

    def move(codes: torch.Tensor) -> torch.Tensor:
        codes = reduce_dims(codes, [1])
        for i in range(rank):
            if codes.shape[2 + i] > 1:
                centre = dilations[i] * (weight.shape[2 + i] - 1) // 2 - pads[i]
                places = torch.arange(out[2 + i]) * steps[i] + centre
                codes = codes.index_select(2 + i, places.clamp(0, x.shape[2 + i] - 1))
        return collapse(codes, [])

    return x.map(out, move)


def matmul(out: Shape, a: Tracked, b: Tracked, *_: Any, **__: Any) -> Tracked:
    """matmul, bmm, mm: rows follow the left operand; a parameter on the right mixes features."""
    return a.map(out, lambda c: aligned(reduce_dims(c, [c.dim() - 1]), len(out)))


def baddbmm(out: Shape, base: Tracked, a: Tracked, b: Tracked, **__: Any) -> Tracked:
    """baddbmm, addmm: as matmul; the added tensor names no token."""
    return matmul(out, a, b)


def einsum(out: Shape, equation: str, *operands: Any) -> Tracked:
    """einsum: each source from the first operand that holds it, contracted letters reduced."""
    tensors = list(operands[0]) if isinstance(operands[0], (tuple, list)) else list(operands)
    if "." in equation or "->" not in equation:
        raise NotImplementedError(f"einsum {equation!r}")
    left, right = equation.replace(" ", "").split("->")
    codes: dict[Source, torch.Tensor] = {}
    for letters, x in zip(left.split(","), tensors, strict=True):
        gone = [d for d, letter in enumerate(letters) if letter not in right]
        kept = [letter for letter in letters if letter in right]
        for source, c in x.codes.items():
            if source in codes:
                continue
            c = reduce_dims(c, gone)
            c = c.reshape([s for d, s in enumerate(c.shape) if d not in gone])
            c = c.permute([kept.index(letter) for letter in right if letter in kept])
            sides = iter(c.shape)
            codes[source] = c.reshape([next(sides) if letter in kept else 1 for letter in right])
    return Tracked(out, codes)


def attention(out: Any, *args: Any, **kwargs: Any) -> Value:
    """Attention output rows are q's; a source in q and k but not in v only steered the weights.

    Of several outputs the first is the attention's; the others hold no tokens.
    """
    if out and isinstance(out[0], (tuple, list)):
        first = attention(out[0], *args, **kwargs)
        assert isinstance(first, Tracked)
        return [first, *(Tracked(tuple(shape)) for shape in out[1:])]
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    names = ("query", "key", "value") if "query" in given else ("q", "k", "v")
    q, k, v = (given[name] for name in names)
    codes = {
        s: reduce_dims(c, [c.dim() - 1])
        for s, c in q.codes.items()
        if s in v.codes or s not in k.codes
    }
    return Tracked(out, codes)


def view_as_complex(out: Shape, x: Tracked) -> Tracked:
    """view_as_complex: the two parts of a number are one place."""
    return x.map(out, lambda c: reduce_dims(c, [c.dim() - 1]).squeeze(-1))


def view_as_real(out: Shape, x: Tracked) -> Tracked:
    """view_as_real: both parts stand in the number's place."""
    return x.map(out, lambda c: c.unsqueeze(-1))


def nothing(out: Any, *_: Any, **__: Any) -> Value:
    """A tensor whose elements come from no source: zeros, ones, random numbers, new buffers."""
    if out and isinstance(out[0], (tuple, list)):
        return [Tracked(tuple(shape)) for shape in out]
    return Tracked(tuple(out))


RULES: dict[str, Rule] = {
    "linear": linear,
    **dict.fromkeys(
        ["mean", "sum", "amax", "amin", "norm", "var", "std", "prod", "logsumexp", "all", "any"],
        reduction,
    ),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d"], convolution),
    **dict.fromkeys(["matmul", "bmm", "mm", "__matmul__"], matmul),
    **dict.fromkeys(["baddbmm", "addmm", "addbmm"], baddbmm),
    "einsum": einsum,
    "view_as_complex": view_as_complex,
    "view_as_real": view_as_real,
    **dict.fromkeys(["polar", "complex"], elementwise),
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(
        """zeros ones full empty zeros_like ones_like empty_like full_like rand randn rand_like
        randn_like new_zeros new_ones new_empty new_full scalar_tensor tensor eye tril triu
        embedding""".split(),
        nothing,
    ),
}
"""Arithmetic by the name of the function or method."""
