"""The lock file without addresses: what is stripped, what counts as a difference, what is refused."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lock import check, clean, main, update, verify
from lockfile import LockError, differences, is_stripped, parse, strip, without_new_files
from workspace_uv import find_uv, local_index, registry_environment

ROOT = Path(__file__).resolve().parents[2]
A, B, C, D, E, NEW = (f"sha256:{digit * 64}" for digit in "abcdef")

WRITTEN = f"""\
version = 1
revision = 3
requires-python = ">=3.11"
resolution-markers = [
    "python_full_version >= '3.12'",
    "python_full_version < '3.12'",
]

[manifest]
members = [
    "our-part",
    "our-whole",
]
constraints = [{{ name = "torch", specifier = "==2.13.0" }}]

[manifest.dependency-groups]
dev = [{{ name = "tester", specifier = ">=9" }}]

[[package]]
name = "numbers"
version = "2.0"
source = {{ registry = "https://registry.example/simple" }}
sdist = {{ url = "https://files.example/1f/numbers-2.0.tar.gz", hash = "{A}", size = 118387, upload-time = "2026-10-09T08:38:58.037Z" }}
wheels = [
    {{ url = "https://files.example/2f/numbers-2.0-py3-none-any.whl", hash = "{B}", size = 7, upload-time = "2026-10-09T08:38:58Z" }},
]

[[package]]
name = "our-part"
version = "0.1.0"
source = {{ editable = "packages/our-part" }}
dependencies = [
    {{ name = "torch" }},
]

[package.metadata]
requires-dist = [{{ name = "torch", specifier = ">=2.11" }}]

[[package]]
name = "our-whole"
version = "0.1.0"
source = {{ editable = "packages/our-whole" }}
dependencies = [
    {{ name = "our-part" }},
]

[package.metadata]
requires-dist = [{{ name = "our-part", editable = "packages/our-part" }}]

[[package]]
name = "cuda"
version = "13.0"
source = {{ registry = "https://registry.example/simple" }}
wheels = [
    {{ url = "https://files.example/3f/cuda-13.0-py3-none-any.whl", hash = "{C}" }},
]

[[package]]
name = "tester"
version = "9.2"
source = {{ registry = "https://registry.example/simple" }}
wheels = [
    {{ url = "https://files.example/4f/tester-9.2-py3-none-any.whl", hash = "{D}", size = 9 }},
]

[[package]]
name = "torch"
version = "2.13.0"
source = {{ registry = "https://registry.example/simple" }}
dependencies = [
    {{ name = "cuda", marker = "sys_platform == 'linux'" }},
    {{ name = "numbers", version = "2.0", source = {{ registry = "https://registry.example/simple" }}, marker = "os_name == 'nt'" }},
]
wheels = [
    {{ url = "https://files.example/5f/torch-2.13.0%2Bx-py3-none-any.whl", hash = "{E}", size = 10, upload-time = "2026-10-09T08:38:58Z" }},
]
"""  # noqa: E501

# The same, as uv writes it where an index of this machine offers a build of torch that does not need cuda.
WRITTEN_LOCALLY = (
    WRITTEN.replace(
        WRITTEN[WRITTEN.index('[[package]]\nname = "cuda"') : WRITTEN.index('[[package]]\nname = "tes')], ""
    )
    .replace('    { name = "cuda", marker = "sys_platform == \'linux\'" },\n', "")
    .replace(
        '"2.13.0"\nsource = { registry = "https://registry.example/simple" }',
        '"2.13.0+cpu"\nsource = { registry = "/i" }',
    )
    .replace("https://files.example/5f/torch-2.13.0%2Bx-py3", "file:///w/torch-2.13.0%2Bcpu-py3")
    .replace(E, NEW)
)
# The same, after the registry has got one more wheel of a locked version.
WRITTEN_LATER = WRITTEN.replace(
    'wheels = [\n    { url = "https://files.example/2f/numbers',
    f'wheels = [\n    {{ url = "https://files.example/6f/numbers-2.0-cp315-none-any.whl", hash = "{NEW}" }},\n'
    '    { url = "https://files.example/2f/numbers',
)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A git repository that holds the stripped lock file."""
    (tmp_path / "uv.lock").write_text(strip(WRITTEN))
    for command in (["init", "-q"], ["add", "uv.lock"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_strip_keeps_versions_and_hashes_and_no_address() -> None:
    stripped = strip(WRITTEN)
    assert is_stripped(stripped)
    assert not is_stripped(WRITTEN)
    assert "example" not in stripped
    assert "upload-time" not in stripped
    assert f'sdist = {{ hash = "{A}", size = 118387 }}\n' in stripped
    assert f'    {{ filename = "torch-2.13.0+x-py3-none-any.whl", hash = "{E}" }},\n' in stripped
    assert stripped.count('registry = "default-index"') == 5
    assert [package.hashes for package in parse(stripped).packages.values()] == [
        package.hashes for package in parse(WRITTEN).packages.values()
    ]


def test_strip_marks_the_file_as_incomplete_once() -> None:
    stripped = strip(WRITTEN)
    assert 'requires-dist = [{ name = "uv-lock-without-urls" }, { name = "torch", specifier = ">=2.11" }]' in stripped
    several = WRITTEN.replace('requires-dist = [{ name = "torch"', 'requires-dist = [\n    { name = "torch"').replace(
        '">=2.11" }]', '">=2.11" },\n]'
    )
    assert 'requires-dist = [\n    { name = "uv-lock-without-urls" },\n    { name = "torch"' in strip(several)


def test_strip_twice_is_strip_once() -> None:
    assert strip(strip(WRITTEN)) == strip(WRITTEN)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("version = 1\n", "version = 2\n", "version must be 1, but is 2"),
        ("[manifest]", '[options]\nexclude-newer = "2026"\n\n[manifest]', r"unknown tables \['options'\]"),
        ('name = "tester"\nversion', 'name = "tester"\nfork = 1\nversion', r"tester has unknown keys \['fork'\]"),
        ('{ editable = "packages/our-part" }\ndep', '{ git = "https://x.example/y" }\ndep', "our-part must come from"),
        (f'hash = "{D}"', 'hash = "md5:00"', "tester has a file without hash"),
        ('"https://files.example/4f/tester-9.2-py3-none-any.whl"', '"https://files.example/tester"', "not a wheel"),
        (", size = 9 }", ', size = 9, metadata = "https://x.example" }', "unknown keys"),
        ("requires-dist = [{ name", "requires-dist = [ { name", "no member of the workspace has requirements"),
        ("[[package]]", "[[package]", "is not TOML"),
        ('specifier = ">=9"', 'specifier = "https://x.example"', "an address in an unknown place"),
        ("    { url = ", "  { url = ", "an address in an unknown place"),
    ],
)
def test_what_uv_would_not_write_is_refused(old: str, new: str, complaint: str) -> None:
    broken = WRITTEN.replace(old, new)
    assert broken != WRITTEN
    with pytest.raises(LockError, match=complaint):
        strip(broken)


