"""Content fingerprints: telling the layers of a model apart by their parameters.

Regional compilation compiles identical blocks once, so a graph cannot know its layer. The small
one-dimensional parameters of an attention layer (norm weights, biases) differ between trained
layers, are not quantised, and stay the same over processes, devices and replaced parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

MAX_NUMEL = 65_536
"""Longer parameters are left out: hashing must stay cheap."""

FINGERPRINT_LENGTH = 32
"""Hexadecimal digits of a fingerprint (128 bits)."""

_WRAPPERS = frozenset(
    {
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
        "_orig_mod",
        "base_layer",
        "original_module",
    }
)
"""Path components that adapters and wrappers insert around the layer they wrap."""

_ADAPTERS = ("lora_", "modules_to_save.")
"""Parameters whose names contain one of these belong to an adapter, not to the model."""


def fingerprint(tensors: Sequence[torch.Tensor]) -> str | None:
    """Fingerprint of a layer: 32 hexadecimal digits, or None if no tensor qualifies.

    Hashes (SHA-256) shape and values of every floating 1-D tensor of at most `MAX_NUMEL` elements,
    in the given order; the others are skipped. Values are rounded to bfloat16 first, so float32
    and bfloat16 loads of one checkpoint agree (float16 loads may not).
    Tensors on the meta device have no values: None.

    The property that callers need, and must check when they calibrate: the fingerprints of a
    model's layers are all different. Where two layers have equal ones (freshly initialised
    weights, shared weights) or none, layers cannot be told apart this way. Training the hashed
    parameters changes the fingerprint; adapters on the matrices do not.
    """
    digest = hashlib.sha256()
    hashed = False
    for tensor in tensors:
        if not _qualifies(tensor):
            continue
        if tensor.is_meta:
            return None
        rounded = tensor.detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        digest.update(f"{tuple(rounded.shape)};".encode())
        digest.update(rounded.view(torch.int16).numpy().astype("<i2").tobytes())
        hashed = True
    return digest.hexdigest()[:FINGERPRINT_LENGTH] if hashed else None


def module_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """The module's 1-D floating parameters in a canonical order, ready for `fingerprint`.

    Sorted by qualified name without the components that adapters and wrappers insert
    (`to_q.base_layer.bias` sorts as `to_q.bias`); the adapters' own parameters are left out.
    So a layer has one order whether or not it is wrapped.
    """
    named = [
        (_canonical(name), name, parameter)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not any(mark in name for mark in _ADAPTERS) and _qualifies(parameter)
    ]
    named.sort(key=lambda entry: entry[:2])
    return [parameter for _, _, parameter in named]


def _qualifies(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 1 and tensor.is_floating_point() and 0 < tensor.numel() <= MAX_NUMEL


def _canonical(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
