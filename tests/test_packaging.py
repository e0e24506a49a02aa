"""What an installed copy holds. The wheel is built in isolation, which needs the network: `make test-slow`."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command, **kwargs) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, encoding="utf-8", **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_editable_install_without_the_optional_packages(tmp_path):
    """`vwn_ref.kernels` is found from any directory; Triton and what only the experiments use may be missing."""
    code = "import sys; sys.modules.update(dict.fromkeys(['triton', 'datasets', 'tokenizers', 'matplotlib']))"
    code += "; import vwn_ref.kernels; print(vwn_ref.kernels.__file__)"
    # Not from the clone's own directory: there the folder vwn_ref is found without an installation.
    assert Path(run(sys.executable, "-c", code, cwd=tmp_path)) == ROOT / "kernels" / "__init__.py"


def test_experiments_name_the_packages_of_their_extra():
    from vwn_ref.experiments import PACKAGES

    extra = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert sorted(PACKAGES) == sorted(re.match(r"\w+", needed)[0] for needed in extra["experiments"])


def test_a_command_without_its_packages_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules.update(tqdm=None, tyro=None)")
    command = [sys.executable, "-m", "vwn_ref.experiments.train", "--help"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("vwn_ref.experiments needs tqdm, tyro, not installed here")
    assert '".[experiments]"' in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"  # a build leaves build/ where it runs, and takes up what is left there
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("vwn_ref", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {f.relative_to(ROOT).as_posix() for folder in ("vwn_ref", "kernels") for f in (ROOT / folder).rglob("*")}
    expected = {name for name in expected if name.endswith((".py", ".cpp", ".toml"))}
    expected = {name.replace("kernels/", "vwn_ref/kernels/", 1) for name in expected}
    assert {name for name in names if ".dist-info/" not in name} == expected

    # Imported from the wheel alone: -S leaves out the editable install, and torch is put back by its path.
    site = Path(pytest.__file__).parents[1]
    code = f"import sys; sys.path += [{str(wheel)!r}, {str(site)!r}]; import vwn_ref.kernels as k; print(k.__file__)"
    assert str(wheel) in run(sys.executable, "-S", "-c", code, cwd=tmp_path)
