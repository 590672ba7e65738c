"""The comparison with Transformers: passes where it should, and fails where it should, by name."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import THEIRS, change_json, make_ours, save_legacy, write_legacy, write_theirs
from torch import Tensor

from model_center.engine.lr_scheduler import NoDecay
from model_center.engine.optim import AdamOptimizer, OptimManager
from model_center.model import families
from model_center.model.operations import Duplicate, PadRows, Scale, Split, Transpose
from model_center.model.rules import Row
from model_center.recipe.checkpoint_configuration import Tolerances, VerifyConfig
from model_center.recipe.checkpoints import CheckpointStore, TrainingState, find_newest
from model_center.recipe.cli import main
from model_center.recipe.stored_models import open_stored
from model_center.recipe.verification import Certificate, verify
from model_center.recipe.verification_checks import Check, Measure, check_gradients
from model_center.recipe.verification_runs import Observed, gradients_as_theirs

QUERY = "encoder.layers.1.self_att.self_attention.project_q.weight"
MEASURED = ("weights", "hidden states", "logits", "gradients")


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_theirs("bert", tmp_path_factory.mktemp("verified") / "theirs")


@pytest.fixture
def ours(theirs: Path, tmp_path: Path) -> Path:
    return convert(theirs, tmp_path / "ours")


def convert(source: Path, output: Path, *more: str) -> Path:
    assert main(["convert", str(source), str(output), *more]) == 0
    return output


def compare(ours: Path, theirs: Path, **options: Any) -> Certificate:
    return verify(VerifyConfig(checkpoint=str(ours), against=str(theirs), **options))


def failed(certificate: Certificate) -> dict[str, Check]:
    assert not certificate.passed
    return {check.name: check for check in certificate.checks if not check.passed}


def change_weights(directory: Path, **changes: Tensor | None) -> None:
    """Replace tensors, whose names are written with __ for dots; None removes one."""
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    weights = {**load_file(directory / "model.safetensors"), **named}
    save_file({name: each for name, each in weights.items() if each is not None}, directory / "model.safetensors")


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["verify", *arguments])
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", THEIRS)
def test_the_same_model_passes(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = write_theirs(name, tmp_path / "theirs")
    caplog.clear()
    certificate = compare(convert(theirs, tmp_path / "ours"), theirs)
    assert certificate.passed
    checks = {check.name: check for check in certificate.checks}
    assert list(checks) == ["names", "configuration", "weights", "loading there", *MEASURED[1:]]
    assert all(check.compared > 2 for check in checks.values() if (name, check.name) != ("bert-bare", "logits"))
    assert checks["weights"].worst[0].value == 0
    worst = {each: max(found.value for found in checks[each].worst) for each in MEASURED if checks[each].worst}
    assert all(value < 0.5 * (checks[each].tolerance or 0.0) for each, value in worst.items() if each != "weights")
    assert checks["gradients"].compared == len(load_file(theirs / "model.safetensors"))
    assert caplog.messages == [], "what there is to be said is in the result"


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_in_float64_next_to_nothing_is_left(name: str, tmp_path: Path) -> None:
    theirs = write_theirs(name, tmp_path / "theirs")
    certificate = compare(convert(theirs, tmp_path / "ours"), theirs, dtype="float64")
    assert certificate.passed
    assert all(each.value < 1e-12 for check in certificate.checks for each in check.worst)


@pytest.mark.parametrize("family", ["bert", "gpt2", "gptj", "t5"])
def test_checkpoints_that_the_original_wrote(family: str, shared_dir: Path, tmp_path: Path) -> None:
    legacy = shared_dir / "golden" / "models" / f"{family}_fp32"
    theirs = convert(legacy, tmp_path / "theirs", "--family", family, "--to", "transformers")
    assert compare(legacy, theirs).passed


def test_a_step_of_pre_training(tmp_path: Path) -> None:
    model = make_ours("gpt2")
    optimizer = AdamOptimizer(model.parameters(), lr=1e-3)
    manager = OptimManager()
    manager.add_optimizer(optimizer, NoDecay(optimizer, 1e-3, 0, 10))
    with CheckpointStore(tmp_path / "run", keep_last=1, keep_best=False, asynchronous=False) as store:
        store.save(TrainingState(model, None, manager, progress={"step": 7}), step=7, config="")
    step = find_newest(tmp_path / "run").path
    assert step is not None
    assert compare(step, convert(step, tmp_path / "theirs")).passed


def test_a_perturbed_weight_is_named(ours: Path, theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = load_file(ours / "model.safetensors")[QUERY]
    weight[3, 4] += 1e-3
    change_weights(ours, **{QUERY: weight})
    checks = failed(compare(ours, theirs))
    assert set(checks) == set(MEASURED)
    assert checks["weights"].worst[0].name == QUERY
    assert checks["weights"].worst[0].counterpart == "bert.encoder.layer.1.attention.self.query.weight"
    largest = load_file(theirs / "model.safetensors")["bert.encoder.layer.1.attention.self.query.weight"].abs().max()
    assert checks["weights"].worst[0].value == pytest.approx(1e-3 / largest.item(), rel=1e-3)
    assert all(each.value == 0 for each in checks["weights"].worst[1:])
    assert all(each.name >= "layer 2" for each in checks["hidden states"].worst if each.value > 1e-5)
    capsys.readouterr()
    assert main(["verify", str(ours), "--against", str(theirs)]) == 1
    text = "".join(line.split("│")[0].strip() for line in capsys.readouterr().out.splitlines())
    assert QUERY in text


def test_swapped_layers_are_named(ours: Path, theirs: Path) -> None:
    weights = load_file(ours / "model.safetensors")
    other = QUERY.replace("layers.1", "layers.0")
    change_weights(ours, **{QUERY: weights[other], other: weights[QUERY]})
    checks = failed(compare(ours, theirs, worst=3))
    assert {each.name for each in checks["weights"].worst[:2]} == {QUERY, other}
    assert checks["weights"].worst[2].value == 0
    assert {"logits", "gradients"} <= set(checks)


def test_missing_and_unexpected_tensors_are_named(ours: Path, theirs: Path) -> None:
    change_weights(ours, **{QUERY: None, "stray": torch.ones(2)})
    (check,) = failed(compare(ours, theirs)).values()
    assert check.problems == (
        f"{QUERY} (bert.encoder.layer.1.attention.self.query.weight) is missing here",
        "stray here has no counterpart",
    )


def test_missing_and_unexpected_tensors_there_are_named(ours: Path, theirs: Path, tmp_path: Path) -> None:
    other = write_theirs("bert", tmp_path / "other")
    change_weights(other, **{"bert.encoder.layer.1.attention.self.query.weight": None, "bert.stray": torch.ones(2)})
    (check,) = failed(compare(ours, other)).values()
    assert check.problems == (f"{QUERY} is missing there", "bert.stray there has no counterpart")


def test_heads_of_one_side_are_named(theirs: Path, tmp_path: Path) -> None:
    bare = write_theirs("bert-bare", tmp_path / "bare")
    problems = failed(compare(convert(bare, tmp_path / "ours"), theirs))["names"].problems
    assert "lm_head.dense.weight (cls.predictions.transform.dense.weight) is missing here" in problems
    assert "pooler.dense.weight is missing there" in problems
    assert len(problems) == 7


def test_other_shapes_are_named(ours: Path, theirs: Path) -> None:
    change_weights(ours, **{QUERY: torch.ones(24, 23)})
    (problem,) = failed(compare(ours, theirs))["names"].problems
    assert problem.startswith(f"here, {QUERY} is (24, 23)")
    assert "must be (24, 24)" in problem


def test_another_number_of_layers(theirs: Path, tmp_path: Path) -> None:
    smaller = convert(write_theirs("bert", tmp_path / "two", num_hidden_layers=2), tmp_path / "ours")
    problems = failed(compare(smaller, theirs))["names"].problems
    assert len(problems) == 16
    assert all(problem.startswith("encoder.layers.2.") and problem.endswith("is missing here") for problem in problems)


def test_another_activation(ours: Path, theirs: Path) -> None:
    change_json(ours / "config.json", ffn_activate_fn="gelu_new")
    checks = failed(compare(ours, theirs))
    assert checks["configuration"].problems == ("ffn_activate_fn is 'gelu_new' here, 'gelu' there",)
    assert {"hidden states", "logits", "gradients"} <= set(checks)
    assert "weights" not in checks


def test_another_epsilon(ours: Path, theirs: Path) -> None:
    change_json(ours / "config.json", norm_eps=1e-3)
    checks = failed(compare(ours, theirs))
    assert checks["configuration"].problems == ("norm_eps is 0.001 here, 1e-12 there",)
    assert "logits" in checks


def test_what_is_no_number_fails(ours: Path, theirs: Path) -> None:
    weight = load_file(ours / "model.safetensors")[QUERY]
    weight[0, 0] = float("nan")
    change_weights(ours, **{QUERY: weight})
    certificate = compare(ours, theirs)
    assert set(failed(certificate)) == set(MEASURED)
    written = {check["name"]: check for check in json.loads(certificate.to_json())["checks"]}
    assert written["weights"]["worst"][0] == {
        "name": QUERY, "counterpart": "bert.encoder.layer.1.attention.self.query.weight", "value": None,
    }  # fmt: skip


def test_a_rounded_checkpoint_passes_with_wider_tolerances_only(ours: Path, theirs: Path, tmp_path: Path) -> None:
    rounded = convert(ours, tmp_path / "rounded", "--dtype", "bfloat16", "--to", "model_center")
    checks = failed(compare(rounded, theirs))
    assert set(checks) == set(MEASURED)
    assert checks["weights"].notes[0].startswith("stored in bfloat16 here, float32 there")
    wide = Tolerances(weights=2**-8, states=0.1, logits=0.1, gradients=0.2)
    assert compare(rounded, theirs, tolerances=wide).passed


def test_a_divided_residual_stream_passes(tmp_path: Path) -> None:
    theirs = write_theirs("t5", tmp_path / "theirs")
    model_class = families["t5"]
    scaled = model_class.config_class.from_pretrained(theirs, residual_scale=100.0)
    model_class.from_pretrained(theirs, scaled).save_pretrained(tmp_path / "scaled")
    assert compare(tmp_path / "scaled", theirs).passed


def test_only_gradients_differ(tmp_path: Path) -> None:
    """Transformers does not train the embedding of the padding id; a text that holds it tells."""
    text = tmp_path / "text.txt"
    text.write_text("tok " * 500)
    other = write_theirs("bert", tmp_path / "other", pad_token_id=5)
    again = convert(other, tmp_path / "again")
    assert compare(again, other).passed  # random ids leave it out
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "tok"]
    (again / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (check,) = failed(compare(again, other, text=str(text))).values()
    assert check.name == "gradients"
    assert check.worst[0].name == "input_embedding.weight"
    assert check.worst[1].value < 1e-4


def test_gradients_go_through_the_transposed_operations() -> None:
    """The derivative of the same number by their tensor, when ours are made of it."""
    theirs = torch.randn(4, 6, requires_grad=True)
    row = Row(("a", "b", "c"), ("theirs",), (Transpose(), Split(3), Scale(0.1)), None)
    copies = Row(("d", "e"), ("theirs",), (PadRows(2), Duplicate(2)), None)
    ours = dict(zip((*row.ours, *copies.ours), (*row.to_ours(theirs), *copies.to_ours(theirs)), strict=True))
    factors = {name: torch.randn(tensor.shape) for name, tensor in ours.items()}
    sum((ours[name] * factors[name]).sum() for name in ours).backward()  # type: ignore[union-attr]
    rows = {name: each for each in (row, copies) for name in each.ours}
    assert theirs.grad is not None
    found = gradients_as_theirs(rows, factors, {"theirs": theirs.grad})
    assert found.keys() == {"theirs"}
    assert found["theirs"][0] == "a, b, c, d, e"
    torch.testing.assert_close(found["theirs"][1], theirs.grad)


def test_the_certificate(ours: Path, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "parity.json"
    capsys.readouterr()
    arguments = [str(ours), "--against", str(theirs), "--certificate", str(file), "--tolerances.logits", "2e-5"]
    assert main(["verify", *arguments, "--json"]) == 0
    written = json.loads(file.read_text())
    assert written == json.loads(capsys.readouterr().out)
    assert (written["format"], written["format_version"], written["passed"]) == ("model_center.parity", 1, True)
    for side, directory in (("checkpoint", ours), ("against", theirs)):
        assert written[side]["path"] == str(directory.resolve())
        assert written[side]["files"] == {
            name: {
                "bytes": (directory / name).stat().st_size,
                "sha256": hashlib.sha256((directory / name).read_bytes()).hexdigest(),
            }
            for name in ("config.json", "model.safetensors")
        }
    assert {check["name"]: check["tolerance"] for check in written["checks"]}["logits"] == 2e-5
    assert {"torch", "transformers", "mc-models"} <= written["versions"].keys()
    assert written["sample"] == "4 rows of random ids, seed 0"


def test_sample_text(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = convert(encoder, tmp_path / "theirs")
    text = tmp_path / "text.txt"
    text.write_text("sun moon tree\nriver\n" * 60)
    assert compare(encoder, theirs).sample == f"sample:shakespeare through the tokenizer of {encoder}"
    certificate = compare(encoder, theirs, text=str(text), length=16)
    assert certificate.passed
    assert certificate.sample == f"{text} through the tokenizer of {encoder}"
    text.write_text("sun\n")
    given = [str(encoder), "--against", str(theirs), "--text", str(text)]
    assert "must have 104 tokens for 4 rows, but has 3" in failure(capsys, *given)
    (encoder_of_more := tmp_path / "more").mkdir()
    for path in encoder.iterdir():
        (encoder_of_more / path.name).write_bytes(path.read_bytes())
    smaller = load_file(encoder / "model.safetensors")
    smaller["input_embedding.weight"] = smaller["input_embedding.weight"][:10]
    smaller["lm_head.decoder.bias"] = smaller["lm_head.decoder.bias"][:10]
    save_file(smaller, encoder_of_more / "model.safetensors")
    change_json(encoder_of_more / "config.json", vocab_size=10)
    text.write_text("good bad\n" * 100)
    given = [str(encoder_of_more), "--against", str(convert(encoder_of_more, tmp_path / "their-more"))]
    assert "whose vocabulary has 10 entries, but gives the id" in failure(capsys, *given, "--text", str(text))


def test_wrong_input(ours: Path, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_ours("cpm2").save_pretrained(tmp_path / "cpm2")
    make_ours("gpt2").save_pretrained(tmp_path / "gpt2")
    save_legacy(make_ours("cpm1"), tmp_path / "cpm1")
    write_legacy("t5", tmp_path / "t5")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_bytes((ours / "config.json").read_bytes())
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"damaged")
    (tmp_path / "text.txt").write_text("words")
    for checkpoint, against, more, message in [
        (tmp_path / "nowhere", theirs, [], "checkpoint must be a directory, but is"),
        (ours, tmp_path / "nowhere", [], "against must be a directory, but is"),
        (tmp_path / "empty", theirs, [], "has no config.json"),
        (ours, ours, [], "against must be a directory of Transformers, but"),
        (tmp_path / "damaged", theirs, [], "is not a complete safetensors file"),
        (tmp_path / "cpm2", theirs, [], "Transformers has no counterpart of CPM2"),
        (tmp_path / "gpt2", theirs, [], "both must be of the same family, but"),
        (tmp_path / "t5", theirs, [], "BertConfig has no option"),
        (ours, theirs, ["--text", str(tmp_path / "text.txt")], "text needs a tokenizer, but there is none in"),
        (ours, theirs, ["--dtype", "int8"], "--dtype: expected one of"),
        (ours, theirs, ["--tolerances.logits", "-1"], "tolerances.logits must be zero or positive, but is -1"),
        (ours, theirs, ["--length", "2"], "length must be at least 8, but is 2"),
    ]:
        assert message in failure(capsys, str(checkpoint), "--against", str(against), *more), message


def test_gradients_of_one_side_only(theirs: Path) -> None:
    stored, measure, ones = open_stored(str(theirs)), Measure(1e-4, 5), torch.ones(24)
    there, here = "encoder.layer.0.output.dense.bias", "encoder.layers.0.ffn.ffn.w_out.bias"
    none: dict[str, Tensor] = {}
    expected = Observed({}, None, {there: ones})
    check = check_gradients(Observed({}, None, none), expected, stored, measure)
    assert check.problems == (f"{there} has a gradient there, but none here",)
    other = {here: ones, "pooler.dense.bias": ones, "encoder.output_layernorm.bias": ones}
    check = check_gradients(Observed({}, None, other), expected, stored, measure)
    assert check.problems == ("encoder.output_layernorm.bias has a gradient here, but none there",)
    assert check_gradients(Observed({}, None, {here: ones}), expected, stored, measure).passed