def test_strip_refuses_wheels_of_this_machine() -> None:
    with pytest.raises(LockError, match="wheels of this machine: torch"):
        strip(WRITTEN_LOCALLY)


def test_a_faithful_lock_has_no_differences() -> None:
    committed = strip(WRITTEN)
    assert differences(committed, WRITTEN) == []
    assert differences(committed, WRITTEN_LATER) == []
    assert differences(committed, WRITTEN_LOCALLY) == []


def test_differences_name_what_was_not_kept() -> None:
    committed = strip(WRITTEN)
    assert differences(committed, WRITTEN.replace('"9.2"', '"9.3"')) == ["tester 9.3 is new", "tester 9.2 is gone"]
    assert differences(committed, WRITTEN.replace(D, NEW)) == [f"tester 9.2 lost {D}"]
    assert differences(strip(WRITTEN_LATER), WRITTEN) == [f"numbers 2.0 lost {NEW}"]
    # What the local build of torch still needs may not vanish with the packages of the ordinary build.
    start = WRITTEN_LOCALLY.index('[[package]]\nname = "numbers"')
    without_numbers = WRITTEN_LOCALLY[:start] + WRITTEN_LOCALLY[WRITTEN_LOCALLY.index("[[package]]", start + 1) :]
    assert differences(committed, without_numbers) == ["numbers 2.0 is gone"]
    assert differences(committed, WRITTEN_LOCALLY.replace("2.13.0+cpu", "2.14.0+cpu"))[0] == "torch 2.14.0 is new"


def test_files_added_later_are_left_out() -> None:
    assert strip(WRITTEN_LATER) != strip(WRITTEN)
    assert without_new_files(strip(WRITTEN_LATER), strip(WRITTEN)) == strip(WRITTEN)


def test_clean_stores_the_committed_file_when_uv_only_filled_in_addresses(workspace: Path) -> None:
    committed = strip(WRITTEN)
    for written in (committed, WRITTEN, WRITTEN_LATER, WRITTEN_LOCALLY):
        assert clean(workspace, written) == committed


def test_clean_stores_a_change_without_addresses(workspace: Path) -> None:
    changed = WRITTEN.replace('"9.2"', '"9.3"')
    assert clean(workspace, changed) == strip(changed)
    with pytest.raises(LockError, match=r"(?s)wheels of this machine \(torch\) and differs.*tester 9.3 is new"):
        clean(workspace, WRITTEN_LOCALLY.replace('"9.2"', '"9.3"'))


