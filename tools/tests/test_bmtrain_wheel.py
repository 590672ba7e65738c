"""The bmtrain wheel tool: what it says when something is missing, and (with CUDA's compiler) a build that imports."""

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import bmtrain_wheel
import pytest

TOOL = Path(bmtrain_wheel.__file__)


def write_program(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    path.chmod(0o755)
    return path


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Path:
    """An nvcc of CUDA 13 that knows two architectures and prints the arguments of any other call, one a line."""
    (tmp_path / "cuda").mkdir()
    return write_program(
        tmp_path / "cuda" / "nvcc",
        """\
        #!/bin/sh
        case $1 in
        --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
        --list-gpu-arch) printf 'compute_75\\ncompute_80\\n' ;;
        *) printf '%s\\n' "$@" ;;
        esac
        """,
    )


def test_wrapper_drops_only_unknown_architectures(fake_nvcc: Path, tmp_path: Path) -> None:
    wrapper = bmtrain_wheel.write_nvcc_wrapper(fake_nvcc, tmp_path)
    kept = ["-O3", "-gencode=arch=compute_80,code=sm_80", "a file.cu", "-DX=$HOME", "--generate-code=arch=compute_75"]
    dropped = ["-gencode=arch=compute_61,code=sm_61", "--generate-code=arch=compute_70,code=[compute_70,sm_70]"]
    printed = subprocess.check_output([wrapper, kept[0], dropped[0], *kept[1:3], dropped[1], *kept[3:]], text=True)
    assert printed.splitlines() == kept


def test_requirements_are_replaced_and_the_description_kept() -> None:
    before = "Name: bmtrain\nRequires-Dist: nvidia-nccl-cu11>=2.14.3\nRequires-Dist: numpy\n\nRequires-Dist: in prose"
    after = bmtrain_wheel.correct_requirements(before, "nvidia-nccl-cu13")
    headers, _, description = after.partition("\n\n")
    assert headers.splitlines()[1:] == [
        "Requires-Dist: numpy",
        "Requires-Dist: torch",
        "Requires-Dist: nvidia-nccl-cu13",
    ]
    assert description == "Requires-Dist: in prose"


def run_tool(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *arguments], env=env, capture_output=True, text=True, check=False)


def test_missing_tools_are_named(tmp_path: Path, fake_nvcc: Path) -> None:
    compiler = write_program(tmp_path / "c++", "#!/bin/sh\n")
    cases = {
        "`no-such-python` was not found": (["--python", "no-such-python"], {"PATH": str(tmp_path)}),
        "`c++` was not found; install a C++ compiler": ([], {"PATH": "/nowhere"}),
        "`nvcc` was not found; install the CUDA toolkit": ([], {"PATH": str(compiler.parent)}),
        "$CUDA_HOME must be": ([], {"PATH": str(tmp_path), "CUDA_HOME": "/nowhere"}),
    }
    for message, (arguments, env) in cases.items():
        result = run_tool(*arguments, **env)
        assert result.returncode == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_unknown_cuda_version_is_refused(tmp_path: Path) -> None:
    old = write_program(tmp_path / "nvcc", "#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    with pytest.raises(bmtrain_wheel.BuildError, match=r"is of CUDA 11; this tool knows CUDA 12 and 13"):
        bmtrain_wheel.cuda_major(old)


@pytest.mark.registry
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs CUDA's compiler, nvcc")
def test_built_wheel_imports(tmp_path: Path) -> None:
    built = subprocess.check_output([sys.executable, TOOL, "--output", tmp_path / "dist"], text=True)
    wheel = Path(built.strip())
    assert f"-cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    metadata = next((tmp_path / "site").glob("*.dist-info/METADATA")).read_text()
    assert "nccl-cu11" not in metadata
    # The library is linked against NCCL, which only CUDA builds of PyTorch bring.
    nccl = "nvidia-nccl-" + metadata.partition("Requires-Dist: nvidia-nccl-")[2].splitlines()[0]
    site = str(tmp_path / "site")
    subprocess.run(["uv", "pip", "install", "--quiet", "--no-deps", "--target", site, nccl], check=True)
    library = next((tmp_path / "site").glob("nvidia/nccl/lib/libnccl.so*"))
    program = "import torch, bmtrain, bmtrain.C; print(bmtrain.C.ncclAllReduce, bmtrain.__file__)"
    env = os.environ | {"PYTHONPATH": site, "LD_LIBRARY_PATH": str(library.parent)}
    printed = subprocess.check_output([sys.executable, "-c", program], env=env, text=True)
    assert str(tmp_path) in printed
