"""How a pre-training run goes on from a checkpoint: which one, under which options, and whether others will fit."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.filesize import decimal

from model_center import engine

from .agreement import from_first, together
from .checkpoints import CheckpointStore, Found, find_newest
from .configuration import require_outside
from .memory_prediction import saved_state_bytes
from .metrics import ValidationMetrics, valid_records
from .pretrain_configuration import ObjectiveOptions, PretrainConfig
from .pretraining_text import text_files
from .run_directory import Entry, RunDirectory, check_output, check_resumable, entries_of_run, status_file

if TYPE_CHECKING:
    from .pretraining_job import PretrainingJob

DECIDES_SAMPLES = (
    "seed",
    "batch.global_size",
    *(f"data.{option.name}" for option in fields(ObjectiveOptions)),
    *(f"data.{name}" for name in ("full_rows", "tokenizer", "path", "name", "text", "validation_name")),
    "data.validation_share",
)
"""Options that the samples of a step may depend on. With the model they are what may not change when a run goes on."""


def open_store(config: PretrainConfig) -> CheckpointStore:
    """Return the checkpoints of a run."""
    options = config.checkpoints
    return CheckpointStore(
        Path(config.output) / Entry.CHECKPOINTS,
        keep_last=options.keep_last,
        keep_best=options.keep_best,
        asynchronous=options.asynchronous,
    )


def find_start(config: PretrainConfig, *, resume: bool, overwrite: bool) -> tuple[Found, bool]:
    """Find the checkpoint to go on from, and check that the output directory may be written.

    All processes must call it. The first one looks, and tells the others: a network file system may show them less.

    Args:
        config: The configuration, resolved.
        resume: Whether to go on from the newest whole checkpoint, if there is one.
        overwrite: Whether an earlier run may be deleted.

    Returns:
        The checkpoint, if any (the damaged ones on the first process only), and whether the earlier run in the output
        directory is to be deleted: one that ended before its first checkpoint begins again.

    Raises:
        ValueError: The directory may not be written, its checkpoints are all damaged (the message names them), one is
            of a newer format, or a run that begins would read something that lies in the directory.
    """
    is_first = engine.rank() == 0
    found, deletes = together(
        lambda: _find_start(config, resume=resume, overwrite=overwrite) if is_first else (Found(None), False)
    )
    path, deletes = from_first([found.path and str(found.path), deletes])
    return Found(path and Path(path), found.damaged), deletes


def _find_start(config: PretrainConfig, *, resume: bool, overwrite: bool) -> tuple[Found, bool]:
    output = Path(config.output)
    checkpoints = output / Entry.CHECKPOINTS
    found = find_newest(checkpoints, verify=True) if resume else Found(None)
    if found.path is not None:
        check_resumable(output)
        return found, False
    if found.damaged:
        told = [f"no checkpoint of {output} is whole:", *map(str, found.damaged)]
        raise ValueError("\n".join([*told, "give another output, or --overwrite in place of --resume to begin again"]))
    _check_inputs(config)
    has_begun = resume and status_file(output).is_file() and not any(checkpoints.glob("[!.]*"))
    check_output(output, overwrite=overwrite or has_begun, resumable=True)
    return found, overwrite or has_begun


def _check_inputs(config: PretrainConfig) -> None:
    """Refuse what the run reads and lies in its output directory, before raw text becomes data sets there.

    Raises:
        ValueError: There is something of it, or the raw text is missing.
    """
    data = config.data
    files = [] if data.text is None else text_files(data.text)
    named = [("model.name", config.model.name), ("data.path", data.path), ("data.tokenizer", data.tokenizer)]
    require_outside(config.output, [*named, *(("data.text", str(file.resolve())) for file in files)])


def restore(job: "PretrainingJob", store: CheckpointStore, path: Path) -> dict[str, Any]:
    """Go back to a checkpoint; of optimizer and schedule, what the configuration says holds on.

    Returns:
        The progress that was saved.

    Raises:
        ValueError: The checkpoint is damaged or does not fit this run.
    """
    schedule = job.scheduler.state_dict()
    groups = job.optimizer.param_groups
    configured = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    progress = store.load(path, job.state)
    for group, options in zip(job.optimizer.param_groups, configured, strict=True):
        group.update(options)
    job.scheduler.load_state_dict({**schedule, "num_iter": job.scheduler.num_iter})
    job.step = int(progress["step"])
    return progress


def resume(job: "PretrainingJob", path: Path) -> None:
    """Go on from a checkpoint of an earlier process.

    Raises:
        ValueError: It is of another model, of other samples, or of more steps than the run is to have.
    """
    with open_store(job.config) as store:
        progress = restore(job, store, path)
    saved = yaml.safe_load((path / "run.yaml").read_text(encoding="utf-8"))
    changed = list(_differences(saved, yaml.safe_load(job.config.to_yaml())))
    if progress["corpus"] != job.data.fingerprint or any(line.startswith("batch.global_size") for line in changed):
        reasons = "\n".join(changed or ["the files of data.path have changed"])
        raise ValueError(
            f"the checkpoint {path} was trained on other samples than this configuration gives:\n{reasons}\n"
            "give these options as they were, or begin a new run with its weights: name it as model.name, and another "
            "output"
        )
    if job.step > job.config.max_steps:
        raise ValueError(
            f"max_steps must be at least the {job.step} steps that {path} has done, but is {job.config.max_steps}"
        )
    job.watch.load_state_dict(progress["watch"])
    job.validations = [
        ValidationMetrics(step=record["step"], loss=record["loss"], tokens=record["tokens"])
        for record in valid_records(RunDirectory(Path(job.config.output)).metrics)
        if record["kind"] == "validation" and record["step"] <= job.step
    ]


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    for option in DECIDES_SAMPLES:
        before, now = saved, own
        for name in option.split("."):
            before, now = before.get(name, {}), now[name]
        if before != now:
            yield f"{option}: {before!r} in the checkpoint, {now!r} here"


def check_space(job: "PretrainingJob") -> str | None:
    """Compare the checkpoints to come with the free space of their disk.

    Returns:
        A warning if one fits, but not all that are to be kept.

    Raises:
        ValueError: Not even one fits.
    """
    output, options = Path(job.config.output), job.config.checkpoints
    whole_shape = engine.current_engine().whole_shape
    sizes = ((whole_shape(weight).numel(), weight.dtype) for weight in job.model.parameters())
    size = sum(numel * (dtype.itemsize + saved_state_bytes(dtype)) for numel, dtype in sizes)
    free = shutil.disk_usage(next(place for place in (output, *output.parents) if place.exists())).free
    if job.overwrite:
        deleted = (file for entry in entries_of_run(output) for file in (entry, *entry.rglob("*")))
        free += sum(file.stat().st_size for file in deleted if file.is_file())
    # A checkpoint is written before an older one is deleted.
    most = options.keep_last + options.keep_best + 1
    there = 0 if job.found.path is None else len(list(job.found.path.parent.glob("step-*")))
    wanted = max(1, most - there)
    told = f"a checkpoint takes {decimal(size)}, and {decimal(free)} are free for {output}"
    if free < size:
        raise ValueError(f"no space for checkpoints: {told}; make room, or give another output")
    if free < wanted * size:
        return f"the disk will be full: {told}, but there will be up to {most} (checkpoints.keep_last, keep_best)"
    return None
