"""The example that trains a PEFT model, the page about PEFT, and fastlora where PEFT is not."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import peft_cases  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402

pytestmark = pytest.mark.usefixtures("same_masks")

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:'pin_memory':UserWarning")
def test_trainer_example(capsys: pytest.CaptureFixture[str]):
    """With dropout: the fixture `same_masks` gives both runs the same one."""
    pytest.importorskip("accelerate")
    path = ROOT / "examples" / "finetune_peft_trainer.py"
    spec = importlib.util.spec_from_file_location("finetune_peft_trainer", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    small = {"steps": 2, "hidden": 32, "layers": 1, "length": 8, "batch": 1, "dropout": 0.2}
    with peft_cases.count_peft_forwards() as slow:
        plain, fast = example.compare(example.parse([f"--{name}={n}" for name, n in small.items()]))
    assert len(plain) == len(fast) == 2
    assert all(type(layer) is PeftLinear for layer in slow)
    assert "accelerated 7 of 7 LoRA layers" in capsys.readouterr().out
    assert plain[0] != plain[1], "a step of training changes the loss"
    # bf16 under autocast on a GPU
    torch.testing.assert_close(fast, plain, atol=2e-2 if example.has_bf16() else 1e-5, rtol=0)


def test_documentation_runs(capsys: pytest.CaptureFixture[str]):
    text = (ROOT / "docs" / "peft.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)), names)
    assert "accelerated 7 of 7 LoRA layers" in capsys.readouterr().out
    assert names["out"].loss.isfinite()
    learned = [n for n, p in names["model"].named_parameters() if p.grad is not None]
    assert any(".second." in n for n in learned) and any(".default." in n for n in learned)


def test_importing_fastlora_imports_no_peft_and_needs_none():
    script = (
        "import sys\n"
        "import fastlora, torch\n"
        "assert not {'peft', 'transformers'} & set(sys.modules)\n"
        "sys.modules['peft'] = None\n"  # what a missing package looks like to import
        "try:\n"
        "    fastlora.accelerate(torch.nn.Linear(2, 2))\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "pip install peft" in done.stdout
