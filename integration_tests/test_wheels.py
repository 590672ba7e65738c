"""Each distribution's wheel, alone in a clean environment: it imports, does one real thing, and brings no more."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from workspace_uv import find_uv, uv_environment

ROOT = Path(__file__).resolve().parents[1]
ALONE = Path(__file__).parent / "alone"
PARTS = {
    "mc-data": ["dataset"],
    "mc-layers": ["engine", "layer"],
    "mc-models": ["model"],
    "mc-preprocess": ["tools"],
    "mc-tokenizers": ["tokenizer"],
    "model-center": ["recipe"],
}


@dataclass(frozen=True)
class Alone:
    """One clean environment.

    Attributes:
        script: what is run in it.
        wanted: what is installed into it.
        ours: the packages of the workspace that come along.
        absent: other packages that must not.
    """

    script: str
    wanted: str
    ours: tuple[str, ...]
    absent: tuple[str, ...] = ()


ENVIRONMENTS = [
    Alone("mc_layers", "mc-layers", ("mc-layers",), ("transformers", "huggingface-hub")),
    Alone("mc_models", "mc-models", ("mc-layers", "mc-models"), ("transformers",)),
    Alone("mc_tokenizers", "mc-tokenizers", ("mc-tokenizers",), ("torch",)),
    Alone("mc_data", "mc-data", ("mc-data",), ("torch", "transformers")),
    Alone("mc_data_torch", "mc-data[torch]", ("mc-data",), ("transformers",)),
    Alone("mc_preprocess", "mc-preprocess", ("mc-data", "mc-preprocess", "mc-tokenizers"), ("torch",)),
    Alone("whole", "model-center", tuple(PARTS)),
]


class Wheels:
    """The built wheels, and environments to install them into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | uv_environment(ROOT)
        uv = find_uv(ROOT)
        assert uv is not None, "needs uv"
        self._uv = uv

    def uv(self, *arguments: str | Path) -> str:
        """Runs uv; returns what it printed."""
        command: list[str | Path] = [self._uv, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
        return done.stdout

    def wheel(self, distribution: str) -> Path:
        (wheel,) = self.folder.glob(f"{distribution.replace('-', '_')}-*.whl")
        return wheel

    def install(self, wanted: str, into: Path) -> None:
        """Makes an environment of the locked versions with only this, and what it needs, in it."""
        self.uv("venv", "--quiet", "--python", sys.executable, into)
        name, bracket, extra = wanted.partition("[")
        requirement = f"{name}{bracket}{extra} @ {self.wheel(name).as_uri()}"
        self.uv("pip", "install", "--quiet", "--python", into, "--constraints", self.folder / "locked.txt", requirement)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    """Builds every wheel, and writes down the locked versions."""
    built = Wheels(tmp_path_factory.mktemp("wheels"))
    built.uv("build", "--quiet", "--wheel", "--all-packages", "--out-dir", built.folder)
    locked = built.uv(
        "export", "--quiet", "--frozen", "--no-hashes", "--no-emit-workspace", "--all-packages", "--all-extras"
    )
    # The registry has another project's model-center: our own packages come from these files and nowhere else.
    ours = "".join(f"{name} @ {built.wheel(name).as_uri()}\n" for name in PARTS)
    (built.folder / "locked.txt").write_text(locked + ours)
    return built


@pytest.mark.parametrize("distribution", PARTS)
def test_a_wheel_holds_its_parts_and_the_licence(wheels: Wheels, distribution: str) -> None:
    with zipfile.ZipFile(wheels.wheel(distribution)) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        licences = [wheel.read(name) for name in names if re.search(r"dist-info/licenses/LICENSE$", name)]
    assert licences == [(ROOT / "LICENSE").read_bytes()]
    for part in PARTS[distribution]:
        assert {f"model_center/{part}/__init__.py", f"model_center/{part}/py.typed"} <= names
    ours = tuple(f"model_center/{part}/" for part in PARTS[distribution])
    strangers = [name for name in names if not name.startswith(ours) and ".dist-info/" not in name]
    assert strangers == []


@pytest.mark.parametrize("distribution", PARTS)
def test_every_need_of_a_sibling_is_a_range(distribution: str) -> None:
    project = tomllib.loads((ROOT / "packages" / distribution / "pyproject.toml").read_text())["project"]
    needs = [
        *project["dependencies"],
        *(need for extra in project.get("optional-dependencies", {}).values() for need in extra),
    ]
    siblings = [
        need for need in needs if re.split(r"[\[<>=~ ]", need)[0] in PARTS and not need.startswith(distribution)
    ]
    unbounded = [need for need in siblings if not re.search(r">=\d+\.\d+,<\d+\.\d+$", need)]
    assert unbounded == []


@pytest.mark.registry
@pytest.mark.parametrize("alone", ENVIRONMENTS, ids=lambda alone: alone.wanted)
def test_a_wheel_works_alone(wheels: Wheels, alone: Alone, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    wheels.install(alone.wanted, environment)
    wheels.uv("pip", "check", "--quiet", "--python", environment)
    listed = wheels.uv("pip", "list", "--quiet", "--format=freeze", "--python", environment)
    installed = {line.partition("==")[0] for line in listed.splitlines()}
    assert installed & set(PARTS) == set(alone.ours)
    assert installed.isdisjoint(alone.absent)
    # -I: neither this checkout nor the caller's variables may lend a hand; the script is copied away from its siblings.
    script = tmp_path / "script.py"
    script.write_text((ALONE / f"{alone.script}.py").read_text())
    command: list[str | Path] = [environment / "bin" / "python", "-I", script]
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
