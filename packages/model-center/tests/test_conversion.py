"""Converted checkpoints against Transformers and against plain reading with `safetensors` and `torch.load`."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import OURS, THEIRS, change_json, make_ours, save_legacy, write_legacy, write_theirs
from torch import Tensor

from model_center.model import families, load_model
from model_center.model.safetensors_writer import SafetensorsWriter
from model_center.recipe.cli import main

INPUT = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def convert(source: Path, output: Path, *more: str) -> Path:
    assert main(["convert", str(source), str(output), *more]) == 0
    return output


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()  # what made the input may have been told
    with pytest.raises(SystemExit) as stopped:
        main(["convert", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 or "cannot load" in error
    return error


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files, whatever the index says."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def their_logits(name: str, directory: Path) -> Tensor:
    model, report = THEIRS[name][1].from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = {"input_ids": INPUT} | ({"decoder_input_ids": INPUT} if name.startswith("t5") else {})
    with torch.no_grad():
        output = model.eval()(**inputs)
    scores: Tensor = output.last_hidden_state if name == "bert-bare" else output.logits
    return scores


@pytest.mark.parametrize("name", THEIRS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    theirs = write_theirs(name, tmp_path / "theirs")
    ours = convert(theirs, tmp_path / "ours")
    back = convert(ours, tmp_path / "back")
    found, expected = tensors_of(back), tensors_of(theirs)
    if name == "bert-bare":  # their bare models have no prefix; those with a head are read by both
        found = {key.removeprefix("bert."): tensor for key, tensor in found.items()}
    if name == "bert":  # two names of one parameter
        found["cls.predictions.bias"] = found.pop("cls.predictions.decoder.bias")
    assert_same(found, expected)
    assert torch.equal(their_logits(name, back), their_logits(name, theirs))
    loaded: Any = load_model(theirs)
    assert_same(tensors_of(ours), {key: loaded.state_dict()[key] for key in tensors_of(ours)})
    assert load_model(ours).config == loaded.config
    state = loaded.state_dict()
    absent = {key.partition(".")[0] for key in state.keys() - tensors_of(ours).keys()}
    assert absent == {"bert": {"pooler"}, "bert-bare": {"lm_head"}}.get(name, set())


def test_logits_of_what_was_converted(tmp_path: Path) -> None:
    for name in ("bert", "gpt2", "gptj", "t5-gated"):
        theirs = write_theirs(name, tmp_path / name)
        ours: Any = load_model(convert(theirs, tmp_path / f"{name}-ours"))
        inputs = {"input_ids": INPUT} | ({"decoder_input_ids": INPUT} if name.startswith("t5") else {})
        with torch.no_grad():
            logits = ours(**inputs, return_logits=True)
        expected = their_logits(name, theirs)
        torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, rtol=0, atol=1e-5)


def test_without_a_head_no_class_with_one_is_named(tmp_path: Path) -> None:
    theirs = write_theirs("bert-bare", tmp_path / "theirs")
    back = convert(convert(theirs, tmp_path / "ours"), tmp_path / "back")
    assert "architectures" not in json.loads((back / "config.json").read_text())
    assert isinstance(transformers.AutoModel.from_pretrained(back), transformers.BertModel)
    headed = convert(convert(write_theirs("bert", tmp_path / "h"), tmp_path / "oh"), tmp_path / "bh")
    assert json.loads((headed / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_types(dtype: str, tmp_path: Path) -> None:
    theirs = write_theirs("gpt2", tmp_path / "theirs")
    wanted = getattr(torch, dtype)
    ours = convert(theirs, tmp_path / "ours", "--dtype", dtype)
    assert {tensor.dtype for tensor in tensors_of(ours).values()} == {wanted}
    assert load_model(ours).config.dtype == wanted
    back = convert(ours, tmp_path / "back")
    assert_same(tensors_of(back), {name: tensor.to(wanted) for name, tensor in tensors_of(theirs).items()})
    assert json.loads((back / "config.json").read_text())["dtype"] == dtype
    direct = convert(convert(theirs, tmp_path / "plain"), tmp_path / "direct", "--dtype", dtype)
    assert_same(tensors_of(direct), tensors_of(back))


def test_several_files_in_and_out(tmp_path: Path) -> None:
    theirs = write_theirs("gpt2", tmp_path / "theirs", shard="20KB")
    assert len(list(theirs.glob("model-*.safetensors"))) > 2
    ours = convert(theirs, tmp_path / "ours", "--max_file_bytes", "30000")
    assert len(list(ours.glob("model-*.safetensors"))) > 2
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in ours.glob("*.safetensors")]
    assert max(sizes) <= 30_000
    back = convert(ours, tmp_path / "back")
    assert [file.name for file in back.glob("*.safetensors")] == ["model.safetensors"]
    assert_same(tensors_of(back), tensors_of(theirs))


def test_weights_that_torch_has_saved(tmp_path: Path) -> None:
    theirs = write_theirs("gpt2", tmp_path / "theirs")
    weights = tensors_of(theirs)
    (theirs / "model.safetensors").unlink()
    torch.save(weights, theirs / "pytorch_model.bin")
    assert_same(tensors_of(convert(convert(theirs, tmp_path / "ours"), tmp_path / "back")), weights)


@pytest.mark.parametrize("family", OURS)
def test_directories_of_the_original(family: str, tmp_path: Path) -> None:
    legacy = write_legacy(family, tmp_path / "legacy")
    ours = convert(legacy, tmp_path / "ours", "--family", family)
    assert_same(tensors_of(ours), torch.load(legacy / "pytorch_model.pt", weights_only=True))
    assert load_model(ours).config == families[family].config_class.from_json_file(legacy / "config.json")


@pytest.mark.parametrize("name", ["bert_fp16", "gpt2_fp32", "gptj_fp16", "t5_fp32", "cpm1_fp32", "cpm2_fp16"])
def test_checkpoints_that_the_original_wrote(name: str, shared_dir: Path, tmp_path: Path) -> None:
    legacy, family = shared_dir / "golden" / "models" / name, name.partition("_")[0]
    ours = convert(legacy, tmp_path / "ours", "--family", family)
    written = torch.load(legacy / "pytorch_model.pt", weights_only=True)
    assert_same(tensors_of(ours), {key: written[key] for key in tensors_of(ours)})
    loaded = load_model(ours)
    assert loaded.state_dict().keys() == tensors_of(ours).keys()
    if not family.startswith("cpm"):
        convert(legacy, tmp_path / "theirs", "--family", family, "--to", "transformers")
        again = load_model(tmp_path / "theirs").state_dict()
        if family == "gpt2":  # the embedding of the id that fills up our vocabulary means nothing
            assert not again["input_embedding.weight"][-1].any()
            again["input_embedding.weight"][-1] = loaded.state_dict()["input_embedding.weight"][-1]
        assert_same(again, loaded.state_dict())


def test_a_divided_residual_stream_is_multiplied_again(tmp_path: Path) -> None:
    model = make_ours("t5")
    model.save_pretrained(tmp_path / "plain")
    scaled = type(model).from_pretrained(tmp_path / "plain", type(model).config_class.from_pretrained(
        tmp_path / "plain", residual_scale=100.0
    ))  # fmt: skip
    scaled.save_pretrained(tmp_path / "scaled")
    plain, found = (tensors_of(convert(tmp_path / name, tmp_path / f"{name}-theirs")) for name in ("plain", "scaled"))
    assert plain.keys() == found.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0)


def test_tokenizer_comes_along(encoder: Path, tmp_path: Path) -> None:
    theirs = convert(encoder, tmp_path / "theirs")
    names = {"tokenizer.json", "tokenizer_config.json"}
    assert names <= {path.name for path in encoder.iterdir()}
    for name in names:
        assert (theirs / name).read_bytes() == (encoder / name).read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(theirs)("sun moon")["input_ids"] == [2, 5, 6, 3]
    assert {path.name for path in theirs.iterdir()} == names | {"config.json", "model.safetensors"}


CHILD = """
import re, sys
from pathlib import Path
from rich.console import Console
from model_center.recipe import conversion
from model_center.recipe.checkpoint_configuration import ConvertConfig

