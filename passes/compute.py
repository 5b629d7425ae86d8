"""Rules of arithmetic: which token each element of a computed tensor belongs to."""

from __future__ import annotations

import itertools
import string
from functools import lru_cache
from typing import Any

import torch

from .codes import NONE, Source, Tracked, aligned, reduce_dims, union
from .indexing import Shape
from .movement import Rule, Value
from .windows import convolution, pool

_KEEPS_PLACES = frozenset(
    """to float half bfloat16 double bool int long short byte char type type_as contiguous
    clone detach alias data cpu cuda identity dropout feature_dropout layer_norm rms_norm
    native_layer_norm group_norm batch_norm instance_norm normalize softmax log_softmax
    cumsum real imag conj conj_physical resolve_conj resolve_neg relu relu6 silu gelu elu
    hardtanh hardsigmoid hardswish softplus tril triu""".split()
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
        "imod": "remainder",
        "ipow": "pow",
        "ifloordiv": "floor_divide",
        "iand": "bitwise_and",
        "ior": "bitwise_or",
        "ixor": "bitwise_xor",
        "xor": "bitwise_xor",
    }.get(base, base)
    packet = getattr(torch.ops.aten, base, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):  # as of __eq__, which every object has
        packet = getattr(torch.ops.aten, base.strip("_"), None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
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


def where(out: Shape, *args: Any, **kwargs: Any) -> Tracked:
    """where: an element is either operand's, so these must hold the same tokens in its place."""
    operands = tracked_in([args, kwargs])
    for source in dict.fromkeys(s for x in operands for s in x.codes):
        held = [aligned(x.codes[source], len(out)) for x in operands if source in x.codes]
        if not all(_agree(a, b) for a, b in itertools.combinations(held, 2)):
            raise NotImplementedError("a choice between tokens in different orders")
    return union(out, operands)


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether codes are equal wherever both are some, along the sides that both depend on."""
    for d in range(a.dim()):
        if (a.shape[d] == 1) != (b.shape[d] == 1):
            a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
    return bool(((a == b) | (a == NONE) | (b == NONE)).all())


def linear(out: Shape, x: Tracked, *_: Any, **__: Any) -> Tracked:
    """F.linear: features are mixed, tokens stay."""
    return x.map(out, lambda c: reduce_dims(c, [c.dim() - 1]))


def reduction(out: Shape, x: Tracked, *args: Any, **kwargs: Any) -> Value:
    """mean, sum, amax, ... over named dimensions."""
    dims = kwargs.get("dim", kwargs.get("axis", args[0] if args else None))
    keep = kwargs.get("keepdim", args[1] if len(args) > 1 and isinstance(args[1], bool) else False)
    if out and isinstance(out[0], (tuple, list)):
        raise NotImplementedError("a reduction with several results")
    if dims is None or isinstance(dims, torch.dtype):
        return Tracked(out)
    named = [d % x.rank for d in (dims if isinstance(dims, (tuple, list)) else [dims])]

    def move(codes: torch.Tensor) -> torch.Tensor:
        reduced = reduce_dims(codes, named)
        if keep:
            return reduced
        return reduced.reshape([s for d, s in enumerate(reduced.shape) if d not in named])

    return x.map(out, move)


def vector_norm(
    out: Shape, x: Tracked, ord: Any = 2, dim: Any = None, *args: Any, **kw: Any
) -> Value:
    """linalg.vector_norm over named dimensions."""
    return reduction(out, x, dim, *args, **kw)


def matmul(out: Shape, a: Tracked, b: Tracked, *_: Any, **__: Any) -> Tracked:
    """matmul, bmm, mm: rows follow the left operand; a parameter on the right mixes features."""
    return a.map(out, lambda c: aligned(reduce_dims(c, [c.dim() - 1]), len(out)))


def baddbmm(out: Shape, base: Tracked, a: Tracked, b: Tracked, **__: Any) -> Tracked:
    """baddbmm, addmm: as matmul; the added tensor names no token."""
    return matmul(out, a, b)


def einsum(out: Shape, equation: str, *operands: Any) -> Tracked:
    """einsum: each source from the first operand that holds it, contracted letters reduced."""
    tensors = list(operands[0]) if isinstance(operands[0], (tuple, list)) else list(operands)
    left, right = _lettered(equation.replace(" ", ""), tensors)
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


def _lettered(equation: str, tensors: list[Tracked]) -> tuple[str, str]:
    """Both sides of an einsum equation, with letters in place of `...`."""
    left, arrow, right = equation.partition("->")
    if not arrow:
        raise NotImplementedError(f"einsum {equation!r} without ->")
    spare = [letter for letter in string.ascii_letters if letter not in equation]
    counts = [
        x.rank - len(part.replace("...", ""))
        for part, x in zip(left.split(","), tensors, strict=True)
        if "..." in part
    ]
    most = max(counts, default=0)
    names = "".join(spare[:most])
    parts = []
    for part, x in zip(left.split(","), tensors, strict=True):
        own = x.rank - len(part.replace("...", ""))
        parts.append(part.replace("...", names[most - own :] if own else ""))
    return ",".join(parts), right.replace("...", names)


def first_of_several(out: Any, x: Tracked, *_: Any, **__: Any) -> Value:
    """Normalisations that return statistics too: the first output has the tokens."""
    if not isinstance(out[0], (tuple, list)):
        return x
    return [x, *(Tracked(tuple(shape)) for shape in out[1:])]


def checked(out: Any, result: Value) -> Value:
    """A rule's result, if it is of the recorded shapes. Raises NotImplementedError if not."""
    if isinstance(result, list):
        if not out or not isinstance(out[0], (tuple, list)) or len(out) != len(result):
            raise NotImplementedError("another number of results")
        return [x for shape, part in zip(out, result, strict=True) if (x := _fit(shape, part))]
    return _fit(out, result)


def _fit(shape: Shape, result: Tracked) -> Tracked:
    if tuple(result.shape) != tuple(shape):
        raise NotImplementedError(f"a result of shape {tuple(shape)}")
    for codes in result.codes.values():
        if codes.dim() != len(shape) or any(
            side not in (1, full) for side, full in zip(codes.shape, shape, strict=True)
        ):
            raise NotImplementedError(f"a result of shape {tuple(shape)}")
    return result


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


def embedding(out: Shape, a: Tracked, b: Tracked, *_: Any, **__: Any) -> Tracked:
    """embedding: every index becomes a row of features. aten names the table first, torch last."""
    indices = a if a.shape == out[:-1] else b
    return indices.map(out, lambda codes: codes.unsqueeze(-1))


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
    "where": where,
    "embedding": embedding,
    "view_as_complex": view_as_complex,
    "view_as_real": view_as_real,
    **dict.fromkeys(["polar", "complex", "cross", "linalg_cross"], elementwise),
    **dict.fromkeys(["vector_norm", "linalg_vector_norm"], vector_norm),
    **dict.fromkeys(
        ["native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm"],
        first_of_several,
    ),
    **dict.fromkeys([f"{kind}_pool{d}d" for kind in ("avg", "max") for d in (1, 2, 3)], pool),
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(
        """zeros ones full empty zeros_like ones_like empty_like full_like rand randn rand_like
        randn_like new_zeros new_ones new_empty new_full scalar_tensor tensor eye zero
        fill normal uniform random bernoulli exponential nonzero argmax argmin bincount
        one_hot""".split(),
        nothing,
    ),
}
"""Arithmetic by the name of the function or method."""
