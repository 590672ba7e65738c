"""What the package needs to be imported, and what it says where something is missing."""

import subprocess
import sys
import textwrap

import model_center.dataset
from model_center.dataset.samples import sample_path


def run(code: str) -> str:
    """Run code in a Python of its own; returns what it prints."""
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_package_needs_numpy_only() -> None:
    loaded = run(
        """
        import sys
        before = set(sys.modules)
        import model_center.dataset, model_center.dataset.tasks, model_center.dataset.samples
        names = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(names - set(sys.stdlib_module_names)))
        """
    )
    assert {name for name in eval(loaded) if not name.startswith("_")} == {"model_center", "numpy"}


def test_without_torch_the_rest_says_how_to_install_it() -> None:
    printed = run(
        """
        import sys
        sys.modules["torch"] = None
        from model_center import dataset
        print(dataset.MMapIndexedDataset.__name__)
        for statement in (
            "dataset.DistributedDataLoader",
            "from model_center.dataset import DistributedDataLoader",
            "from model_center.dataset.bertdataset import DATASET",
            "import model_center.dataset.evaluation",
        ):
            try:
                exec(statement)
            except ImportError as error:
                print(error)
        """
    ).splitlines()
    assert printed[0] == "MMapIndexedDataset"
    assert len(printed) == 5
    assert all('pip install "mc-data[torch]"' in line for line in printed[1:])


def test_exported_names_exist() -> None:
    for name in model_center.dataset.__all__:
        assert getattr(model_center.dataset, name) is not None
    assert not hasattr(model_center.dataset, "DistributedLoader")


def test_the_sample_comes_with_its_source_and_licence() -> None:
    note = (sample_path() / "BoolQ" / "README.md").read_text(encoding="utf-8")
    assert "CC BY-SA 3.0" in note
    assert "Christopher Clark" in note
