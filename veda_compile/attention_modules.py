"""Attention modules, told by their structure: they project to queries, keys and values."""

from __future__ import annotations

import re

import torch
from torch import nn

_QUERY = frozenset({"q", "wq", "query", "queries"})
_KEY = frozenset({"k", "wk", "key", "keys"})
_VALUE = frozenset({"v", "wv", "value", "values"})
_KEY_VALUE = frozenset({"kv", "wkv"})
_ALL = frozenset({"qkv", "wqkv"})


def is_attention(module: nn.Module) -> bool:
    """Whether a module itself owns projections to queries, keys and values, fused or not."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    names = [name for name, _ in module.named_children()]
    names += [name for name, _ in module.named_parameters(recurse=False)]
    words = {word for name in names for word in re.split(r"[^a-z]+", name.lower())}
    if words & _ALL:
        return True
    return bool(words & _QUERY) and bool(words & _KEY_VALUE or (words & _KEY and words & _VALUE))


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a model by path, in the model's order."""
    return {path: module for path, module in model.named_modules() if is_attention(module)}


def nested_models(model: nn.Module) -> list[str]:
    """Paths of models within a model, such as a text encoder beside a transformer."""
    return [path for path, module in model.named_modules() if path and is_model(module)]


def is_model(module: nn.Module) -> bool:
    """Whether a module is a model of its own: one that libraries load by a name."""
    return hasattr(type(module), "from_pretrained")


def owned_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module and all inside it, by path."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
