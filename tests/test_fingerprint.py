"""Fingerprints: stable over dtype, wrappers and replaced parameters; different between layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from veda_compile.fingerprint import MAX_NUMEL, fingerprint, module_tensors


class Attention(nn.Module):
    def __init__(self, seed: int, width: int = 16) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(width)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)


class Lora(nn.Module):
    """An adapter as PEFT builds it: the wrapped layer becomes `base_layer`."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.lora_A = nn.Linear(base_layer.in_features, 2)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(base_layer.out_features))
        self.base_layer = base_layer


class Saved(nn.Module):
    """A fully trained copy beside the original, as PEFT keeps it."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(original)})
        self.original_module = original


def of(module: nn.Module) -> str | None:
    return fingerprint(module_tensors(module))


def test_is_short_hexadecimal_and_repeatable() -> None:
    mark = of(Attention(0))
    assert mark is not None and len(mark) == 32 and set(mark) <= set("0123456789abcdef")
    assert of(Attention(0)) == mark
    assert of(Attention(1)) != mark


def test_value_is_pinned() -> None:
    """Sidecars on disk hold fingerprints: a changed algorithm would orphan them all."""
    assert fingerprint([torch.arange(4.0), torch.ones(2)]) == "0c46c2a6e7e6287eabb6876d049d0bc3"


def test_float32_and_bfloat16_loads_agree() -> None:
    full = Attention(0)
    assert of(copy.deepcopy(full).to(torch.bfloat16)) == of(full)
    assert of(copy.deepcopy(full).to(torch.float64)) == of(full)


def test_one_changed_value_changes_it() -> None:
    module = Attention(0)
    before = of(module)
    with torch.no_grad():
        module.norm_q.weight[5] += 0.5
    assert of(module) != before


def test_order_and_shapes_count() -> None:
    a, b = torch.arange(3.0), torch.arange(5.0)
    assert fingerprint([a, b]) != fingerprint([b, a])
    assert fingerprint([torch.zeros(8)]) != fingerprint([torch.zeros(3), torch.zeros(5)])
    assert fingerprint([torch.zeros(8)]) != fingerprint([torch.zeros(9)])


def test_other_tensors_are_skipped() -> None:
    norm = torch.arange(4.0)
    others = [
        torch.ones(2, 2),
        torch.ones(()),
        torch.ones(0),
        torch.ones(3, dtype=torch.int64),
        torch.ones(MAX_NUMEL + 1),
    ]
    assert fingerprint([*others, norm]) == fingerprint([norm])
    assert fingerprint(others) is None
    assert fingerprint([]) is None
    assert fingerprint([torch.ones(MAX_NUMEL)]) is not None


def test_none_without_values() -> None:
    assert fingerprint([torch.ones(4, device="meta"), torch.ones(4)]) is None


def test_strided_and_trainable_parameters_work() -> None:
    plain = torch.arange(8.0)
    strided = nn.Parameter(torch.arange(16.0) / 2)[::2]
    assert fingerprint([strided]) == fingerprint([plain])


@pytest.mark.parametrize("names", [["to_q"], ["to_k"], ["to_q", "to_k"]])
def test_adapters_do_not_change_it(names: list[str]) -> None:
    module = Attention(0)
    before = of(module)
    for name in names:
        setattr(module, name, Lora(getattr(module, name)))
    assert of(module) == before


def test_saved_modules_and_compiled_modules_do_not_change_it() -> None:
    module = Attention(0)
    before = of(module)
    module.norm_q = Saved(module.norm_q)  # type: ignore[assignment]
    module.to_k = torch.compile(module.to_k)  # type: ignore[assignment]
    assert of(module) == before


def test_replaced_parameters_keep_it() -> None:
    module = Attention(0)
    before = of(module)
    module.to_q.bias = nn.Parameter(module.to_q.bias.detach().clone())
    assert of(module) == before


def test_order_is_by_name_not_by_registration() -> None:
    module = Attention(0)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    order = [names[id(tensor)] for tensor in module_tensors(module)]
    assert order == ["norm_q.weight", "to_k.bias", "to_q.bias"]
