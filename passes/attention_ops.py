"""A registry of attention custom ops: which argument means what.

Ops are known by qualified name, so that none of their packages is imported. Arguments that mean
nothing here must hold their default or a neutral value; otherwise the call is more than plain
attention and stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._library.custom_ops import CustomOpDef

from .compute import attention
from .movement import Rule, Value
from .offsets import Offsets
from .operations import operation_name
from .segments import Packed, Segments, read_segments

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "window_size": (None, (-1, -1), [-1, -1]),
    "window_size_left": (None, -1),
    "window_size_right": (None, -1),
    "softcap": (None, 0, 0.0),
    "alibi_slopes": (None,),
    "block_table": (None,),
    "leftpad_k": (None,),
    "seqused_k": (None,),
    "seqused_q": (None,),
    "attention_chunk": (None, 0),
    "qv": (None,),
    "q_descale": (None,),
    "k_descale": (None,),
    "v_descale": (None,),
    "bias": (None,),
    "custom_mask_type": (None, 0),
}
"""Values that leave attention plain, for arguments that can change it."""

_HARMLESS = frozenset(
    """return_softmax return_attn_probs return_lse return_debug_mask compute_log_sumexp num_splits
    pack_gqa deterministic sm_margin zero_tensors op max_seqlen_q max_seqlen_k enable_gqa
    scheduler_metadata tensor_layout""".split()
)
"""Arguments that change how attention is computed, or what else is returned, but not the output."""


@dataclass(frozen=True)
class AttentionOp:
    """How to read one attention op.

    name: "namespace::op"; "*" stands for any letters, as in namespaces that end in a build's hash.
    axes: sides of q, k, v and the output (see `Operand`). The other fields name arguments.
    output_first: the output is the first of the op's results, where it has several.
    packed: (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) of a varlen op.
    oddity: what makes every call more than plain attention, or None.
    """

    name: str
    axes: str = "bnhd"
    q: str = "q"
    k: str = "k"
    v: str = "v"
    scale: str | None = "softmax_scale"
    causal: str | None = "causal"
    dropout: str | None = None
    mask: str | None = None
    output_first: bool = True
    packed: tuple[str, str, str, str] | None = None
    oddity: str | None = None


_VARLEN = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")

_ATEN: Any = {
    "axes": "bhnd", "q": "query", "k": "key", "v": "value", "scale": "scale",
    "causal": "is_causal", "dropout": "dropout_p",
}  # fmt: skip
_QUANTISED = "keys and values in 8 bits; choose another attention backend to have it sparse"

_REGISTRY: dict[str, AttentionOp] = {
    op.name: op
    for op in (
        AttentionOp("flash_attn::_flash_attn_forward", dropout="dropout_p"),
        AttentionOp("flash_attn::_flash_attn_varlen_forward", axes="nhd", dropout="dropout_p",
                    packed=_VARLEN),
        AttentionOp("flash_attn_3::_flash_attn_forward"),
        AttentionOp("_diffusers_flash_attn_3::_flash_attn_forward"),
        AttentionOp("xformers_flash::flash_fwd", q="query", k="key", v="value", causal="is_causal",
                    dropout="p"),
        AttentionOp("xformers::efficient_attention_forward_cutlass", q="query", k="key", v="value",
                    scale="scale", causal=None, mask="attn_bias", dropout="dropout_p"),
        # kernels from the Hugging Face Hub
        AttentionOp("_flash_attn*::_flash_attn_forward", dropout="dropout_p"),
        AttentionOp("_flash_attn*::_flash_attn_varlen_forward", axes="nhd", dropout="dropout_p",
                    packed=_VARLEN),
        *(AttentionOp(f"sageattention*::{name}", q="query", k="key", v="value", oddity=_QUANTISED)
          for name in ("qk_int8_*", "sageattn*")),
        AttentionOp("aten::scaled_dot_product_attention", mask="attn_mask", **_ATEN),
        AttentionOp("aten::_scaled_dot_product_flash_attention", **_ATEN),
        AttentionOp("aten::_scaled_dot_product_flash_attention_for_cpu", mask="attn_mask", **_ATEN),
        AttentionOp("aten::_scaled_dot_product_efficient_attention", mask="attn_bias", **_ATEN),
        AttentionOp("aten::_scaled_dot_product_cudnn_attention", mask="attn_bias", **_ATEN),
    )
}  # fmt: skip


def register_attention_op(op: AttentionOp) -> None:
    """Teach the pass a custom attention op. Raises ValueError if the name is taken."""
    if op.name in _REGISTRY:
        raise ValueError(f"attention op {op.name!r} is registered already")
    _REGISTRY[op.name] = op


def provenance_rules(nodes: Iterable[fx.Node] = ()) -> dict[str, Rule]:
    """How token codes pass through the attention calls `nodes`, by `operation_name`."""

    def rule(op: AttentionOp, names: list[str], out: Any, *args: Any, **kwargs: Any) -> Value:
        given = dict(zip(names, args, strict=False)) | kwargs
        return attention(out, *(given[name] for name in _operands(op, names)))

    def layer(out: Any, x: Any, *args: Any, **kwargs: Any) -> Value:
        return attention(out, x, x, x)

    calls: dict[str, Rule] = {
        "flex_attention": attention,
        "multi_head_attention_forward": attention,
        "_transformer_encoder_layer_fwd": layer,
    }
    for node in nodes:
        op = find_op(node)
        if op is not None:
            names = list(_schema(node.target))
            calls[operation_name(node)] = partial(rule, op, names)
    return calls


def find_op(node: fx.Node) -> AttentionOp | None:
    """The registry entry of the op that `node` calls."""
    if node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _find(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _find(target._qualified_op_name)
    if isinstance(target, CustomOpDef):
        return _find(target._qualname)
    return None


def _find(name: str) -> AttentionOp | None:
    if name in _REGISTRY:
        return _REGISTRY[name]
    space = name.partition("::")[0]
    if space in ("aten", "prims"):
        return None
    return next((op for known, op in _REGISTRY.items() if fnmatchcase(name, known)), None)


@dataclass(frozen=True, eq=False)
class OpCall:
    """The arguments of one call, by meaning.

    oddity: what makes it more than plain attention. segments: of a varlen op, or what is not
    proven of them.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None = None
    scale: float | None = None
    causal: bool = False
    dropout: float = 0.0
    oddity: str | None = None
    output_first: bool = False
    segments: Segments | str | None = None


