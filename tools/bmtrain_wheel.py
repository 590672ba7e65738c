"""Build a bmtrain wheel that imports beside today's PyTorch.

The registry's ready wheel fits Python 3.11 only, and its source package neither compiles with CUDA 13 (it names GPU
architectures that nvcc has dropped) nor installs well (it asks for CUDA 11's NCCL, whose library would replace the one
PyTorch brings). This tool compiles the source package with the nvcc at hand and corrects what the wheel asks for:

    python3 tools/bmtrain_wheel.py --output dist
    python3 tools/bmtrain_wheel.py --python python3.12 --output dist

A GPU is not needed to build. Import torch before bmtrain, so that both use PyTorch's NCCL.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

VERSION = "1.0.1"
BUILD_REQUIREMENTS = ("cmake>=3.27", "ninja", "pybind11", "setuptools<80", "wheel")
NCCL_PACKAGES = {"12": "nvidia-nccl-cu12", "13": "nvidia-nccl-cu13"}  # CUDA major version -> distribution


class BuildError(Exception):
    """Something the build needs is missing or failed; the message says what to do."""


def run(command: Sequence[str | Path], *, env: dict[str, str] | None = None) -> str:
    """Run a command and return its standard output; a failure raises BuildError with the end of what it printed."""
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-40:])
        raise BuildError(f"`{' '.join(map(str, command))}` failed with exit code {result.returncode}:\n{tail}")
    return result.stdout


def find_tool(name: str, remedy: str) -> Path:
    """The path of an executable, or a BuildError that says how to get it."""
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"`{name}` was not found; {remedy}")
    return Path(path)


def find_nvcc() -> Path:
    """CUDA's compiler: $CUDACXX, $CUDA_HOME/bin/nvcc, or the nvcc on PATH."""
    if compiler := os.environ.get("CUDACXX"):
        return find_tool(compiler, "$CUDACXX names it: point that at CUDA's nvcc")
    if home := os.environ.get("CUDA_HOME"):
        return find_tool(str(Path(home, "bin", "nvcc")), "$CUDA_HOME must be the folder of a CUDA toolkit")
    return find_tool("nvcc", "install the CUDA toolkit of your PyTorch's CUDA version, or set $CUDA_HOME to it")


def cuda_major(nvcc: Path) -> str:
    """The major version of the CUDA toolkit that `nvcc` belongs to, such as "13"."""
    printed = run([nvcc, "--version"])
    match = re.search(r"release (\d+)\.", printed)
    if match is None or match[1] not in NCCL_PACKAGES:
        known = " and ".join(NCCL_PACKAGES)
        raise BuildError(f"{nvcc} is of CUDA {match[1] if match else 'unknown'}; this tool knows CUDA {known}")
    return match[1]


def write_nvcc_wrapper(nvcc: Path, folder: Path) -> Path:
    """Write an nvcc that leaves out `-gencode` flags for architectures which the real one no longer knows."""
    known = " ".join(re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"])))
    wrapper = folder / "nvcc"
    wrapper.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        for argument; do
            shift
            case $argument in
            -gencode=arch=compute_* | --generate-code=arch=compute_*)
                architecture=${{argument#*=arch=compute_}}
                case " {known} " in *" ${{architecture%%,*}} "*) ;; *) continue ;; esac ;;
            esac
            set -- "$@" "$argument"
        done
        exec "{nvcc}" "$@"
        """)
    )
    wrapper.chmod(0o755)
    return wrapper


def correct_requirements(metadata: str, nccl_package: str) -> str:
    """The wheel's METADATA text with the requirements that a current PyTorch meets."""
    headers, blank, description = metadata.partition("\n\n")
    kept = [line for line in headers.splitlines() if not line.startswith("Requires-Dist:")]
    wanted = [f"Requires-Dist: {name}" for name in ("numpy", "torch", nccl_package)]
    return "\n".join([*kept, *wanted]) + blank + description


def build(python: str, output: Path, source: str) -> Path:
    """Build the wheel for the interpreter `python` from `source` (a pip requirement or file) into `output`."""
    interpreter = find_tool(python, "name an installed interpreter, such as --python python3.12")
    find_tool("c++", "install a C++ compiler (Debian: `apt-get install g++`)")
    nvcc = find_nvcc()
    nccl_package = NCCL_PACKAGES[cuda_major(nvcc)]
    include = run([interpreter, "-c", "import sysconfig; print(sysconfig.get_path('include'))"]).strip()
    if not Path(include, "Python.h").is_file():
        raise BuildError(f"{interpreter} has no C headers ({include}/Python.h); install its development package")

    with tempfile.TemporaryDirectory(prefix="bmtrain-wheel-") as name:
        folder = Path(name)
        run([interpreter, "-m", "venv", folder / "venv"])
        binaries = folder / "venv" / "bin"
        build_python = binaries / "python"
        run([build_python, "-m", "pip", "install", "--quiet", *BUILD_REQUIREMENTS])
        # NCCL's own requirements are CUDA's; the headers and the library are all that is linked here.
        run([build_python, "-m", "pip", "install", "--quiet", "--no-deps", nccl_package])
        site = Path(run([build_python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"]).strip())
        nccl = site / "nvidia" / "nccl"
        if not (nccl / "include" / "nccl.h").is_file():
            raise BuildError(f"{nccl_package} brought no nccl.h under {nccl}; install another version of it")
        env = os.environ | {
            "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
            "CUDACXX": str(write_nvcc_wrapper(nvcc, folder)),
            "BUILD_DOCKER_ENV": "1",  # portable AVX flags instead of those of this very machine
            "NCCL_INCLUDE_DIR": str(nccl / "include"),
            "NCCL_LIB_DIR": str(nccl / "lib"),
        }
        options = ["--no-deps", "--no-build-isolation", "--no-binary=bmtrain", "--no-cache-dir"]
        run([build_python, "-m", "pip", "wheel", *options, "--wheel-dir", folder / "built", source], env=env)
        (built,) = (folder / "built").glob("bmtrain-*.whl")
        run([build_python, "-m", "wheel", "unpack", "--dest", folder / "unpacked", built])
        (unpacked,) = (folder / "unpacked").iterdir()
        (metadata,) = unpacked.glob("*.dist-info/METADATA")
        metadata.write_text(correct_requirements(metadata.read_text(), nccl_package))
        output.mkdir(parents=True, exist_ok=True)
        run([build_python, "-m", "wheel", "pack", "--dest-dir", output, unpacked])
        return output / built.name


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter to build for (default: this one)")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder for the wheel (default: dist)")
    parser.add_argument("--source", default=f"bmtrain=={VERSION}", help="requirement or source archive to build from")
    options = parser.parse_args(arguments)
    try:
        print(build(options.python, options.output, options.source))
    except BuildError as error:
        print(f"bmtrain_wheel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
