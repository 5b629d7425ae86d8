"""The timestep: the graph input that says how noisy the video is, and the flag made of it.

Models embed the timestep the same way: times a row of frequencies, sine and cosine, then a linear
layer. Positions are embedded by sine and cosine too, but then meet queries and keys, or tokens,
element by element. So the path from the input to the linear layer tells them apart. Guidance
scales, frame rates and sizes go the very same path; names tell those apart, see `find_timestep`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .layers import source_name
from .operations import operation_name
from .sizes import example_tensor, hint

_NAMES = (
    "timestep timesteps time_step vision_timesteps video_timestep t time sigma sigmas noise_level"
).split()
"""What models call their timestep, in order of preference."""

_OTHER = re.compile(r"guidance|cfg|fps|frame_rate|size|resolution|ratio|score|strength|timestep_r")
"""What models call other inputs that they embed like a timestep."""

_CARRIES = frozenset(
    """to float double half bfloat16 long int type type_as contiguous clone detach view reshape
    flatten unflatten ravel squeeze unsqueeze expand expand_as broadcast_to repeat
    repeat_interleave tile getitem transpose permute t cat concat stack chunk split""".split()
)
_TIMES = frozenset(["mul", "imul", "multiply", "__mul__", "__rmul__"])
_OVER = frozenset(["div", "truediv", "itruediv", "__truediv__", "divide"])
_PRODUCTS = frozenset(["outer", "ger", "matmul", "mm", "bmm", "einsum", *_TIMES])
_LINEAR = frozenset(["linear", "addmm", "matmul", "mm", "bmm", "einsum", "conv1d"])

_LARGEST_FRACTION = 2.0
"""Timesteps up to this count as shares of the schedule, larger ones as thousandths."""


@dataclass(frozen=True, eq=False)
class TimestepInput:
    """A graph input that holds the timestep, of any shape.

    divisor: what turns it into a share of the noise schedule, 1 where the graph multiplies it by a
        thousand, 1000 where it divides; None where only its values tell.
    """

    node: fx.Node
    divisor: float | None


def find_timestep(gm: fx.GraphModule, inputs: Sequence[object], batch: int) -> TimestepInput | str:
    """The timestep among the inputs of a whole-model graph, or a sentence that says why not.

    Candidates are no parameters or buffers, and reach a linear layer by way of sine and cosine of
    their products with frequencies. One that bears a name of the timestep is it, "timestep" before
    all. Else names of other inputs that are embedded so (guidance, fps, sizes) are out, and the one
    that is left must hold one value, or one for each of `batch` elements. Two without a name are
    never told apart by guessing.

    inputs: the backend's example inputs. batch: batch size of the attention calls (hint).
    """
    candidates: dict[fx.Node, set[float]] = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if _may_be_timestep(node, value) and (factors := _embedding_factors(node)):
            candidates[node] = factors
    for name in _NAMES:
        for node, factors in candidates.items():
            if _name(node) == name:
                return TimestepInput(node, _divisor(factors))
    left = [
        node for node in candidates if not _OTHER.search(_name(node)) and _one_for_each(node, batch)
    ]
    if len(left) > 1:
        names = ", ".join(_name(node) for node in left)
        return f"several inputs may be the timestep ({names}): call the right one `timestep`"
    if not left:
        return "no input of the graph is embedded as a timestep"
    return TimestepInput(left[0], _divisor(candidates[left[0]]))


def insert_keep_all(
    gm: fx.GraphModule, timestep: TimestepInput, threshold: fx.Node, device: torch.device
) -> fx.Node:
    """Add `keep_all_at` to the graph, before all else; returns the node of the flag.

    threshold: an input of the graph, see `keep_all_at`.
    """
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    call = gm.graph.call_function
    with gm.graph.inserting_before(first):
        node = timestep.node
        tensor = example_tensor(node)
        if tensor is not None and tensor.device != device:
            # a copy that blocks would wait for all the device has to do
            node = call(torch.ops.aten.to.device, (node, device, torch.float32, True))
        else:
            node = call(torch.ops.aten.to.dtype, (node, torch.float32))
        peak = call(torch.amax, (node,))
        if timestep.divisor is None:
            large = call(torch.gt, (peak, _LARGEST_FRACTION))
            peak = call(torch.where, (large, call(torch.div, (peak, 1000.0)), peak))
        else:
            peak = call(torch.div, (peak, timestep.divisor))
        return gm.graph.create_node(
            "call_function", torch.ge, (peak, threshold), name="veda_keep_all"
        )


def keep_all_at(timestep: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Whether the noise of a call reaches `threshold`, a share of the schedule, both of one device.

    timestep: any shape; its largest element counts. Values up to 2 are shares, larger ones
        thousandths. Schedules in shares may exceed 1 a little (c_noise of EDM does); of those in
        thousandths the last step, up to 2, counts as noisy, which costs time and no quality.
    threshold: () float32. Returns () bool; the host waits for nothing.
    """
    peak = timestep.to(torch.float32).amax()
    return torch.where(peak > _LARGEST_FRACTION, peak / 1000.0, peak) >= threshold


