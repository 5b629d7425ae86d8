"""Saving a sidecar is all or nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sidecar_samples import small_sidecar

from veda_compile import sidecar_file
from veda_compile.errors import SidecarError
from veda_compile.sidecar import Sidecar

NAME = "model.veda.safetensors"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    small_sidecar("projection").save(tmp_path / NAME)
    return tmp_path / NAME


def test_save_wants_the_suffix(tmp_path: Path) -> None:
    with pytest.raises(SidecarError, match=r"a\.safetensors: its name must end in \.veda\.safe"):
        small_sidecar().save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_save_needs_the_folder(tmp_path: Path) -> None:
    with pytest.raises(SidecarError, match="not saved"):
        small_sidecar().save(tmp_path / "none" / NAME)


def test_save_replaces_and_leaves_nothing_else(path: Path) -> None:
    small_sidecar("mean").save(path)
    assert Sidecar.load(path).score == "mean"
    assert [entry.name for entry in path.parent.iterdir()] == [NAME]
    plain = path.with_name("plain")
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # as any new file, not private


def half_written(
    tensors: dict[str, torch.Tensor], filename: Path, metadata: dict[str, str]
) -> None:
    filename.write_bytes(b"half of it")
    raise OSError(28, "No space left on device")


def killed(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "failure", "error"),
    [
        ("save_file", half_written, SidecarError),
        ("save_file", killed, KeyboardInterrupt),
        ("_flush", killed, KeyboardInterrupt),
    ],
)
def test_failed_save_keeps_the_old_file(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    failure: Callable[..., None],
    error: type[BaseException],
) -> None:
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sidecar_file, where, failure)
        with pytest.raises(error):
            small_sidecar("mean").save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [NAME]


def test_failed_move_keeps_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def no_move(source: Path, target: Path) -> None:
        assert Sidecar.load(source).score == "mean"  # complete before it is moved
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_move)
        with pytest.raises(SidecarError, match=r"model\.veda\.safetensors: not saved.*denied"):
            small_sidecar("mean").save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [NAME]


def test_what_could_not_be_read_is_not_saved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    monkeypatch.setattr(sidecar_file, "MAX_HEADER_BYTES", 100)
    with pytest.raises(SidecarError, match=r"not saved.*at most 100 "):
        small_sidecar().save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [NAME]
