"""Tags: what is known of tensors on their way from one compiled graph to the next.

A tag belongs to one tensor object with the contents it had: another object, an in-place write or
other memory, and the tensor counts as untagged. Tensors made under torch.inference_mode count no
writes and are never tagged; writing through `tensor.data` stays unseen. Tags die with tensors.
Where a graph returns a tensor of which nothing can be told, the cause is kept in the tag's place.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .passes.origins import Part, Pattern


class Root:
    """A tensor, with the contents it had, that entered a graph with nothing known of it."""

    __slots__ = ()


@dataclass(frozen=True, eq=False)
class Tag:
    """What a tensor holds: its pattern, and a root for each part of it.

    handed_on: a graph computed the tensor; else it is the root itself.
    """

    pattern: Pattern
    roots: tuple[Root, ...]
    handed_on: bool


@dataclass(frozen=True, eq=False)
class Relation:
    """What is known of several tensors: keys are equal where the same is known.

    key: their patterns, and which parts share a root, by number. roots: the roots by number.
    """

    key: tuple[tuple[Pattern, tuple[int, ...]] | None, ...]
    roots: tuple[Root, ...]


@dataclass(frozen=True)
class Untold:
    """Why nothing is known of a tensor that a graph returned, and what the user can do."""

    cause: str
    remedy: str


class Tags:
    """The tags of all living tensors."""

    def __init__(self) -> None:
        self._untold: dict[int, tuple[weakref.ref[torch.Tensor], Untold]] = {}
        self._held: dict[int, tuple[weakref.ref[torch.Tensor], int, int, Tag]] = {}
        self._patterns: weakref.WeakValueDictionary[object, Pattern] = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._held)

    def of(self, tensor: torch.Tensor) -> Tag | None:
        """The tag of a tensor that is as it was when it was tagged."""
        held = self._held.get(id(tensor))
        if held is None or held[0]() is not tensor:
            return None
        _, version, address, tag = held
        return tag if tensor._version == version and tensor.data_ptr() == address else None

    def tag(self, tensor: torch.Tensor, tag: Tag) -> None:
        """Tag a tensor as it is now."""
        if not _can_be_tagged(tensor):
            return
        key, held = id(tensor), self._held
        self._untold.pop(key, None)

        def forget(ref: weakref.ref[torch.Tensor]) -> None:
            if key in held and held[key][0] is ref:
                del held[key]

        held[key] = (weakref.ref(tensor, forget), tensor._version, tensor.data_ptr(), tag)

    def drop(self, tensor: torch.Tensor, why: Untold | None = None) -> None:
        """Nothing is known of a tensor any more. why: the cause, where there is one to name."""
        key, untold = id(tensor), self._untold
        self._held.pop(key, None)
        untold.pop(key, None)
        if why is None:
            return

        def forget(ref: weakref.ref[torch.Tensor]) -> None:
            if key in untold and untold[key][0] is ref:
                del untold[key]

        untold[key] = (weakref.ref(tensor, forget), why)

    def why_untold(self, tensor: torch.Tensor) -> Untold | None:
        """Why nothing is known of a tensor, if a graph that returned it left word of it."""
        held = self._untold.get(id(tensor))
        return held[1] if held is not None and held[0]() is tensor else None

    def or_root(self, tensor: torch.Tensor) -> Tag:
        """The tensor's tag; a tensor without one becomes a root."""
        tag = self.of(tensor) if _can_be_tagged(tensor) else None
        if tag is None:
            shape = tuple(tensor.shape)
            tag = Tag(self.pattern(shape, [Part(shape, None)]), (Root(),), False)
            self.tag(tensor, tag)
        return tag

    def relation(self, tensors: Sequence[torch.Tensor], roots: bool) -> Relation:
        """What is known of some tensors. roots: whether those without a tag become roots."""
        numbers: dict[Root, int] = {}
        key: list[tuple[Pattern, tuple[int, ...]] | None] = []
        for tensor in tensors:
            tag = self.or_root(tensor) if roots else self.of(tensor)
            if tag is None:
                key.append(None)
                continue
            parts = tuple([numbers.setdefault(root, len(numbers)) for root in tag.roots])
            key.append((tag.pattern, parts))
        return Relation(tuple(key), tuple(numbers))

    def pattern(self, shape: Sequence[int], parts: Sequence[Part]) -> Pattern:
        """The one pattern with these parts: what is equal is the same object."""
        key = (tuple(shape), tuple((part.shape, _digest(part.moved)) for part in parts))
        known = self._patterns.get(key)
        if known is None:
            known = self._patterns[key] = Pattern(tuple(shape), tuple(parts))
        return known


TAGS = Tags()
"""Tensors pass between graphs through the model's own code: there is no other place to tell."""


def _can_be_tagged(tensor: torch.Tensor) -> bool:
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    return plain and not tensor.is_inference()


def _digest(codes: torch.Tensor | None) -> object:
    if codes is None:
        return None
    return tuple(codes.shape), hashlib.blake2b(codes.numpy().tobytes()).digest()