def _may_be_timestep(node: fx.Node, value: object) -> bool:
    tensor = example_tensor(node)
    return (
        isinstance(value, torch.Tensor)
        and not isinstance(value, torch.nn.Parameter)
        and tensor is not None
        and tensor.dtype not in (torch.bool, torch.complex64, torch.complex128)
        and "_buffers" not in _source(node)
    )


def _embedding_factors(node: fx.Node) -> set[float]:
    """What scalars multiply the input by before its embeddings; nothing if it has none."""
    waves = [(name, factor) for wave, name, factor in _waves(node) if _meets_linear(wave)]
    return {
        factor for name, factor in waves if ("sin" if name == "cos" else "cos", factor) in waves
    }


def _waves(start: fx.Node) -> Iterator[tuple[fx.Node, str, float]]:
    """(node, "sin" or "cos", factor) where products of the input with frequencies enter these."""
    seen = set()
    front: list[tuple[fx.Node, float, bool]] = [(start, 1.0, False)]
    while front:
        node, factor, multiplied = front.pop()
        for user in node.users:
            if user in seen:
                continue
            name = operation_name(user)
            other = _other_operand(user, node)
            scalar = other if isinstance(other, int | float) else 0
            if multiplied and name in ("sin", "cos"):
                yield user, name, factor
            elif name in _TIMES and scalar:
                front.append((user, factor * scalar, multiplied))
            elif name in _OVER and user.args[0] is node and scalar:
                front.append((user, factor / scalar, multiplied))
            elif name in _PRODUCTS and isinstance(other, fx.Node):
                front.append((user, factor, True))
            elif name in _CARRIES and _subject(user, node):
                front.append((user, factor, multiplied))
            else:
                continue
            seen.add(user)


def _meets_linear(wave: fx.Node) -> bool:
    """Whether a sine or cosine reaches a linear layer before it meets any other tensor."""
    seen, front = {wave}, [wave]
    while front:
        node = front.pop()
        for user in node.users:
            name = operation_name(user)
            if name in _LINEAR and _subject(user, node):
                return True
            scaled = name in _TIMES and isinstance(_other_operand(user, node), int | float)
            if user not in seen and (scaled or (name in _CARRIES and _subject(user, node))):
                seen.add(user)
                front.append(user)
    return False


def _subject(user: fx.Node, node: fx.Node) -> bool:
    """Whether `node` is what the operation works on: its first operand, or one of the first list;
    einsum names its formula first, and addmm its bias."""
    place = 1 if operation_name(user) in ("einsum", "addmm") else 0
    first = user.args[place] if len(user.args) > place else user.kwargs.get("input")
    return first is node or (isinstance(first, list | tuple) and node in first)


def _other_operand(user: fx.Node, node: fx.Node) -> object:
    """The second operand of an operation on two; None if it is not on two."""
    args = user.args[1:] if operation_name(user) == "einsum" else user.args
    given = [*args, *(user.kwargs[key] for key in ("input", "other") if key in user.kwargs)]
    if len(given) != 2 or node not in given:
        return None
    return given[1] if given[0] is node else given[0]


def _divisor(factors: set[float]) -> float | None:
    """What the factors say of the input's unit: whoever multiplies by a thousand has a share."""
    if min(factors) >= 100.0:
        return 1.0
    return 1000.0 if 0.0 < max(factors) <= 0.01 else None


def _one_for_each(node: fx.Node, batch: int) -> bool:
    tensor = example_tensor(node)
    assert tensor is not None
    sides = [hint(side) for side in tensor.shape]
    return all(side == 1 for side in sides) or sides == [batch] or sides == [batch, 1]


def _name(node: fx.Node) -> str:
    """The last word of the input's path: "timestep" of `kwargs['timestep']`."""
    words: list[str] = re.findall(r"[A-Za-z_]\w*", _source(node))
    return words[-1].lower() if words else ""


def _source(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    return node.name if source is None else source_name(source)
