"""Sidecar files: every kind of damage is one error, and saving is all or nothing."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sidecar_samples import FIRST, file_parts, small_sidecar, write_parts

from veda_compile import sidecar_file
from veda_compile.errors import SidecarError
from veda_compile.sidecar import Sidecar

NAME = "model.veda.safetensors"
NOTHING_MORE = {"static": False, "columns": 0, "rank": 0}
Document = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    small_sidecar("projection").save(tmp_path / NAME)
    return tmp_path / NAME


def refused(path: Path, *named: str) -> None:
    """Loading gives one SidecarError of one line that names the file and the values."""
    with pytest.raises(SidecarError) as caught:
        Sidecar.load(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(path), *named):
        assert part in message


def layer(document: Document) -> dict[str, Any]:
    found: dict[str, Any] = document["model"]["layers"][0]
    return found


BAD_DOCUMENTS: dict[str, tuple[Callable[[Document], Any], str]] = {
    "version-1": (lambda d: d.update(version=1), "version is 1: this release reads version 2"),
    "version-text": (lambda d: d.update(version="2"), "version is '2'"),
    "version-true": (lambda d: d.update(version=True), "version is True"),
    "no-version": (lambda d: d.pop("version"), "'version'"),
    "unknown-key": (lambda d: d.update(scores="mean"), "'scores' (did you mean 'score'?)"),
    "no-provenance": (lambda d: d.pop("provenance"), "'provenance'"),
    "model-list": (lambda d: d.update(model=[]), "model is []"),
    "model-key": (lambda d: d["model"].update(name="Wan"), "'name'"),
    "no-class": (lambda d: d["model"].__delitem__("class"), "'class'"),
    "class-int": (lambda d: d["model"].update({"class": 3}), "the model class is 3"),
    "layers-dict": (lambda d: d["model"].update(layers={}), "model.layers is {}"),
    "layers-empty": (lambda d: d["model"].update(layers=[]), "0 layers"),
    "layer-text": (lambda d: d["model"].update(layers=["a"]), "model.layers[0] is 'a'"),
    "layer-key": (lambda d: layer(d).update(width=8), "'width'"),
    "layer-lacks": (lambda d: layer(d).pop("head_dim"), "'head_dim'"),
    "layer-twice": (lambda d: layer(d).update(name="blocks.1.attn1"), "appears twice"),
    "heads-text": (lambda d: layer(d).update(heads="3"), "'3'"),
    "heads-true": (lambda d: layer(d).update(heads=True), "True"),
    "heads-huge": (lambda d: layer(d).update(heads=10**12), "1000000000000"),
    "heads-other": (lambda d: layer(d).update(heads=4), "shape (2, 3, 3)"),
    "head_dim-huge": (lambda d: layer(d).update(head_dim=1025), "1025"),
    "head_dim-other": (lambda d: layer(d).update(head_dim=16), "must be (2, 3, 48, 16)"),
    "layers-many": (
        lambda d: d["model"].update(
            layers=[
                {"name": str(i), "heads": 1, "head_dim": 1, "fingerprint": None, **NOTHING_MORE}
                for i in range(10_001)
            ]
        ),
        "10001 layers",
    ),
    "fingerprint": (lambda d: layer(d).update(fingerprint="xyz"), "'xyz'"),
    "grids-none": (lambda d: d.update(grids=None), "grids is None"),
    "grid-int": (lambda d: d.update(grids=[5, 16, 24]), "grids[0] is 5"),
    "grid-two": (lambda d: d["grids"][0].pop(), "(5, 16)"),
    "grid-zero": (lambda d: d["grids"][0].__setitem__(0, 0), "(0, 16, 24)"),
    "grid-huge": (lambda d: d["grids"][0].__setitem__(0, 65_537), "65537"),
    "grid-twice": (lambda d: d["grids"].__setitem__(1, d["grids"][0]), "(5, 16, 24) appears twice"),
    "grids-more": (lambda d: d["grids"].append([1, 1, 1]), "shape (2, 3, 3)"),
    "grids-empty": (lambda d: d["grids"].clear(), "shape (2, 3, 3)"),
    "grids-absurd": (lambda d: d.update(grids=[[1, 1, 1]] * 200_000), "1200000 head plans"),
    "score": (lambda d: d.update(score="best"), "'best'"),
    "score-other": (lambda d: d.update(score="mean"), "unknown tensor 'blocks.0.attn1/projection'"),
    "tile_size-100": (lambda d: d.update(tile_size=100), "tile_size is 100"),
    "tile_size-64": (lambda d: d.update(tile_size=64), "tile size, 64"),
    "tile_size-list": (lambda d: d.update(tile_size=[128]), "tile_size is [128]"),
    "provenance-list": (lambda d: d.update(provenance=[]), "provenance is []"),
    "provenance-1e999": (lambda d: json.dumps(d).replace('"seed": 7', '"seed": 1e999'), "inf"),
    "nan": (lambda d: json.dumps(d).replace('"seed": 7', '"seed": NaN'), "NaN"),
    "key-twice": (lambda d: json.dumps(d).replace('"seed"', '"score": 1, "score"'), "'score'"),
    "not-json": (lambda d: "{score:", "not valid JSON"),
    "not-object": (lambda d: "[1]", "[1]"),
    "deep": (lambda d: "[" * 100_000, "not valid JSON"),
    "long-int": (lambda d: "1" * 5000, "not valid JSON"),
}


@pytest.mark.parametrize(("change", "named"), BAD_DOCUMENTS.values(), ids=BAD_DOCUMENTS)
def test_bad_documents(path: Path, change: Callable[[Document], Any], named: str) -> None:
    document, tensors = file_parts(path)
    text = change(document)
    write_parts(path, text if isinstance(text, str) else document, tensors)
    refused(path, named)


def fill(name: str, value: float) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[name].flatten()[0].fill_(value)


def cast(name: str, dtype: torch.dtype) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


SHAPES, DENSITY, PROJECTION = (f"{FIRST}/{x}" for x in ("tile_shapes", "density", "projection"))

BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "unknown": (lambda t: t.update(extra=torch.ones(1)), "unknown tensor 'extra'"),
    "no-shapes": (lambda t: t.pop(SHAPES), f"'{SHAPES}' is missing"),
    "no-density": (lambda t: t.pop(DENSITY), f"'{DENSITY}' is missing"),
    "no-projection": (lambda t: t.pop(PROJECTION), f"'{PROJECTION}' is missing"),
    "shapes-int64": (cast(SHAPES, torch.int64), "dtype 'I64': must be torch.int32"),
    "density-float32": (cast(DENSITY, torch.float32), "dtype 'F32': must be torch.float64"),
    "projection-bf16": (cast(PROJECTION, torch.bfloat16), "dtype 'BF16': must be torch.float32"),
    "shapes-shape": (lambda t: t.update({SHAPES: t[SHAPES].flatten()}), "shape (18,)"),
    "density-shape": (lambda t: t.update({DENSITY: t[DENSITY].T.contiguous()}), "shape (3, 2)"),
    "product": (fill(SHAPES, 3), "(3, 8, 8)"),
    "side-zero": (fill(SHAPES, 0), "(0, 8, 8)"),
    "side-negative": (fill(SHAPES, -2), "(-2, 8, 8)"),
    "density-zero": (fill(DENSITY, 0.0), "0.0"),
    "density-above": (fill(DENSITY, 1.25), "1.25"),
    "density-nan": (fill(DENSITY, float("nan")), "nan"),
    "projection-nan": (fill(PROJECTION, float("nan")), "NaN or infinity"),
    "projection-inf": (fill(PROJECTION, float("inf")), "NaN or infinity"),
}


@pytest.mark.parametrize(("change", "named"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors(path: Path, change: Callable[[Tensors], Any], named: str) -> None:
    document, tensors = file_parts(path)
    change(tensors)
    write_parts(path, document, tensors)
    refused(path, named)


def test_every_truncation_is_refused(path: Path) -> None:
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    cuts = [*range(0, 12), header // 2, header + 7, header + 8, header + 20, len(content) - 1]
    for cut in cuts:
        path.write_bytes(content[:cut])
        refused(path)
    path.write_bytes(content + b"\0")
    refused(path)


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"PK\x03\x04" * 20, b"\0" * 99])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    refused(tmp_path / NAME, f"no safetensors file ({len(content)} bytes)")


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / NAME)
    refused(tmp_path / NAME, "metadata keys are []")
    save_file({"a": torch.ones(1)}, tmp_path / NAME, metadata={"format": "pt", "veda": "{}"})
    refused(tmp_path / NAME, "['format', 'veda']")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / NAME, "No such file")
    refused(tmp_path, "a folder")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop")


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    refused(tmp_path / NAME, "no regular file")


def write_raw(path: Path, header: bytes, data_bytes: int, declared: int | None = None) -> None:
    """A file with any header; its data are a hole, which takes next to no space on disk."""
    length = len(header) if declared is None else declared
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + header)
        file.truncate(8 + len(header) + data_bytes)


def raw_header(path: Path) -> dict[str, Any]:
    """The safetensors header of a file, free to be changed."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


