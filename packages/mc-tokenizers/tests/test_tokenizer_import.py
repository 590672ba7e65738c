"""What importing the package brings along: neither torch nor, before it is needed, Transformers."""

import subprocess
import sys
from pathlib import Path

# No network and no torch, whatever is installed.
ALONE = """
import socket, sys
sys.modules["torch"] = None
def refuse(*_, **__):
    raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
"""


def run(script: str) -> str:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_cpm_needs_neither_torch_nor_transformers(vocabularies: Path) -> None:
    output = run(f"""{ALONE}
import model_center.tokenizer
assert "transformers" not in sys.modules and "sentencepiece" not in sys.modules
tokenizer = model_center.tokenizer.load_tokenizer({str(vocabularies / "cpm1")!r})
assert "transformers" not in sys.modules and "jieba" not in sys.modules
print(tokenizer.tokenize("我们爱"))
""")
    assert output == "['我们', '爱']\n"


def test_fast_tokenizers_work_with_torch_blocked(vocabularies: Path, t5_folder: Path, gpt2_folder: Path) -> None:
    output = run(f"""{ALONE}
from model_center.tokenizer import BertTokenizer, GPT2Tokenizer, T5Tokenizer
T5Tokenizer.from_pretrained({str(t5_folder)!r})("the cat")
GPT2Tokenizer.from_pretrained({str(gpt2_folder)!r})("the cat")
print(BertTokenizer.from_pretrained({str(vocabularies / "bert")!r})(["the", "the cat"], padding=True)["input_ids"])
""")
    assert output == "[[2, 5, 3, 0], [2, 5, 6, 3]]\n"


def test_torch_is_not_imported_where_it_is_installed(vocabularies: Path) -> None:
    run(f"""
import sys
from model_center.tokenizer import load_tokenizer
load_tokenizer({str(vocabularies / "bert")!r})("the cat")
assert "torch" not in sys.modules
""")
