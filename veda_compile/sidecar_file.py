"""Sidecar files: safetensors with one JSON document, read with distrust and written atomically.

Nothing in a file is executed. Every declared size is checked against the format's limits and
against the file's real length before the file is mapped and a tensor is read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import SidecarError, shown

METADATA_KEY = "veda"
SUFFIX = ".veda.safetensors"

MAX_HEADER_BYTES = 64 * 2**20
"""Largest JSON header of a file; the sidecar's document is part of it."""

_LENGTH_BYTES = 8
_CODES = {torch.float32: "F32", torch.float64: "F64", torch.int32: "I32"}

TensorSpec = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype that a tensor of the file must have."""


@dataclass(frozen=True)
class SidecarFile:
    """A file whose header has been read and nothing else. Made by `open_sidecar`.

    document: the sidecar's JSON document. declared: the header's entry of every tensor.
    data_bytes: what the file holds after its header.
    """

    path: Path
    document: dict[str, Any]
    declared: dict[str, Any]
    data_bytes: int

    def read(self, expected: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
        """All tensors, which must be exactly the expected ones; reads nothing before that is sure.

        Tensors on CPU, mapped from the file. Raises SidecarError.
        """
        for name in sorted(self.declared.keys() - expected.keys()):
            raise SidecarError(f"unknown tensor {shown(name)}: remove it")
        for name, (shape, dtype) in expected.items():
            if name not in self.declared:
                raise SidecarError(f"tensor {shown(name)} is missing: make the file again")
            entry = self.declared[name]
            if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
                raise SidecarError(f"tensor {shown(name)} is damaged: make the file again")
            if entry.get("dtype") != _CODES[dtype]:
                raise SidecarError(
                    f"tensor {shown(name)} has dtype {shown(entry.get('dtype'))}: must be {dtype}"
                )
            if entry["shape"] != list(shape):
                found = shown(tuple(entry["shape"]))
                raise SidecarError(f"tensor {shown(name)} has shape {found}: must be {shape}")
        needed = sum(math.prod(shape) * dtype.itemsize for shape, dtype in expected.values())
        if needed != self.data_bytes:
            raise SidecarError(
                f"truncated or damaged: its tensors take {needed} bytes but the file has "
                f"{self.data_bytes}: copy or make it again"
            )
        try:
            with safe_open(os.fspath(self.path), "pt") as handle:
                return {name: handle.get_tensor(name) for name in expected}
        except (SafetensorError, RuntimeError) as error:  # RuntimeError: no memory to map the file
            raise SidecarError(
                f"cannot be read ({shown(str(error))}): copy or make it again"
            ) from error


@contextmanager
def open_sidecar(path: str | os.PathLike[str]) -> Iterator[SidecarFile]:
    """Read the header of a sidecar. Errors raised inside and here name the file."""
    shown_path = os.fspath(path)
    try:
        length = _header_bytes(Path(path))
        with Path(path).open("rb") as file:
            start = file.read(_LENGTH_BYTES + length)
            size = file.seek(0, os.SEEK_END)
        header = _object(start[_LENGTH_BYTES:], "its header")
        document = _document(header.pop("__metadata__", {}))
        yield SidecarFile(Path(path), document, header, size - len(start))
    except SidecarError as error:
        raise SidecarError(f"sidecar {shown_path}: {error}") from None
    except OSError as error:
        raise SidecarError(
            f"sidecar {shown_path}: cannot be read ({error.strerror or error}): check the path"
        ) from error


def write_sidecar(
    path: str | os.PathLike[str], document: Mapping[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Write a sidecar so that `path` holds either its old content or all of the new one.

    The file is written beside `path`, flushed to disk, and moved into place. Raises SidecarError.
    """
    target = Path(path)
    if not target.name.endswith(SUFFIX):
        raise SidecarError(f"sidecar {target}: its name must end in {SUFFIX}")
    text = json.dumps(document, allow_nan=False)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        # Created here for its permissions: safetensors would allow the owner alone.
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        permissions = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        save_file(tensors, temporary, metadata={METADATA_KEY: text})
        temporary.chmod(permissions)
        _header_bytes(temporary)  # what could not be read is not saved
        _flush(temporary)
        os.replace(temporary, target)
        if os.name == "posix":
            _flush(target.parent)
    except SidecarError as error:
        raise SidecarError(f"sidecar {target}: not saved: {error}") from None
    except (OSError, SafetensorError) as error:
        raise SidecarError(
            f"sidecar {target}: not saved ({shown(str(error))}): check that the folder exists, "
            "may be written and has space"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _flush(path: Path) -> None:
    """Force a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _header_bytes(path: Path) -> int:
    """The length of the JSON header. Refuses what is no safetensors file, and absurd lengths."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise SidecarError(f"it is {kind}: give the path of a *{SUFFIX} file")
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES + 1)
    if len(start) <= _LENGTH_BYTES or start[_LENGTH_BYTES:] != b"{":
        raise SidecarError(
            f"no safetensors file ({status.st_size} bytes): give the path of a *{SUFFIX} file"
        )
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise SidecarError(
            f"its JSON header takes {length} bytes: at most {MAX_HEADER_BYTES} are allowed, "
            "shorten the provenance"
        )
    if length > status.st_size - _LENGTH_BYTES:
        raise SidecarError(
            f"truncated: its header takes {length} bytes but the file has {status.st_size}: copy "
            "or make it again"
        )
    return length


def _document(metadata: object) -> dict[str, Any]:
    """The JSON document from the file's metadata."""
    keys = sorted(metadata) if isinstance(metadata, dict) else metadata
    if not isinstance(metadata, dict) or keys != [METADATA_KEY]:
        raise SidecarError(
            f"its metadata keys are {shown(keys)}: a sidecar has exactly one, {METADATA_KEY!r}; "
            f"give the path of a *{SUFFIX} file"
        )
    return _object(metadata[METADATA_KEY], f"its {METADATA_KEY!r} document")


def _object(text: str | bytes, what: str) -> dict[str, Any]:
    """`text` as a JSON object without repeated keys and without NaN, else SidecarError."""
    try:
        found = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except SidecarError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise SidecarError(
            f"{what} is not valid JSON ({shown(str(error))}): make it again"
        ) from error
    if not isinstance(found, dict):
        raise SidecarError(f"{what} is {shown(found)}: must be a JSON object")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise SidecarError(f"key {shown(key)} stands twice in one JSON object: remove one")
        found[key] = value
    return found


def _no_constant(name: str) -> float:
    raise SidecarError(f"{name} in the JSON document: numbers must be finite")
