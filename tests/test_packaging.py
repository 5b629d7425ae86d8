"""What installs: the folders at the root import as parts of veda_compile and as nothing else."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "veda_compile": "veda_compile",
    "veda_compile.passes": "passes",
    "veda_compile.kernels": "kernels",
}


def _setuptools() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def _code_folders() -> set[str]:
    """Dotted names of every folder with Python files below the three packages."""
    names = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.parent.relative_to(ROOT / folder).parts
            names.add(".".join((package, *inner)))
    return names


def test_every_code_folder_is_packaged() -> None:
    assert set(_setuptools()["packages"]) == _code_folders()


def test_only_the_package_itself_has_an_init() -> None:
    # an __init__ in kernels/ would shadow Hugging Face's `kernels` when tests run from the root
    found = {p.relative_to(ROOT).as_posix() for f in FOLDERS.values()
             for p in (ROOT / f).rglob("__init__.py")}  # fmt: skip
    assert found == {"veda_compile/__init__.py"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(out), str(ROOT)],
        check=True, capture_output=True, cwd=out,
    )  # fmt: skip
    return next(out.glob("*.whl"))


def test_wheel_holds_every_source_file_and_nothing_else_importable(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".typed"):
                inner = path.relative_to(ROOT / folder).as_posix()
                assert f"{package.replace('.', '/')}/{inner}" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"veda_compile"}


def test_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import veda_compile;"
        "from veda_compile.kernels import op; from veda_compile.passes import analyse;"
        "assert op.__file__.startswith(sys.argv[1]), op.__file__"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=tmp_path)


def test_uninstalled_checkout_imports(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import veda_compile.kernels.op as o,"
        "veda_compile.passes.analyse; assert o.__file__.startswith(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True, cwd=tmp_path)


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_folders_are_not_importable_by_their_own_name(name: str, tmp_path: Path) -> None:
    code = (
        f"import sys\ntry:\n    import {name} as found\n"
        "except ModuleNotFoundError:\n    sys.exit()\n"
        "assert not (found.__file__ or '').startswith(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True, cwd=tmp_path)


def test_arrows_run_one_way() -> None:
    """veda_compile -> passes -> kernels: no file imports against the arrows."""
    for path in (ROOT / "kernels").rglob("*.py"):
        text = path.read_text()
        assert "torch.fx" not in text, path
        assert "from torch import fx" not in text, path
        assert "passes" not in "".join(line for line in text.splitlines() if "import" in line), path
    for path in (ROOT / "passes").rglob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith(("from ..", "import veda_compile", "from veda_compile")):
                assert line.startswith("from ..kernels."), f"{path}: {line}"
