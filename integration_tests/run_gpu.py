"""Runs all tests that need a GPU, on a machine where nothing can be installed, and writes a report.

    python3 integration_tests/run_gpu.py report.json --wheels .whl

The machine has Python 3.12, PyTorch for its GPUs, Transformers and pytest. Our packages run from this checkout; other
packages that are missing (bmtrain, jieba, jsonargparse, …) come as wheels in a folder. Options that are not named
here go to pytest, for instance `-k curves`.
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
    """A pytest plugin that notes what became of each test."""

    def __init__(self) -> None:
        self.tests: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        note: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.skipped:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            note["reason"] = reason.removeprefix("Skipped: ")
        elif report.failed:
            note["error"] = report.longreprtext[-4000:]
        self.tests.append(note)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tests.append({"test": report.nodeid, "outcome": "failed", "error": report.longreprtext[-4000:]})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, help="the JSON file to write")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of packages that are not installed here")
    options, for_pytest = parser.parse_known_args()
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="model-center-") as temporary:
        use(make_site(Path(temporary) / "site", options.wheels))
        configuration = Path(temporary) / "pytest.ini"
        configuration.write_text(CONFIGURATION, encoding="utf-8")
        recorder = Recorder()
        where = ["-c", str(configuration), f"--rootdir={ROOT}", "-m", "gpu", *for_pytest]
        code = pytest.main([*where, *map(str, gpu_tests())], plugins=[recorder])
        report = {
            "exit_code": int(code),
            "seconds": round(time.time() - started, 1),
            "outcomes": Counter(test["outcome"] for test in recorder.tests),
            "machine": machine(),
            "tests": recorder.tests,
        }
    options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(code)


def make_site(site: Path, wheels: Path | None) -> Path:
    """Unpacks wheels into a folder, and tells there which of our packages are installed in which version.

    Our packages ask `importlib.metadata` for their versions, which needs no more than a METADATA file.
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
    return site


def use(site: Path) -> None:
    """Makes our packages, the site and the tests' own modules importable here and in processes that tests start."""
    sources = sorted(ROOT.glob("packages/*/src"))
    tests = [ROOT / "tools", ROOT / "integration_tests", *sorted(ROOT.glob("packages/*/tests"))]
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

    versions = {"python": platform.python_version()}
    for package in (*REPORTED, *(file.parent.name for file in ROOT.glob("packages/*/pyproject.toml"))):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    if gpus:
        versions["cuda"] = str(torch.version.cuda)
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {"gpus": gpus, "versions": versions, "commit": commit.stdout.strip() or None}


if __name__ == "__main__":
    raise SystemExit(main())
