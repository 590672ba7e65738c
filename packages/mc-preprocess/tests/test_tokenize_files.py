"""From text files to data sets: the same bytes for any number of workers, and nothing lost when a run is killed."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from model_center.dataset.indexed import MMapIndexedDataset, MMapIndexedDatasetBuilder
from model_center.tools import (
    Counts,
    InputError,
    LocalExecutor,
    ReadOptions,
    WorkerDiedError,
    shuffle_lines,
    tokenize_files,
)

SMALL_PARTS = ReadOptions(part_bytes=200)


class ByteEncoder:
    """Encodes as UTF-8 bytes, in pieces of `piece`."""

    piece = 16
    vocab_size = 256
    provenance: ClassVar = {"encoder": {"name": "bytes"}}

    def encode(self, line: str) -> list[list[int]]:
        ids = list(line.encode())
        return [ids[start : start + self.piece] for start in range(0, len(ids), self.piece)]


class LongPieces(ByteEncoder):
    piece = 1 << 20


class SlowEncoder(ByteEncoder):
    def encode(self, line: str) -> list[list[int]]:
        time.sleep(0.002)
        return super().encode(line)


class FailingEncoder(ByteEncoder):
    """Fails, also in batches, at the line that says so."""

    def encode(self, line: str) -> list[list[int]]:
        if line == "fail":
            raise KeyError("no such word")
        return super().encode(line)

    def encode_batch(self, lines: Sequence[str]) -> list[list[list[int]]]:
        return [self.encode(line) for line in lines]


class DyingEncoder(ByteEncoder):
    def encode(self, line: str) -> list[list[int]]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class WithInitializer:
    """The document's own shape: what is loaded stays out of the pickle."""

    def initializer(self) -> None:
        self.offset = 3

    def encode(self, line: str) -> list[list[int]]:
        return [[ord(character) + self.offset for character in line]] if line != "drop" else []


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("".join(f"line {i} " + "é" * (i % 40) + "\n" * (1 + i % 3) for i in range(300)))
    return path


def documents_of(prefix: Path) -> list[str]:
    dataset = MMapIndexedDataset(prefix)
    ends = dataset.doc_idx
    return [
        bytes(np.concatenate(dataset[start:end])).decode()
        if dataset.dtype == np.uint8
        else bytes(np.concatenate(dataset[start:end]).astype(np.uint8)).decode()
        for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text().split("\n") if line]


def data_of(*prefixes: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for prefix in prefixes for suffix in (".bin", ".idx")]


@pytest.mark.parametrize("part_bytes", [7, 200, 1 << 20])
def test_lines_become_documents_wherever_the_parts_end(part_bytes: int, text: Path, tmp_path: Path) -> None:
    text.write_text("\n".join(text.read_text().split("\n")[:40]))  # no line break at the end
    counts = tokenize_files([text], tmp_path / "out", ByteEncoder(), options=ReadOptions(part_bytes=part_bytes))
    assert documents_of(tmp_path / "out_1") == lines_of(text)
    dataset = MMapIndexedDataset(tmp_path / "out_1")
    assert dataset.dtype == np.uint16
    lines = lines_of(text)
    assert counts == Counts(
        bytes=text.stat().st_size,
        lines=40,
        documents=len(lines),
        sequences=len(dataset),
        tokens=len(dataset.tokens),
    )
    assert not (tmp_path / "out.parts").exists()


