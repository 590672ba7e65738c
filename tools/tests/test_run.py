"""The command that makes the environment, against a stand-in for uv that writes addresses into uv.lock as uv does."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from workspace_uv import find_uv, parse_pip_settings, registry_environment, uv_environment

ROOT = Path(__file__).resolve().parents[2]

STAND_IN = """\
#!/bin/sh
if [ "$1" = --version ]; then echo "uv 0.13.9 (stand-in)"; exit 0; fi
echo "$@" >> calls
mkdir -p .venv/bin
printf '#!/bin/sh\\necho hello "$@" from "$VIRTUAL_ENV"\\n' > .venv/bin/hello
chmod +x .venv/bin/hello
sed -i 's/"default-index"/"https:\\/\\/registry.example\\/simple"/' uv.lock
"""
LOCK = """\
version = 1
requires-python = ">=3.11"

[manifest]
members = ["part"]

[[package]]
name = "part"
version = "1"
source = { editable = "packages/part" }

[package.metadata]
requires-dist = [{ name = "uv-lock-without-urls" }]

[[package]]
name = "uv"
version = "0.13.9"
source = { registry = "default-index" }
wheels = [
    { filename = "uv-0.13.9-py3-none-any.whl", hash = "sha256:0000000000000000000000000000000000000000000000000000000000000000" },
]
"""  # noqa: E501


@dataclass
class Checkout:
    root: Path

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        python = getattr(sys, "_base_executable", sys.executable)
        command = [python, "tools/run.py", *arguments]
        return subprocess.run(command, cwd=self.root, env=os.environ | variables, capture_output=True, text=True)

    def replace_uv(self, script: str) -> None:
        (self.root / ".uv" / "bin" / "uv").write_text(script)

    @property
    def calls(self) -> list[str]:
        return (self.root / "calls").read_text().splitlines()

    @property
    def lock(self) -> str:
        return (self.root / "uv.lock").read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "check out"
    shutil.copytree(ROOT / "tools", root / "tools", ignore=shutil.ignore_patterns("__pycache__", "tests"))
    (root / "packages" / "part").mkdir(parents=True)
    (root / "packages" / "part" / "pyproject.toml").write_text("[project]\n")
    (root / "pyproject.toml").write_text('[tool.uv]\nrequired-version = ">=0.9"\n')
    (root / "uv.lock").write_text(LOCK)
    (root / ".uv" / "bin").mkdir(parents=True)
    uv = root / ".uv" / "bin" / "uv"
    uv.write_text(STAND_IN)
    uv.chmod(0o755)
    return Checkout(root)


def test_run_makes_the_environment_once_and_leaves_the_lock_as_it_is(checkout: Checkout) -> None:
    for _ in range(2):
        done = checkout.run("hello", "big world")
        assert (done.returncode, done.stdout) == (0, f"hello big world from {checkout.root}/.venv\n"), done.stderr
    assert len(checkout.calls) == 1
    assert checkout.calls[0].startswith("sync --python ")
    assert checkout.lock == LOCK


def test_run_makes_the_environment_again_when_a_requirement_changes(checkout: Checkout) -> None:
    checkout.run("hello")
    (checkout.root / "packages" / "part" / "pyproject.toml").write_text("[project]\nname = 'part'\n")
    assert checkout.run("hello").returncode == 0
    assert len(checkout.calls) == 2


def test_run_hands_on_the_exit_status(checkout: Checkout) -> None:
    assert checkout.run("sh", "-c", "exit 7").returncode == 7


def test_the_command_may_use_uv_as_the_environment_was_made(checkout: Checkout) -> None:
    shown = checkout.run("sh", "-c", 'echo "$UV_DEFAULT_INDEX $PATH"', PIP_INDEX_URL="https://mirror.example/simple")
    assert shown.stdout.startswith(f"https://mirror.example/simple {checkout.root}/.venv/bin:"), shown


def test_a_uv_that_fails_is_an_error_and_leaves_the_lock_as_it_is(checkout: Checkout) -> None:
    checkout.replace_uv(STAND_IN + "echo no such registry >&2; exit 2\n")
    for _ in range(2):
        done = checkout.run("hello")
        assert done.returncode == 1
        assert "no such registry" in done.stderr
        assert done.stderr.endswith("error: 'uv sync' failed with exit status 2 (see above)\n")
        assert checkout.lock == LOCK
    assert len(checkout.calls) == 2


def test_a_uv_that_does_not_keep_the_locked_versions_is_an_error(checkout: Checkout) -> None:
    checkout.replace_uv(STAND_IN + 'sed -i \'s/"0.13.9"/"0.14.0"/\' uv.lock\n')
    done = checkout.run("hello")
    assert done.returncode == 1
    assert "error: uv could not keep to uv.lock:\nuv 0.14.0 is new\n" in done.stderr
    assert checkout.lock == LOCK


def test_an_unknown_command_is_an_error(checkout: Checkout) -> None:
    done = checkout.run("model-centre")
    assert done.returncode == 1
    assert f"error: no command 'model-centre' in {checkout.root}/.venv/bin or on the PATH" in done.stderr


def test_without_a_command_the_usage_is_shown(checkout: Checkout) -> None:
    assert "python3 tools/run.py pytest" in checkout.run().stderr
    assert "python3 tools/run.py pytest" in checkout.run("--help").stdout


def test_an_old_uv_is_not_taken(checkout: Checkout) -> None:
    ours = checkout.root / ".uv" / "bin" / "uv"
    assert find_uv(checkout.root) == ours
    checkout.replace_uv(STAND_IN.replace("0.13.9", "0.8.22"))
    assert find_uv(checkout.root) != ours
    checkout.replace_uv("#!/bin/sh\nexit 1\n")
    assert find_uv(checkout.root) != ours


def test_pip_that_cannot_install_uv_is_an_error(checkout: Checkout, tmp_path: Path) -> None:
    (checkout.root / ".uv" / "bin" / "uv").unlink()
    # The PATH holds no uv, and pip has no index.
    done = checkout.run("hello", PATH="/nowhere", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert done.returncode == 1
    assert "could not install uv 0.13.9 (see above): mend that, or put a uv on the PATH" in done.stderr


def test_pip_settings_take_variables_first() -> None:
    listed = (
        ":env:.cert='/a/b.pem'\n"
        ":env:.find-links='/wheels'\n"
        "download.cert='/other.pem'\n"
        "global.cert='/c.pem'\n"
        "global.index-url='https://mirror.example/simple'\n"
        "install.index-url='https://nearer.example/simple'\n"
        "a line that is no setting\n"
    )
    assert parse_pip_settings(listed) == {
        "cert": "/a/b.pem",
        "find-links": "/wheels",
        "index-url": "https://nearer.example/simple",
    }


def test_uv_is_told_what_pip_knows(monkeypatch: pytest.MonkeyPatch, checkout: Checkout, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("UV_", "SSL_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "uv-0.13.9+local-py3-none-any.whl").touch()
    settings = {"index-url": "https://mirror.example", "cert": "/a.pem", "find-links": f"/no/such {wheels.as_uri()}"}
    monkeypatch.setattr("workspace_uv.pip_settings", lambda: settings)
    checkout_index = (checkout.root / ".uv" / "index" / "0").as_uri()
    assert uv_environment(checkout.root) == registry_environment() | {"UV_INDEX": checkout_index}
    assert registry_environment() == {
        "UV_PYTHON_DOWNLOADS": "never",
        "UV_DEFAULT_INDEX": "https://mirror.example",
        "SSL_CERT_FILE": "/a.pem",
        "UV_SYSTEM_CERTS": "1",
    }
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://own.example")
    assert "UV_DEFAULT_INDEX" not in registry_environment()
    monkeypatch.setattr("workspace_uv.pip_settings", dict)
    monkeypatch.delenv("UV_DEFAULT_INDEX")
    assert uv_environment(checkout.root) == {"UV_PYTHON_DOWNLOADS": "never"}
    monkeypatch.setenv("HOME", "/no/such/home")
    assert uv_environment(checkout.root)["UV_CACHE_DIR"] == str(checkout.root / ".uv" / "cache")