def arguments(op: AttentionOp, node: fx.Node, offsets: Offsets) -> OpCall:
    """Read a call of `op` by the names of its schema. offsets: those of the call's graph."""
    schema = _schema(node.target)
    given: dict[str, Any] = dict(zip(schema, node.args, strict=False)) | node.kwargs
    operands = _operands(op, list(schema))
    used = {*operands, op.scale, op.causal, op.dropout, op.mask, *(op.packed or ())}
    odd = [
        name
        for name, value in given.items()
        if name not in used
        and name not in _HARMLESS
        and not (value is None or value in _NEUTRAL.get(name, (schema[name],)))
    ]
    scalars = {name: given.get(name) if name else None for name in (op.scale, op.causal,
                                                                    op.dropout)}  # fmt: skip
    odd += [str(name) for name, value in scalars.items() if isinstance(value, fx.Node)]
    oddity = op.oddity or (f"argument {odd[0]} = {given[odd[0]]}" if odd else None)
    segments = None
    if op.packed:
        sides = _packed(op, operands[0], given, 0), _packed(op, operands[1], given, 1)
        segments = read_segments(node, *sides, offsets)
    mask = given.get(op.mask) if op.mask else None
    scale = scalars[op.scale] if op.scale else None
    q, k, v = (given[name] for name in operands)
    return OpCall(
        q,
        k,
        v,
        mask if isinstance(mask, fx.Node) else None,
        None if scale is None or isinstance(scale, fx.Node) else float(scale),
        bool(scalars[op.causal]) if op.causal else False,
        float(scalars[op.dropout] or 0.0) if op.dropout and not oddity else 0.0,
        oddity,
        op.output_first and isinstance(node.meta.get("example_value"), (tuple, list)),
        segments,
    )


def _operands(op: AttentionOp, names: list[str]) -> tuple[str, str, str]:
    """The names of q, k and v in this version of the op."""
    if op.q not in names and "query" in names:
        return ("query", "key", "value")
    return (op.q, op.k, op.v)


def _schema(target: object) -> dict[str, Any]:
    """The names and the defaults of an op's arguments."""
    if isinstance(target, CustomOpDef):
        target = target._opoverload
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    assert isinstance(target, torch._ops.OpOverload)
    return {argument.name: argument.default_value for argument in target._schema.arguments}


def _packed(op: AttentionOp, operand: str, given: dict[str, Any], which: int) -> Packed:
    """The queries' part of a varlen call (`which` 0), or the keys' (1)."""
    assert op.packed is not None
    bounds, longest = given.get(op.packed[which]), given.get(op.packed[which + 2])
    return Packed(given[operand], op.axes.index("n"), bounds, longest)
