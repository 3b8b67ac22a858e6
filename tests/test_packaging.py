"""The wheel holds one top-level name and every module, and works away from the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import fastlora

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "fastlora",
    "kernels",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
)


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    # An inherited PYTHONPATH could lead back to the checkout.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(source, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy]
    run(*build, cwd=copy)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel_files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", target, wheel, cwd=target)
    return target


def test_only_top_level_name_is_fastlora(wheel: Path, wheel_files: list[str], site: Path) -> None:
    is_code = [name for name in wheel_files if ".dist-info/" not in name]
    assert {name.partition("/")[0] for name in is_code} == {"fastlora"}
    with zipfile.ZipFile(wheel) as archive:
        (listed,) = (name for name in wheel_files if name.endswith("top_level.txt"))
        assert archive.read(listed).decode().split() == ["fastlora"]
    assert [entry.name for entry in site.iterdir() if entry.suffix != ".dist-info"] == ["fastlora"]


def test_wheel_holds_every_module_and_the_type_marker(wheel_files: list[str]) -> None:
    package = ROOT / "fastlora"
    modules = {f"fastlora/{p.relative_to(package).as_posix()}" for p in package.rglob("*.py")}
    # rglob does not follow the link on every Python, so the kernels are listed from their home.
    modules |= {f"fastlora/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    packed = {name for name in wheel_files if name.endswith(".py")}
    assert packed == modules
    assert "fastlora/kernels/lora_forward.py" in packed
    assert {"fastlora/py.typed", "fastlora/kernels/replay.cpp", "fastlora/kernels/tape.h"} <= set(
        wheel_files
    )


def test_metadata(wheel: Path, wheel_files: list[str]) -> None:
    (path,) = (name for name in wheel_files if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        metadata = HeaderParser().parsestr(archive.read(path).decode())
    assert metadata["Name"] == "fastlora-kernels"
    assert metadata["Version"] == fastlora.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert any(name.endswith("licenses/LICENSE") for name in wheel_files)


def test_installed_package_imports_away_from_the_checkout(site: Path, tmp_path: Path) -> None:
    # -S leaves an editable install's import hook out: only the wheel can provide fastlora.
    packages = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    script = (
        "import importlib, sys\n"
        f"sys.path[:0] = {[str(site), *packages]!r}\n"
        "import fastlora\n"
        "kernel = importlib.import_module('fastlora.kernels.lora_forward')\n"
        "print(fastlora.__version__, fastlora.__file__, kernel.__file__, sep='\\n')\n"
    )
    version, package, kernel = run(sys.executable, "-S", "-c", script, cwd=tmp_path).split("\n")[:3]
    assert version == fastlora.__version__
    assert Path(package) == site / "fastlora" / "__init__.py"
    assert Path(kernel) == site / "fastlora" / "kernels" / "lora_forward.py"


def test_kernels_folder_is_no_package_and_the_link_leads_to_it() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "fastlora" / "kernels") == os.path.join("..", "kernels")


def test_readme_commands_are_one_line_each_and_use_the_constraints() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv .venv && ")]
    assert len(commands) == 2
    assert all(".venv/bin/pip install -c constraints.txt -e '.[" in line for line in commands)
    assert commands[0].endswith(" && .venv/bin/python -m fastlora demo")
    assert commands[1].endswith(" && .venv/bin/python -m pytest -q -n 2 tests")


def test_ci_runs_the_readme_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "grep -m 1 -- '-m pytest' README.md" in script
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = next(line for line in readme.splitlines() if "-m pytest" in line)
    assert first.startswith("python3 -m venv .venv && ")


def test_readme_never_names_the_unrelated_package() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"pip install (-\S+ )*fastlora(?!-kernels)", readme)


def test_constraints_pin_exact_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][^;\s]*(; python_version .*)?", p) for p in pins)
    assert {"torch", "triton", "numpy"} <= {pin.partition("==")[0] for pin in pins}


def test_readme_examples_run(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    printed = run(sys.executable, "-c", "\n".join(blocks), cwd=tmp_path, path=ROOT)
    assert "replaced 2 linears: 0, 2" in printed
    assert re.search(r"^(fused|eager): ", printed, re.MULTILINE)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(
    not Path(fastlora.__file__).is_relative_to(ROOT), reason="fastlora is installed beside it"
)
@pytest.mark.parametrize(
    "name",
    [
        *("benchmarks/bench_layers.py", "benchmarks/bench_group.py"),
        *("benchmarks/bench_decode.py", "tests/sanitize.py"),
    ],
)
def test_scripts_run_from_a_checkout_that_is_not_installed(name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    packages = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    script = (
        "import importlib.util, runpy, sys\n"
        f"sys.path[:] = [*filter(None, sys.path), *{packages!r}]\n"
        "assert importlib.util.find_spec('fastlora') is None\n"
        "sys.argv[1:] = ['--help']\n"
        f"runpy.run_path({str(ROOT / name)!r}, run_name='__main__')\n"
    )
    assert "usage:" in run(sys.executable, "-S", "-c", script, cwd=tmp_path)
