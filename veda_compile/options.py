"""Options of the backend: one frozen, hashable value, checked in full when it is made."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from .errors import OptionsError, shown, suggestion
from .kernels.executors import EXECUTOR_NAMES

DEFAULT_DENSITY = 0.2
"""Share of key tiles kept where neither an option nor a sidecar says otherwise."""

TILE_SIZES = (64, 128)
"""Tokens per tile that the kernels are built for."""

SHORT_VIDEO_TOKENS = 16_384
"""Below this, tiles of 128 tokens leave fewer than 128 tiles to choose among: use 64."""

AUTO = "auto"
"""Value of option `sidecar`: measure in the first calls, and keep the result in the cache."""

SCORE_CHOICES = ("auto", "closed_form", "mean")
EXECUTOR_CHOICES = ("auto", *EXECUTOR_NAMES)
INNER_CHOICES = ("inductor", "aot_eager", "eager")


def tile_size_for(video_tokens: int) -> int:
    """Tokens per tile for a video of `video_tokens` tokens when nothing else decides: 64 or 128."""
    return 64 if video_tokens < SHORT_VIDEO_TOKENS else 128


@dataclass(frozen=True)
class Options:
    """What a user can set. Plain data: Dynamo compares options to share code between modules.

    sidecar: path of a `*.veda.safetensors` file with per-layer plans. "auto", the default, finds
        the plans in the model's first calls and keeps them for later processes (a file of that name
        has to be given as "./auto"). None is one tile shape for all heads, from the first call on.
    density: share of key tiles kept, mean over heads, in (0, 1]; None is the sidecar's, or
        `DEFAULT_DENSITY` without one.
    tile_size: 64 or 128 tokens per tile; None is the sidecar's, or `tile_size_for`.
    score: "closed_form", "mean" or "auto" (the sidecar's, or "closed_form" without one).
    executor: "reference", "cpu", "triton", "hopper" or "auto" (by device, and by what was
        measured on it); a named one never falls back.
    dense_layers: names or indices (from 0) of the attention layers that stay dense.
    dense_timesteps: share of the noise schedule, from its noisy end, at which attention stays
        exact: 0.3 is timesteps from 700 of 1000 on. It needs the timestep in the compiled graph
        (whole-model compilation), and timesteps that fall as the video becomes clean, as nearly
        all do (Mochi's rise).
    min_tokens: shorter sequences stay dense; "auto" lets the backend decide.
    grid: (T, H, W) of the video's tokens where the graph does not tell; None is to find it.
    strict: raise where an attention layer would stay dense.
    mode: a key of `torch._inductor.list_mode_options()`, or None.
    inner: what compiles the rewritten graph: "inductor", "aot_eager" or "eager".

    Raises OptionsError, naming the value and what it must be.
    """

    sidecar: str | None = AUTO
    density: float | None = None
    tile_size: int | None = None
    score: str = "auto"
    executor: str = "auto"
    dense_layers: tuple[str | int, ...] = ()
    dense_timesteps: float = 0.0
    min_tokens: int | str = "auto"
    grid: tuple[int, int, int] | None = None
    strict: bool = False
    mode: str | None = None
    inner: str = "inductor"

    def __post_init__(self) -> None:
        for field in fields(self):
            checked = _CHECKS[field.name](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, checked)
        if self.inner != "inductor" and self.mode not in (None, "default"):
            raise OptionsError(
                f"option mode is {self.mode!r} and inner is {self.inner!r}: modes are settings of "
                "Inductor; leave out one of the two"
            )

    @classmethod
    def from_dict(
        cls, options: Mapping[str, Any] | None = None, mode: str | None = None
    ) -> Options:
        """Options from the two arguments that torch.compile hands to a backend.

        options: its `options=`, which may hold "mode" too; mode: its `mode=`. Raises OptionsError.
        """
        if options is None:
            options = {}
        if not isinstance(options, Mapping):
            raise OptionsError(f"options is {shown(options)}: must be a dict such as {_EXAMPLE}")
        known = [field.name for field in fields(cls)]
        for key in options:
            if not isinstance(key, str) or key not in known:
                hint = suggestion(key, known) if isinstance(key, str) else ""
                raise OptionsError(
                    f"unknown option {shown(key)}{hint}; known options: {', '.join(known)}"
                )
        values = dict(options)
        if mode is not None:
            if values.get("mode") not in (None, mode):
                raise OptionsError(
                    f"mode is {shown(mode)} and options['mode'] is {shown(values['mode'])}: "
                    "give one of the two"
                )
            values["mode"] = mode
        return cls(**values)

    def config_patches(self) -> dict[str, Any]:
        """Inductor settings of `mode`, for Inductor's `config_patches` argument."""
        return _modes()[self.mode] if self.mode is not None else {}


_EXAMPLE = "{'density': 0.2}"


def _modes() -> dict[str, dict[str, Any]]:
    """Inductor's modes and their settings."""
    from torch._inductor import list_mode_options  # slow to import, and seldom needed

    return {mode: dict(settings) for mode, settings in list_mode_options().items()}


def _refusal(name: str, value: object, must: str) -> OptionsError:
    return OptionsError(f"option {name} is {shown(value)} ({type(value).__name__}): must be {must}")


def _whole(value: object) -> int | None:
    """`value` as an int if it is a whole number (NumPy's too); True and False are not."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return None


def _number(value: object) -> float | None:
    """`value` as a float if it is a real number (NumPy's too); True and False are not."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond the range of floats
        return math.inf


def _path(name: str, value: object) -> str | None:
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path:
        raise _refusal(name, value, "None, 'auto' or the path of a *.veda.safetensors file")
    return path


def _density(name: str, value: object) -> float | None:
    if value is None:
        return None
    number = _number(value)
    if number is not None and 0.0 < number <= 1.0:
        return number
    raise _refusal(name, value, "None or a number above 0 and at most 1, such as 0.2")


def _dense_timesteps(name: str, value: object) -> float:
    number = _number(value)
    if number is not None and 0.0 <= number <= 1.0:
        return number
    raise _refusal(name, value, "a number from 0 to 1, such as 0.3")


def _tile_size(name: str, value: object) -> int | None:
    if value is None:
        return None
    size = _whole(value)
    if size not in TILE_SIZES:
        raise _refusal(name, value, f"None or one of {', '.join(map(str, TILE_SIZES))}")
    return size


def _choice(choices: tuple[str, ...]) -> Callable[[str, object], str]:
    def check(name: str, value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            hint = suggestion(value, choices) if isinstance(value, str) else ""
            raise _refusal(name, value, f"one of {', '.join(choices)}{hint}")
        return value

    return check


def _dense_layers(name: str, value: object) -> tuple[str | int, ...]:
    must = "a tuple of layer names and indices, such as ('blocks.0.attn1', 39)"
    if not isinstance(value, list | tuple):
        raise _refusal(name, value, must)
    layers: list[str | int] = []
    for entry in value:
        layer = entry if isinstance(entry, str) else _whole(entry)
        if layer is None or layer == "" or (isinstance(layer, int) and layer < 0):
            raise _refusal(f"{name}[{len(layers)}]", entry, f"a name or an index from 0, in {must}")
        layers.append(layer)
    return tuple(layers)


def _min_tokens(name: str, value: object) -> int | str:
    if isinstance(value, str) and value == "auto":
        return value
    tokens = _whole(value)
    if tokens is None or tokens < 0:
        raise _refusal(name, value, "'auto' or a whole number of tokens, at least 0")
    return tokens


def _grid(name: str, value: object) -> tuple[int, int, int] | None:
    if value is None:
        return None
    sides = [_whole(side) for side in value] if isinstance(value, list | tuple) else []
    if len(sides) != 3 or any(side is None or side < 1 for side in sides):
        raise _refusal(name, value, "None or three whole numbers (T, H, W), each at least 1")
    t, h, w = (side for side in sides if side is not None)
    return (t, h, w)


def _strict(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _refusal(name, value, "True or False")
    return value


def _mode(name: str, value: object) -> str | None:
    if value is None:
        return None
    return _choice(tuple(_modes()))(name, value)


_CHECKS: dict[str, Callable[[str, object], Any]] = {
    "sidecar": _path,
    "density": _density,
    "tile_size": _tile_size,
    "score": _choice(SCORE_CHOICES),
    "executor": _choice(EXECUTOR_CHOICES),
    "dense_layers": _dense_layers,
    "dense_timesteps": _dense_timesteps,
    "min_tokens": _min_tokens,
    "grid": _grid,
    "strict": _strict,
    "mode": _mode,
    "inner": _choice(INNER_CHOICES),
}