def resident(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def convert(source, output, **options):
    conversion.run(ConvertConfig(source=source, output=output, **options), Console(quiet=True))

small, large = sys.argv[1:]
convert(f"{small}/theirs", f"{small}/warmed-up")
for number, (kind, options) in enumerate(CASES):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")  # each time, as pages of libraries come and go
    convert(f"{large}/{kind}", f"{large}/output-{number}", **options)
    print(resident("VmHWM") - before)
"""
CASES: list[tuple[str, dict[str, str]]] = [
    ("theirs", {}), ("theirs", {"dtype": "bfloat16"}), ("ours", {}), ("legacy", {"family": "gpt2"}),
]  # fmt: skip


def write_sizable(directory: Path, layers: int, vocabulary: int) -> None:
    """Write a GPT-2 whose embedding is its largest tensor: of Transformers, of ours, and as the original did."""
    config = transformers.GPT2Config(n_embd=512, n_head=8, vocab_size=vocabulary, n_positions=64, n_layer=layers)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in transformers.GPT2LMHeadModel(config).state_dict().items()}
    del shapes["lm_head.weight"]
    config.save_pretrained(directory / "theirs")
    save_file({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, directory / "theirs/model.safetensors")
    ours = load_model(directory / "theirs")
    ours.save_pretrained(directory / "ours")
    save_legacy(ours, directory / "legacy")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, to measure the peak of memory")
def test_memory_stays_below_two_tensors(tmp_path: Path) -> None:
    """Resident memory, which pages of mapped files count in: they are read and let go tensor by tensor."""
    write_sizable(tmp_path / "small", 1, 63)
    write_sizable(tmp_path / "large", 10, 8191)
    command = [
        sys.executable,
        "-c",
        CHILD.replace("CASES", repr(CASES)),
        str(tmp_path / "small"),
        str(tmp_path / "large"),
    ]
    peaks = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    largest = 8192 * 512 * 4
    assert sum(tensor.nbytes for tensor in tensors_of(tmp_path / "large" / "ours").values()) > 8 * largest
    assert len(peaks) == len(CASES)
    for number, (case, peak) in enumerate(zip(CASES, map(int, peaks), strict=True)):
        assert peak < 2 * largest + 8 * 2**20, case  # what Python, headers and the allocator hold
        assert len(tensors_of(tmp_path / "large" / f"output-{number}")) > 100


def test_no_space_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = write_theirs("bert", tmp_path / "theirs")
    added: list[str] = []

    def add(writer: SafetensorsWriter, name: str, tensor: Tensor) -> None:
        added.append(name)
        if len(added) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "add", add)
    error = failure(capsys, str(theirs), str(tmp_path / "ours"))
    assert f"{tmp_path / 'ours'} could not be written, and nothing of it is left: No space left on device" in error
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_norms_that_the_other_side_has_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_ours("gptj")
    with torch.no_grad():
        model.get_parameter("encoder.layers.1.self_att.layernorm_before_attention.weight")[3] = 0
    model.save_pretrained(tmp_path / "ours")
    told = failure(capsys, str(tmp_path / "ours"), str(tmp_path / "theirs"))
    assert "cannot export encoder.layers.1.ffn.ffn.w_in.w.weight and encoder.layers.1.self_att.layernorm" in told
    assert "whose weight must not be 0 where the second's is not, but is at 1 of 24 positions" in told
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = write_theirs("bert", tmp_path / "theirs")
    legacy = write_legacy("bert", tmp_path / "legacy")
    make_ours("cpm1").save_pretrained(tmp_path / "cpm1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_bytes((theirs / "config.json").read_bytes())
    (tmp_path / "roberta").mkdir()
    (tmp_path / "roberta" / "config.json").write_text('{"model_type": "roberta"}')
    new = str(tmp_path / "new")
    for arguments, message in [
        (["nowhere", new], "'nowhere' is neither a directory nor a known identifier"),
        ([str(theirs), str(legacy)], f"output must be a directory that does not exist yet, but {legacy} does"),
        ([str(tmp_path / "empty"), new], "has no config.json"),
        ([str(tmp_path / "weightless"), new], "holds no weights"),
        ([str(tmp_path / "roberta"), new], "the family must be one of bert, gpt2, gptj, t5, cpm1, cpm2, but is 'rob"),
        ([str(legacy), new], "names no `model_type`, so it is neither one of ours nor of Transformers"),
        ([str(legacy), new, "--family", "brt"], "the family must be one of bert, gpt2"),
        ([str(legacy), new, "--family", "gpt2"], "GPT2Config has no option"),
        ([str(theirs), new, "--family", "gpt2"], "family must be that of"),
        ([str(theirs), new, "--to", "transformers"], "is one of Transformers already"),
        ([str(tmp_path / "cpm1"), new], "Transformers has no counterpart of CPM1"),
        ([str(theirs), new, "--dtype", "int3"], "--dtype: "),
        ([str(theirs), new, "--max_file_bytes", "0"], "max_file_bytes must be positive, but is 0"),
    ]:
        assert message in failure(capsys, *arguments), arguments
    weights = tensors_of(theirs)
    del weights["bert.encoder.layer.1.output.dense.bias"]
    save_file(weights | {"strange": torch.ones(1)}, theirs / "model.safetensors")
    error = failure(capsys, str(theirs), new)
    assert "encoder.layers.1.ffn.ffn.w_out.bias" in error
    assert "strange" in error
    (theirs / "model.safetensors").write_bytes(b"damaged")
    assert "is not a complete safetensors file" in failure(capsys, str(theirs), new)
    other = write_theirs("bert", tmp_path / "other")
    change_json(other / "config.json", hidden_act="no such")
    assert "`activate_fn` must be one of" in failure(capsys, str(other), new)
    assert not (tmp_path / "new").exists()