def test_a_header_above_64_mib_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / NAME, b"{", 2**27, declared=2**26 + 1)
    refused(tmp_path / NAME, "67108865 bytes: at most 67108864")


DATA_BYTES = 9456
"""Of the sample, two layers: 2 * (2 * 3 * 3 * 4 + 2 * 3 * 8 + 2 * 3 * 24 * 8 * 4)."""

BAD_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "entry-list": (lambda h: h.update({DENSITY: []}), f"'{DENSITY}' is damaged"),
    "shape-text": (lambda h: h[DENSITY].update(shape="2x3"), f"'{DENSITY}' is damaged"),
    "no-dtype": (lambda h: h[DENSITY].pop("dtype") and None, "dtype None"),
    "shape-float": (lambda h: h[DENSITY].update(shape=[2.0, 3.5]), "(2.0, 3.5)"),
    "overlap": (lambda h: h[DENSITY].update(data_offsets=[48, 96]), "cannot be read"),
    "no-offsets": (lambda h: h[DENSITY].pop("data_offsets") and None, "cannot be read"),
    "metadata-list": (lambda h: h.update(__metadata__=["veda"]), "metadata keys are ['veda']"),
    "veda-object": (lambda h: h.update(__metadata__={"veda": {}}), "not valid JSON"),
    "not-json": (lambda h: b"{veda}", "its header is not valid JSON"),
    "not-text": (lambda h: b"{\xff\xfe}", "its header is not valid JSON"),
    "name-twice": (lambda h: b'{"a": 1, "a": 2}', "'a' stands twice"),
}