def test_any_number_of_workers_gives_the_same_bytes(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("one\ntwo\n")
    outputs = []
    for workers in (1, 2, 4):
        prefix = tmp_path / f"out{workers}"
        tokenize_files(
            [text, other], prefix, ByteEncoder(), options=ReadOptions(part_bytes=2000), executor=LocalExecutor(workers)
        )
        outputs.append(data_of(tmp_path / f"out{workers}_1", tmp_path / f"out{workers}_2"))
    assert outputs[0] == outputs[1] == outputs[2]
    assert documents_of(tmp_path / "out4_2") == ["one", "two"]


def test_a_single_output_holds_all_inputs_in_their_order(text: Path, tmp_path: Path) -> None:
    other, empty = tmp_path / "other.txt", tmp_path / "empty.txt"
    other.write_text("one\ntwo\n")
    empty.touch()
    tokenize_files([other, empty, text], tmp_path / "out", ByteEncoder(), layout="single", dtype="uint8")
    assert documents_of(tmp_path / "out") == ["one", "two", *lines_of(text)]
    manifest = MMapIndexedDataset(tmp_path / "out").manifest
    assert manifest is not None
    assert manifest.provenance["sources"] == [str(other), str(empty), str(text)]


def test_an_initializer_is_called_and_lines_may_be_dropped(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("ab\r\ndrop\n\nc\n")
    counts = tokenize_files([tmp_path / "data.txt"], tmp_path / "out", WithInitializer())
    assert [item.tolist() for item in MMapIndexedDataset(tmp_path / "out_1")] == [[100, 101], [102]]
    assert (counts.lines, counts.documents, counts.dropped) == (4, 2, 1)


SCRIPT = """
import sys
from test_tokenize_files import SMALL_PARTS, SlowEncoder
from model_center.tools import LocalExecutor, tokenize_files
if __name__ == "__main__":
    tokenize_files([sys.argv[1]], sys.argv[2], SlowEncoder(), options=SMALL_PARTS, executor=LocalExecutor(2))
"""


class Recorder:
    def __init__(self) -> None:
        self.done: Counts | None = None
        self.parts = 0

    def started(self, total_bytes: int, done: Counts) -> None:
        self.done = done

    def advanced(self, counts: Counts) -> None:
        self.parts += 1


def test_a_killed_run_goes_on_after_its_last_complete_part(text: Path, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "run.py"), str(text), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    folder = tmp_path / "out.parts"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        while len(list(folder.glob("part_*.idx"))) < 5:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.communicate()  # until the workers, which have this output too, have ended like their parent
    # A part with a journal is complete, too: the next run does the renames that are left.
    journals = (path.name.removeprefix(".").removesuffix(".commit") for path in folder.glob(".part_*.commit"))
    complete = len({path.stem for path in folder.glob("part_*.idx")}.union(journals))
    assert not (tmp_path / "out_1.idx").exists()
    recorder = Recorder()
    counts = tokenize_files([text], tmp_path / "out", SlowEncoder(), options=SMALL_PARTS, watcher=recorder)
    assert recorder.done is not None
    assert recorder.done.documents > 0
    parts = -(-text.stat().st_size // 200)
    assert recorder.parts == parts - complete > 0
    tokenize_files([text], tmp_path / "fresh", SlowEncoder(), options=SMALL_PARTS)
    assert data_of(tmp_path / "out_1") == data_of(tmp_path / "fresh_1")
    assert counts.documents == len(lines_of(text))


def test_a_run_stopped_between_outputs_keeps_those_that_are_complete(tmp_path: Path) -> None:
    first, second = tmp_path / "1.txt", tmp_path / "2.txt"
    first.write_text("good\n")
    second.write_text("good\nfail\n")
    with pytest.raises(InputError, match=r"2\.txt:2: the encoder failed with KeyError: 'no such word'"):
        tokenize_files([first, second], tmp_path / "out", FailingEncoder())
    assert documents_of(tmp_path / "out_1") == ["good"]
    with pytest.raises(ValueError, match="an unfinished run had other inputs"):
        tokenize_files([second], tmp_path / "out", FailingEncoder())
    with pytest.raises(InputError, match="the encoder failed"):  # goes on, and fails where it did
        tokenize_files([first, second], tmp_path / "out", FailingEncoder())
    second.write_text("good\nfine\n")
    with pytest.raises(ValueError, match="an unfinished run had other inputs"):  # one of them changed
        tokenize_files([first, second], tmp_path / "out", FailingEncoder())
    tokenize_files([first, second], tmp_path / "out", FailingEncoder(), overwrite=True)
    assert documents_of(tmp_path / "out_2") == ["good", "fine"]


def test_existing_data_is_replaced_only_when_told(text: Path, tmp_path: Path) -> None:
    with MMapIndexedDatasetBuilder(tmp_path / "out_1") as builder:
        builder.add_item([7])
    before = data_of(tmp_path / "out_1")
    with pytest.raises(ValueError, match="out_1 exists"):
        tokenize_files([text], tmp_path / "out", ByteEncoder())
    (tmp_path / "bad.txt").write_text("fail")
    with pytest.raises(InputError, match="the encoder failed"):
        tokenize_files([tmp_path / "bad.txt"], tmp_path / "out", FailingEncoder(), overwrite=True)
    assert data_of(tmp_path / "out_1") == before
    tokenize_files([text], tmp_path / "out", ByteEncoder(), overwrite=True)
    assert documents_of(tmp_path / "out_1") == lines_of(text)
    with pytest.raises(ValueError, match="out_1 exists"):
        tokenize_files([text], tmp_path / "out", ByteEncoder())


class Intruder:
    """Starts another run on the same output, with other arguments, while the watched run is at work."""

    def __init__(self, inputs: Path, output: Path) -> None:
        self._inputs = inputs
        self._output = output

    def started(self, total_bytes: int, done: Counts) -> None:
        pass

    def advanced(self, counts: Counts) -> None:
        with pytest.raises(ValueError, match="another process is working on this output now"):
            tokenize_files([self._inputs], self._output, ByteEncoder(), dtype="int32", overwrite=True)


def test_overwriting_leaves_a_run_at_work_alone(text: Path, tmp_path: Path) -> None:
    watcher = Intruder(text, tmp_path / "out")
    tokenize_files([text], tmp_path / "out", ByteEncoder(), overwrite=True, watcher=watcher)
    assert documents_of(tmp_path / "out_1") == lines_of(text)
    assert not (tmp_path / "out.parts").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_someone_elses_is_in_the_way_and_stays_as_it_is(overwrite: bool, tmp_path: Path) -> None:
    folder = tmp_path / "books.parts"
    folder.mkdir()
    (folder / "part_1.txt").write_text("a\n")
    (folder / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"books\.parts holds notes\.md and 1 more"):
        tokenize_files([folder / "part_1.txt"], tmp_path / "books", ByteEncoder(), overwrite=overwrite)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.md", "part_1.txt"]
    file = tmp_path / "file.parts"
    file.write_text("mine")
    with pytest.raises(ValueError, match=r"file\.parts is a file"):
        tokenize_files([folder / "part_1.txt"], tmp_path / "file", ByteEncoder(), overwrite=overwrite)
    assert file.read_text() == "mine"


def test_files_put_beside_the_parts_of_an_unfinished_run_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("good\nfail\n")
    with pytest.raises(InputError, match="the encoder failed"):
        tokenize_files([path], tmp_path / "out", FailingEncoder())
    mine = tmp_path / "out.parts" / "part_1.txt"
    mine.write_text("mine")
    tokenize_files([path], tmp_path / "out", ByteEncoder(), overwrite=True)
    assert list(mine.parent.iterdir()) == [mine]


def test_a_run_that_is_refused_or_was_killed_at_its_start_is_in_nobodys_way(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out.parts"
    folder.mkdir()
    (folder / "lock").touch()
    (folder / f".plan.json.{'0' * 16}.tmp").touch()
    tokenize_files([text], tmp_path / "out", ByteEncoder())
    assert not folder.exists()
    with pytest.raises(ValueError, match="out_1 exists"):
        tokenize_files([text], tmp_path / "out", ByteEncoder())
    assert not folder.exists()


def test_a_worker_that_dies_is_reported(text: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerDiedError, match="out of memory"):
        tokenize_files([text], tmp_path / "out", DyingEncoder(), options=SMALL_PARTS, executor=LocalExecutor(2))


def test_values_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("a\n世\n")
    with pytest.raises(InputError, match=r"data\.txt:1 or up to 2 lines later: `tokens` must fit uint8"):
        tokenize_files([tmp_path / "data.txt"], tmp_path / "out", WithInitializer(), dtype="uint8", layout="single")


def read(tmp_path: Path, name: str, content: bytes, **options: Any) -> list[str]:
    (tmp_path / name).write_bytes(content)
    tokenize_files(
        [tmp_path / name],
        tmp_path / "out",
        ByteEncoder(),
        options=ReadOptions(**options),
        layout="single",
        overwrite=True,
    )
    return documents_of(tmp_path / "out")


def test_formats(tmp_path: Path) -> None:
    jsonl = b'{"text": "a\\nb", "id": 1}\n\n{"text": ""}\n{"text": "c"}'
    assert read(tmp_path, "x.jsonl", jsonl) == ["a\nb", "c"]
    assert read(tmp_path, "x.dat", jsonl.replace(b"text", b"body"), format="jsonl", field="body") == ["a\nb", "c"]
    assert read(tmp_path, "x.jsonl.gz", gzip.compress(jsonl)) == ["a\nb", "c"]
    assert read(tmp_path, "x.txt.gz", gzip.compress(b"one\n" * 3)) == ["one"] * 3
    assert read(tmp_path, "x.txt", "\ufeffmark\r\nlast".encode()) == ["mark", "last"]
    assert read(tmp_path, "x.txt", b"") == []
    # A separator that str.splitlines knows is no end of a line.
    assert read(tmp_path, "x.txt", "one\u2028still one\x0cand still\n".encode()) == ["one\u2028still one\x0cand still"]


def test_zstandard_and_parquet(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    assert read(tmp_path, "x.txt.zst", zstandard.compress(b"one\ntwo")) == ["one", "two"]
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", None, "two", "", "three"], "n": [1, 2, 3, 4, 5]})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    content = (tmp_path / "rows.parquet").read_bytes()
    assert read(tmp_path, "x.parquet", content) == ["one", "two", "three"]
    with pytest.raises(InputError, match="there is no column 'body'; it has text, n"):
        read(tmp_path, "x.parquet", content, field="body")
    with pytest.raises(InputError, match="row group 0, row 1: the field 'n' must be a string, but is int"):
        read(tmp_path, "x.parquet", content, field="n")
    with pytest.raises(InputError, match="not a Parquet file"):
        read(tmp_path, "x.parquet", content[:-20])


def test_frames_of_zstandard_of_every_kind(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    one, two, none = (zstandard.compress(content) for content in (b"one\nt", b"wo\n", b""))
    assert read(tmp_path, "x.txt.zst", skippable + one + none + skippable + two) == ["one", "two"]
    assert read(tmp_path, "x.txt.zst", none) == read(tmp_path, "x.txt.zst", b"") == []
    line = "a line that is repeated"
    frames = zstandard.compress(f"{line}\n".encode() * 100_000) * 2  # more than is decompressed at a time
    assert read(tmp_path, "x.txt.zst", frames) == [line] * 200_000


def random_lines(seed: int) -> bytes:
    return b"".join(b"%d\n" % number for number in np.random.default_rng(seed).integers(1 << 62, size=50_000))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_compressed_files_are_refused(suffix: str, tmp_path: Path) -> None:
    if suffix == ".gz":
        whole = gzip.compress(random_lines(0), mtime=0)
    else:
        whole = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(random_lines(0))
    middle = len(whole) // 2
    flipped = [whole[:at] + b"\xff" * 64 + whole[at + 64 :] for at in (10, middle)]
    for content in (whole[:-1], whole[:middle], whole[:6], whole * 2 + whole[:20], *flipped, whole[:-9] + b"text" * 9):
        message = rf"x\.txt\{suffix}: cannot be read"
        with pytest.raises(InputError, match=message):
            read(tmp_path, f"x.txt{suffix}", content)
        with pytest.raises(InputError, match=message):
            shuffle_lines([tmp_path / f"x.txt{suffix}"], tmp_path / "shuffled.txt")
    assert not (tmp_path / "out.idx").exists()
    assert not (tmp_path / "shuffled.txt").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"good\n" * 100 + b"b\xffd\n", r"x\.txt: invalid UTF-8 at byte 501"),
        ("x.jsonl", b'{"text": "a"}\n' * 30 + b'{"text": \n', r"x\.jsonl:31: not a JSON object"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "a"}', r"x\.jsonl:2: there is no field 'text'; it has 'body'"),
        ("x.jsonl", b"[1]\n", r"x\.jsonl:1: there is no field 'text'; found list"),
        ("x.jsonl", b'{"text": 3}\n', r"x\.jsonl:1: the field 'text' must be a string, but is int"),
        ("x.txt.gz", gzip.compress(b"one\n" * 1000, mtime=0)[:-9], r"x\.txt\.gz: cannot be read"),
        ("x.txt.gz", b"plain", r"x\.txt\.gz: cannot be read"),
    ],
)
def test_bad_input_is_named_with_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, name, content, part_bytes=100)
    assert not (tmp_path / "out.idx").exists()


def test_invalid_utf8_can_be_replaced_and_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("\ufffd good\nb\xffd\n".encode("latin-1", "replace") + "\ufffd".encode())
    options = ReadOptions(bad_bytes="replace")
    counts = tokenize_files([path], tmp_path / "out", ByteEncoder(), options=options)
    assert documents_of(tmp_path / "out_1") == ["? good", "b\ufffdd", "\ufffd"]
    assert counts.replaced == 1


def test_missing_and_changed_files(text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.txt: cannot be read \(No such file"):
        tokenize_files([text, tmp_path / "absent.txt"], tmp_path / "out", ByteEncoder())
    with pytest.raises(InputError, match="Is a directory"):
        tokenize_files([tmp_path], tmp_path / "out", ByteEncoder())
    assert list(tmp_path.iterdir()) == [text]
    with pytest.raises(ValueError, match="at least one file"):
        tokenize_files([], tmp_path / "out", ByteEncoder())


def test_a_very_long_line(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"short\n" + b"x" * 50_000_000 + b"\nshort\n")
    options = ReadOptions(part_bytes=1 << 20)
    tokenize_files([tmp_path / "x.txt"], tmp_path / "out", LongPieces(), options=options, dtype="uint8")
    assert [len(document) for document in documents_of(tmp_path / "out_1")] == [5, 50_000_000, 5]


def test_standard_input(tmp_path: Path) -> None:
    script = "import sys; from test_tokenize_files import ByteEncoder as E, tokenize_files as t"
    subprocess.run(
        [sys.executable, "-c", f"{script}; t(['-'], sys.argv[1], E(), layout='single')", str(tmp_path / "out")],
        input=b"one\ntwo\n",
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        check=True,
    )
    assert documents_of(tmp_path / "out") == ["one", "two"]
    assert json.loads((tmp_path / "out.manifest.json").read_text())["provenance"]["sources"] == ["-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.manifest.json"]
