"""Runs all tests that need a GPU, on a machine where nothing can be installed, and writes a report.

    python3 integration_tests/run_gpu.py report.json --wheels .whl

The machine has Python 3.12, PyTorch for its GPUs, Transformers and pytest, perhaps with pytest-xdist for `--workers`.
Our packages run from this checkout; other packages that are missing (bmtrain, jieba, jsonargparse, …) come as wheels in
a folder, and golden files in another one. Options that are not named here go to pytest, for instance `-k curves`. The
report is written again after each test, so that a run which is cut short leaves one, too. Where there are too few GPUs,
`MODEL_CENTER_PROCESSES_PER_GPU=4` in the environment lets as many processes share each (see `tools/shared_gpus.py`).
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
REPORTED = ("torch", "transformers", "numpy", "pytest", "bmtrain")
CONFIGURATION = """[pytest]
addopts = -ra --import-mode=importlib -p pytest_shared
markers =
    gpu: needs CUDA devices
    registry: needs a package registry
    slow: takes more than ten seconds
    timeout: of pytest-timeout, which may not be here
"""


class Recorder:
    """A pytest plugin that writes down what became of each test, as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.time()
        self.tests: list[dict[str, Any]] = []
        self.machine = machine()

    def write(self, exit_code: int | None = None) -> None:
        """Writes the report; without an exit code the run is not over."""
        report = {
            "exit_code": exit_code,
            "seconds": round(time.time() - self.started, 1),
            "outcomes": Counter(test["outcome"] for test in self.tests),
            "machine": self.machine,
            "tests": self.tests,
        }
        self.path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        note: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.skipped:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            note["reason"] = reason.removeprefix("Skipped: ")
        elif report.failed:
            written = "".join(f"\n{name}:\n{text[-4000:]}" for name, text in report.sections)
            note["error"] = report.longreprtext[-4000:] + written
        self.tests.append(note)
        self.write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tests.append({"test": report.nodeid, "outcome": "failed", "error": report.longreprtext[-4000:]})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, help="the JSON file to write")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of packages that are not installed here")
    parser.add_argument("--shared", type=Path, help="folder of golden files, where they are not beside the checkout")
    parser.add_argument("--workers", type=int, default=1, help="tests that run at a time; above 1 with pytest-xdist")
    parser.add_argument("--files", type=Path, nargs="+", help="run these files only, all in one process")
    options, for_pytest = parser.parse_known_args()
    if options.shared:
        os.environ["MODEL_CENTER_SHARED"] = str(options.shared.resolve())
    with tempfile.TemporaryDirectory(prefix="model-center-") as temporary:
        use(make_site(Path(temporary) / "site", options.wheels))
        configuration = Path(temporary) / "pytest.ini"
        configuration.write_text(CONFIGURATION, encoding="utf-8")
        recorder = Recorder(options.report)
        arguments = ["-c", str(configuration), f"--rootdir={ROOT}", "-m", "gpu", *for_pytest]
        if options.files:
            code = int(pytest.main([*arguments, *map(str, options.files)], plugins=[recorder]))
        else:
            with alone(options.report, for_pytest) as other:
                together = [str(file) for file in gpu_tests() if not runs_alone(file)]
                workers = ["--numprocesses", str(options.workers), "--dist=loadgroup"] if options.workers > 1 else []
                code = int(pytest.main([*arguments, *workers, *together], plugins=[recorder]))
            recorder.tests += other["tests"]
            code = code or other["exit_code"]
        recorder.write(code)
    return code


def runs_alone(file: Path) -> bool:
    """Whether tests start BMTrain in their own process, which then runs no other engine."""
    return "bmtrain" in file.stem


@contextlib.contextmanager
def alone(report: Path, for_pytest: list[str]) -> Iterator[dict[str, Any]]:
    """Runs the files that need a process of their own beside the others; their report is there afterwards."""
    files = [str(file) for file in gpu_tests() if runs_alone(file)]
    path = report.with_name(f"{report.stem}-bmtrain.json")
    process = subprocess.Popen([sys.executable, __file__, str(path), *for_pytest, "--files", *files])
    found: dict[str, Any] = {"tests": [], "exit_code": 1}
    try:
        yield found
    finally:
        process.wait()
        if path.exists():
            found |= json.loads(path.read_text(encoding="utf-8"))
            path.unlink()


def make_site(site: Path, wheels: Path | None) -> Path:
    """Unpacks wheels into a folder, and tells there which of our packages are installed in which version.

    Our packages ask `importlib.metadata` for their versions, which needs no more than a METADATA file. Launched
    processes that find this folder on their path may share GPUs.
    """
    site.mkdir(parents=True)
    for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    for file in sorted(ROOT.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        information = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        information.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (information / "METADATA").write_text(metadata, encoding="utf-8")
    (site / "sitecustomize.py").write_text("import shared_gpus\n\nshared_gpus.take_place()\n", encoding="utf-8")
    return site


def use(site: Path) -> None:
    """Makes our packages, the site and the tests' own modules importable here and in processes that tests start.

    Those find a test's module by its full name, from the root.
    """
    sources = sorted(ROOT.glob("packages/*/src"))
    tests = [ROOT, ROOT / "tools", ROOT / "integration_tests", *sorted(ROOT.glob("packages/*/tests"))]
    paths = [str(path) for path in (*sources, site, *tests)]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


def gpu_tests() -> list[Path]:
    """The test files with tests marked `gpu`; others may import what this machine lacks."""
    files = [*ROOT.glob("packages/*/tests/test_*.py"), *ROOT.glob("integration_tests/test_*.py")]
    return sorted(file for file in files if "mark.gpu" in file.read_text(encoding="utf-8"))


def machine() -> dict[str, Any]:
    """What the tests ran on."""
    import torch
    from shared_gpus import VARIABLE

    versions = {"python": platform.python_version()}
    for package in (*REPORTED, *(file.parent.name for file in ROOT.glob("packages/*/pyproject.toml"))):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if gpus:
        versions["cuda"] = str(torch.version.cuda)
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    sharing = os.environ.get(VARIABLE, "1")
    return {"gpus": gpus, "processes_per_gpu": sharing, "versions": versions, "commit": commit.stdout.strip() or None}


if __name__ == "__main__":
    raise SystemExit(main())
