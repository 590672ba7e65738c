"""The commands that the README shows are the ones that CI runs."""

import re
import shlex
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def shown_commands() -> list[list[str]]:
    """The commands in the README's shell blocks, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_main_job_and_the_tests_come_first() -> None:
    start = ["python3", "tools/run.py"]
    assert shown_commands()[:2] == [[*start, "model-center", "quickstart"], [*start, "pytest"]]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r'^run\(\) \{ python3 tools/run\.py "\$@"; \}$', script, re.MULTILINE)
    assert re.search(r"^tests\(\) \{ .*\brun pytest; \}$", script, re.MULTILINE)
    assert re.search(r'^section "Tests" tests$', script, re.MULTILINE)


def test_every_script_that_the_readme_runs_is_there() -> None:
    scripts = {word for words in shown_commands() for word in words if re.fullmatch(r"[\w/.-]+\.py", word)}
    assert "tools/run.py" in scripts
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def test_what_is_installed_together_needs_none_of_our_packages_from_a_registry() -> None:
    ours = {path.name for path in (ROOT / "packages").iterdir()}
    installs = [words[2:] for words in shown_commands() if words[:2] == ["pip", "install"]]
    assert len(installs) == 4
    for paths in installs:
        together = {path.removeprefix("./packages/") for path in paths}
        assert together <= ours
        for name in together:
            project = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text())["project"]
            needs = {re.split(r"[\[<>=]", need)[0] for need in project["dependencies"]}
            assert needs & ours <= together, f"{name} in: pip install {' '.join(paths)}"
    assert {path.removeprefix("./packages/") for path in installs[-1]} == ours
