"""The wheel is complete, installing it changes no other package, and its import is light."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from guardtest import in_ci, require

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INCIDENTS = [
    page
    for page in sorted((ROOT / "docs" / "incidents").glob("*.md"))
    if page.stem != "a"  # the trainer of this page is in the environment of tests/integrations
]
SOURCES = ["fastguard", "kernels", "pyproject.toml", "README.md", "LICENSE"]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_of_sources(folder: Path) -> Path:
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


def build_wheel(folder: Path) -> Path:
    """The wheel of this working tree, built from a copy.

    A build in place would also pack files that an earlier build left in build/lib.
    """
    copy_of_sources(folder)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", folder, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def install_in_new_environment(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment with the wheel, which uses the torch installed here.

    A .pth file adds a folder to the path but does not run the .pth files in it, so the editable
    install of this working tree stays invisible. `make wheel-test` installs everything from
    scratch.
    """
    venv.create(folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "-qq", "--no-deps", "--no-index", wheel, cwd=folder)
    print_site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-I", "-c", print_site, cwd=folder).strip())
    (site / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


def modules(folder: str, package: str) -> dict[str, str]:
    """Maps each Python file of `folder` to its path in the wheel, where the folder is `package`."""
    return {
        path.relative_to(ROOT).as_posix(): f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for path in (ROOT / folder).rglob("*.py")
    }


DATA = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "fastguard").rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc")
}
MODULES = modules("fastguard", "fastguard") | modules("kernels", "fastguard/kernels")


def test_every_package_is_listed():
    packages = {
        str(Path(place).parent).replace("/", ".")
        for place in MODULES.values()
        if Path(place).name == "__init__.py"
    }
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(packages)


def test_the_oldest_supported_versions_are_tested():
    asked = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["gpu"]
    tested = (ROOT / "Makefile").read_text()
    for name in ("torch", "triton", "numpy"):
        (oldest,) = re.findall(rf"^{name}>=([\d.]+)", "\n".join(asked), re.MULTILINE)
        assert re.search(rf"\b{name}=={re.escape(oldest)}\.\d\b", tested), name


def test_the_documentation_names_the_versions_that_ci_tests():
    table = (ROOT / "docs" / "compatibility.md").read_text()
    makefile, stages = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    for which in ("OLDEST", "NEWEST"):
        (versions,) = re.findall(rf"^{which}_VERSIONS := (.*)", makefile, re.MULTILINE)
        for name, version in (asked.split("==") for asked in versions.split()):
            assert re.search(rf"\| {re.escape(version)}[ |]", table), f"{name} {version}"
        assert f"tests suite-{which.lower()}" in stages


OWN_EXTRAS = ("cli", "gpu", "report", "tensorboard", "yaml")  # other extras install a trainer


def test_installing_keeps_the_installed_versions(tmp_path):
    """In the environment of `make test`, pip would install fastguard and nothing else.

    `make suite-oldest` checks this with the oldest torch, triton and numpy.
    """
    project = f"{copy_of_sources(tmp_path)}[{','.join(OWN_EXTRAS)}]"
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--no-index"]
    report = run(*pip, "--no-build-isolation", "--report", "-", project, cwd=tmp_path)
    names = [found["metadata"]["name"] for found in json.loads(report)["install"]]
    assert names == ["torch-fastguard"]


def test_the_extras_of_trainers_keep_torch_too(tmp_path):
    """Ultralytics is left out: torchvision requires one exact torch, see docs/compatibility.md."""
    project = f"{copy_of_sources(tmp_path)}[huggingface,lightning]"
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--no-build-isolation"]
    done = subprocess.run([*pip, "--report", "-", project], capture_output=True, text=True)
    if done.returncode and not in_ci():
        pytest.skip("pip reaches no package index")
    assert done.returncode == 0, done.stderr
    names = {found["metadata"]["name"] for found in json.loads(done.stdout)["install"]}
    assert "torch-fastguard" in names
    assert not names & {"torch", "numpy", "triton"}


def test_torch_and_numpy_have_lower_bounds_only():
    """Without pins and upper bounds, pip never changes the versions that a user has."""
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *(r for own in OWN_EXTRAS for r in extras[own])]
    moved = [r for r in asked if re.search(r"==|<|~=", r.partition(";")[0])]
    assert moved == []
    assert "constraints.txt" not in (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    require("build")
    return build_wheel(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The Python of a new environment with the wheel."""
    return install_in_new_environment(wheel, tmp_path_factory.mktemp("venv"))


def test_wheel_contains_the_package_and_works_from_another_folder(wheel, python, tmp_path):
    files = set(zipfile.ZipFile(wheel).namelist())
    installed = {file for file in files if ".dist-info/" not in file}
    assert installed == {*MODULES.values(), *DATA}
    assert {"fastguard/py.typed", "fastguard/commands/report/page.html"} <= DATA
    assert any(file.endswith("/licenses/LICENSE") for file in files)

    assert python.with_name("fastguard").exists()
    check = shutil.copy(ROOT / "tests" / "support" / "wheel_check.py", tmp_path)
    assert "works with torch" in run(python, "-I", check, cwd=tmp_path)


FOLLOW_PAGE = r"""
import re, runpy, shlex, sys
from pathlib import Path
from fastguard.commands.cli import main
page = Path(sys.argv[1]).read_text(encoding="utf-8")
for kind, block in re.findall(r"^```(python|sh)\n(.*?)^```", page, re.S | re.M):
    if kind == "python":
        Path("train.py").write_text(block, encoding="utf-8")
        runpy.run_path("train.py", run_name="__main__")
    for line in block.splitlines() if kind == "sh" else ():
        if line.startswith("fastguard ") and not line.startswith(tuple(sys.argv[2:])):
            status = main(shlex.split(line, comments=True)[1:])
            assert status in (0, 1), (line, status)  # 1: a problem was found
"""


@pytest.mark.slow
@pytest.mark.parametrize("page", INCIDENTS, ids=[page.stem for page in INCIDENTS])
def test_the_code_and_commands_of_an_incident_page_run(page, python, tmp_path, monkeypatch):
    """All Python blocks and commands of fastguard, in one folder and one process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # The first page plays an incident, and each incident has its own tests.
    elsewhere = [] if page.stem == "README" else ["fastguard demo "]
    command = [python, "-I", "-c", FOLLOW_PAGE, page, *elsewhere]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


IMPORT_IS_LIGHT = """
import sys
import fastguard
assert "torch" not in sys.modules, "import fastguard imported torch"
import torch
before = set(sys.modules)
for name in fastguard.__all__:
    getattr(fastguard, name)
optional = {"triton", "matplotlib", "rich", "tensorboard", "yaml", "transformers"}
eager = optional & (set(sys.modules) - before)
assert not eager, f"the public names import {sorted(eager)}"
assert not torch.cuda.is_initialized(), "importing all public names initialized CUDA"
"""


def test_import_is_light(tmp_path):
    run(sys.executable, "-c", IMPORT_IS_LIGHT, cwd=tmp_path)