@pytest.mark.parametrize(("change", "named"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_headers(path: Path, change: Callable[[dict[str, Any]], Any], named: str) -> None:
    header = raw_header(path)
    raw = change(header)
    write_raw(path, json.dumps(header).encode() if raw is None else raw, DATA_BYTES)
    refused(path, named)


def test_absurd_declared_sizes_are_refused_before_reading(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of 32 GiB under known names: only their headers are looked at."""

    def no_open(*args: Any) -> None:
        raise AssertionError("the file was mapped")

    monkeypatch.setattr(sidecar_file, "safe_open", no_open)
    header = raw_header(path)
    write_raw(path, json.dumps(header).encode(), 2**35)
    refused(path, f"take {DATA_BYTES} bytes but the file has {2**35}")

    header[DENSITY] |= {"shape": [2, 2**31], "data_offsets": [0, 2**35]}
    write_raw(path, json.dumps(header).encode(), 2**35 + DATA_BYTES)
    refused(path, f"shape (2, {2**31}): must be (2, 3)")


def test_loading_runs_nothing_from_the_file(path: Path) -> None:
    """Text that other formats would execute comes back as text."""
    document, tensors = file_parts(path)
    document["provenance"] = {"__reduce__": "os.system", "note": "__import__('os').abort()"}
    write_parts(path, document, tensors)
    code = (
        "import pickle, sys\n"
        "from veda_compile.sidecar import Sidecar\n"
        "def no(*a, **k): raise SystemExit('unpickled')\n"
        "pickle.load = pickle.loads = pickle.Unpickler = no\n"
        "sys.exit(Sidecar.load(sys.argv[1]).provenance['__reduce__'] != 'os.system')"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