def test_git_add_never_stages_addresses(workspace: Path) -> None:
    shutil.copytree(ROOT / "tools", workspace / "tools", ignore=shutil.ignore_patterns("__pycache__", "tests"))
    (workspace / ".gitattributes").write_text((ROOT / ".gitattributes").read_text())
    command = f"{sys.executable} tools/lock.py clean"
    subprocess.run(["git", "config", "filter.uv-lock.clean", command], cwd=workspace, check=True)
    subprocess.run(["git", "config", "filter.uv-lock.required", "true"], cwd=workspace, check=True)
    changed = WRITTEN.replace('"9.2"', '"9.3"')
    (workspace / "uv.lock").write_text(changed)
    subprocess.run(["git", "add", "-A"], cwd=workspace, check=True)
    shown = subprocess.run(["git", "show", ":uv.lock"], cwd=workspace, check=True, capture_output=True, text=True)
    assert shown.stdout == strip(changed)
    (workspace / "uv.lock").write_text("version = 7\n")
    assert subprocess.run(["git", "add", "-A"], cwd=workspace, capture_output=True).returncode != 0


def test_verify_compares_with_the_committed_file(workspace: Path) -> None:
    (workspace / "uv.lock").write_text(WRITTEN)
    verify(workspace)
    (workspace / "uv.lock").write_text(WRITTEN.replace('"9.2"', '"9.3"'))
    with pytest.raises(LockError, match=r"did not keep what is committed:\ntester 9\.3 is new"):
        verify(workspace)


def test_local_index_offers_local_builds_of_locked_versions(tmp_path: Path) -> None:
    wheels = tmp_path / "my wheels"
    wheels.mkdir()
    this = f"cp{sys.version_info.major}{sys.version_info.minor}"
    fitting = wheels / "torch-2.13.0+cpu-py3-none-any.whl"
    for name in (
        fitting.name,
        "torch-2.13.0-py3-none-any.whl",  # the ordinary build
        "torch-2.12.0+cpu-py3-none-any.whl",  # another version
        "torch-2.13.0+cpu-cp27-cp27m-any.whl",  # another Python
        f"torch-2.13.0+cpu-{this}-{this}-plan9_mips.whl",  # another machine
        "unknown-1.0+cpu-py3-none-any.whl",
        "torch.whl",
    ):
        (wheels / name).write_bytes(name.encode())
    address = local_index(wheels, strip(WRITTEN), tmp_path / "index")
    assert address == (tmp_path / "index").as_uri()
    assert [path.relative_to(tmp_path / "index").as_posix() for path in (tmp_path / "index").rglob("*.*")] == [
        "torch/index.html"
    ]
    digest = hashlib.sha256(fitting.read_bytes()).hexdigest()
    page = (tmp_path / "index" / "torch" / "index.html").read_text()
    assert page == (
        f'<a href="{wheels.as_uri()}/torch-2.13.0%2Bcpu-py3-none-any.whl#sha256={digest}">{fitting.name}</a>\n'
    )
    fitting.unlink()
    assert local_index(wheels, strip(WRITTEN), tmp_path / "index") == ""
    assert not (tmp_path / "index" / "torch").exists()


def test_local_index_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(LockError, match="no such folder of wheels"):
        local_index(tmp_path / "missing", strip(WRITTEN), tmp_path / "index")


def test_the_committed_lock_is_stripped() -> None:
    shown = subprocess.run(["git", "show", ":uv.lock"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert is_stripped(shown.stdout)
    assert parse(shown.stdout).packages["torch", "2.13.0"].version == "2.13.0"


def test_an_error_is_one_line_and_an_exit_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["local-index", str(tmp_path / "missing")]) == 1
    assert capsys.readouterr().err == f"error: no such folder of wheels: {tmp_path / 'missing'}\n"


@pytest.mark.registry
def test_update_writes_what_check_accepts_and_uv_completes(tmp_path: Path) -> None:
    member = tmp_path / "packages" / "part"
    member.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.uv]\npackage = false\n[tool.uv.workspace]\nmembers = ["packages/*"]\n'
    )
    project = '[project]\nname = "part"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["iniconfig>=2"]\n'
    project += '[build-system]\nrequires = ["uv_build"]\nbuild-backend = "uv_build"\n'
    (member / "pyproject.toml").write_text(project)
    update(tmp_path, [])
    lock = tmp_path / "uv.lock"
    stripped = lock.read_text()
    assert is_stripped(stripped)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    check(tmp_path)
    assert lock.read_text() == stripped

    uv = find_uv(ROOT)
    assert uv is not None
    subprocess.run([uv, "lock", "-q"], cwd=tmp_path, env=os.environ | registry_environment(), check=True)
    assert not is_stripped(lock.read_text())
    verify(tmp_path)
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    with pytest.raises(LockError, match="holds addresses"):
        check(tmp_path)

    lock.write_text(stripped)
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    (member / "pyproject.toml").write_text(project.replace("iniconfig>=2", "iniconfig>=2,<99"))
    with pytest.raises(LockError, match=r"(?s)not what the pyproject files lead to.*<99"):
        check(tmp_path)
