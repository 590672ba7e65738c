"""Fine-tuning on a GPU in every precision, with the optimizer there and on the CPU."""

from pathlib import Path

import pytest
import torch
from tiny_encoder import write_encoder, write_task

from model_center.recipe import (
    DataOptions,
    FinetuneConfig,
    ModelOptions,
    OptimizerOptions,
    evaluate_checkpoint,
    prepare,
    train,
)
from model_center.recipe.configuration import Precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("half", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
@pytest.mark.parametrize("offload", [False, True])
def test_every_precision_learns(tmp_path: Path, precision: Precision, dtype: torch.dtype, offload: bool) -> None:
    data = write_task(tmp_path / "data")
    config = FinetuneConfig(
        output=str(tmp_path / "run"),
        epochs=4,
        model=ModelOptions(name=str(write_encoder(tmp_path / "model")), precision=precision),
        data=DataOptions(path=str(data), max_length=32, batch_size=8),
        optimizer=OptimizerOptions(learning_rate=1e-2, offload=offload),
    )
    job = prepare(config)
    assert {(weight.dtype, weight.device.type) for weight in job.model.parameters()} == {(dtype, "cuda")}
    result = train(job)
    assert result.best.score >= 0.9
    assert evaluate_checkpoint(result.run.checkpoint("best"), data).scores == result.best.scores
