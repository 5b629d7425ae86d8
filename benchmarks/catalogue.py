"""Which transformer classes diffusers has, and which of them the zoo speaks for.

The classes are found by walking the package, so that one that a new release brings shows up as not
covered yet: it needs an entry in the zoo, or a word here on why it attends over no video.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.zoo import ENTRIES

PACKAGE = "diffusers.models.transformers"

NOT_VIDEO: dict[str, str] = {
    name: kind
    for kind, names in {
        "images": """
            AuraFlowTransformer2DModel BriaFibo2Transformer2DModel BriaFiboTransformer2DModel
            BriaTransformer2DModel ChromaTransformer2DModel CogView3PlusTransformer2DModel
            CogView4Transformer2DModel DiTTransformer2DModel DreamLiteTransformer2DModel
            ErnieImageTransformer2DModel Flux2Transformer2DModel Flux3Transformer2DModel
            FluxTransformer2DModel GlmImageTransformer2DModel HiDreamImageTransformer2DModel
            HunyuanDiT2DModel HunyuanImageTransformer2DModel Ideogram4Transformer2DModel
            Krea2Transformer2DModel LongCatImageTransformer2DModel Lumina2Transformer2DModel
            LuminaNextDiT2DModel NucleusMoEImageTransformer2DModel OmniGenTransformer2DModel
            OvisImageTransformer2DModel PRXTransformer2DModel PixArtTransformer2DModel
            QwenImage21Transformer2DModel QwenImageTransformer2DModel SD3Transformer2DModel
            SanaTransformer2DModel Transformer2DModel ZImageTransformer2DModel
        """,
        "audio": """
            AceStepTransformer1DModel LongCatAudioDiTTransformer MiniMaxMusic3RVQDepthDecoder
            MiniMaxMusic3Transformer1DModel StableAudio3DiTModel StableAudioDiTModel T5FilmDecoder
        """,
        "embeddings": "PriorTransformer",
        "proteins": "RFD4ProteinaTransformer",
    }.items()
    for name in names.split()
}
"""What the other classes attend over."""


@dataclass(frozen=True)
class Catalogue:
    """The classes of an installation, in alphabetical order.

    covered: how many zoo entries each has. not_video: what each attends over instead.
    not_covered: no one has looked at these yet. gone: classes named here that are not installed.
    """

    covered: dict[str, int]
    not_video: dict[str, str]
    not_covered: list[str]
    gone: list[str]


def installed_classes() -> list[str]:
    """Names of all model classes of diffusers' transformers, in alphabetical order."""
    base = importlib.import_module("diffusers.models.modeling_utils").ModelMixin
    package = importlib.import_module(PACKAGE)
    found = set()
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{PACKAGE}.{module_info.name}")
        for name, value in inspect.getmembers(module, inspect.isclass):
            if issubclass(value, base) and value.__module__ == module.__name__:
                found.add(name)
    return sorted(found)


def catalogue(classes: Iterable[str] | None = None) -> Catalogue:
    """What is known of these classes; by default of all that are installed."""
    present = sorted(installed_classes() if classes is None else classes)
    entries = [entry.model for entry in ENTRIES if entry.model is not None]
    known = {*entries, *NOT_VIDEO}
    return Catalogue(
        covered={name: entries.count(name) for name in present if name in entries},
        not_video={name: NOT_VIDEO[name] for name in present if name in NOT_VIDEO},
        not_covered=[name for name in present if name not in known],
        gone=sorted(known - set(present)),
    )
