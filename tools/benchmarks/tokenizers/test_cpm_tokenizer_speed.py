"""The benchmark runs, and finds equal ids."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_benchmark_compares_ids(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("我们爱北京天安门，清华大学abc\n今天 天气真好\n", encoding="utf-8")
    script = ROOT / "tools/benchmarks/tokenizers/cpm_tokenizer_speed.py"
    vocabulary = ROOT / "packages/mc-tokenizers/tests/vocabularies/cpm1/vocab.txt"
    command = [sys.executable, str(script), "--vocabulary", str(vocabulary), "--repeats", "1", "--processes", "1"]
    result = subprocess.run([*command, "--", str(tmp_path / "text.txt")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Ids are equal." in result.stdout
    assert "| 1 | " in result.stdout
