"""Generate with another adapter for each sequence of one batch, and check each against PEFT on its own.

    python examples/serve_many_adapters.py

The model is a small Llama with random weights, and so are the adapters: what is shown is that each
request gets its own adapter's answer. Timings are those of this machine and this small model.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora


def make_model(hidden, layers):
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_adapters(base, folder, count):
    """Adapters of several ranks and targets, written by PEFT."""
    kinds = [
        LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj", "v_proj"]),
        LoraConfig(r=8, lora_alpha=13, target_modules="all-linear"),
        LoraConfig(r=16, lora_alpha=9, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    ]
    for number, config in enumerate(kinds):
        model = get_peft_model(copy.deepcopy(base).cpu(), config)
        for i in range(number, count, len(kinds)):
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(folder / f"adapter-{i}")


def peft_alone(base, folder, name, tokens, new_tokens):
    """What one adapter alone gives in PEFT: its tokens, its logits of the prompt, its seconds."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder / name).eval()
    began = time.perf_counter()
    output = generate(model, tokens, new_tokens)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        return output, model(tokens).logits, seconds


def generate(model, tokens, new_tokens, **options):
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens,
        do_sample=False, **options,
    )  # fmt: skip
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return output


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = torch.device(options.device)
    base = make_model(options.hidden, options.layers).to(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"device: {where}, {torch.get_num_threads()} CPU thread(s), torch {torch.__version__}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_adapters(base, folder, options.adapters)
        names = [f"adapter-{i}" for i in range(options.adapters)]

        model = copy.deepcopy(base)
        bank = fastlora.AdapterBank(model, slots=options.adapters, max_rank=16)
        for name in names:
            bank.add(name, folder / name)
        fastlora.serve(model, bank)

        # One request for each adapter, and one for the frozen model.
        requests = [*names, None]
        tokens = torch.randint(2, 1024, (1, 8), device=device).expand(len(requests), -1)
        generate(model, tokens, 1, adapter_ids=requests)  # loads the adapters
        stats = bank.stats()
        print(f"{stats.loads} adapters loaded into their slots in {stats.load_seconds:.3f} s")
        began = time.perf_counter()
        mixed = generate(model, tokens, options.new_tokens, adapter_ids=requests)
        mixed_seconds = time.perf_counter() - began
        with torch.no_grad():
            logits = model(tokens, adapter_ids=requests).logits

        same, differences, alone_seconds = 0, [], 0.0
        for i, name in enumerate(names):
            output, expected, seconds = peft_alone(
                base, folder, name, tokens[i : i + 1], options.new_tokens
            )
            same += torch.equal(mixed[i : i + 1], output)
            differences.append(float((logits[i] - expected[0]).abs().max()))
            alone_seconds += seconds
        frozen = generate(base, tokens[-1:], options.new_tokens)
        same += torch.equal(mixed[-1:], frozen)

    made = len(requests) * options.new_tokens
    print(f"one mixed batch: {made / mixed_seconds:.0f} tokens/s ({len(requests)} sequences)")
    alone = options.adapters * options.new_tokens / alone_seconds
    print(f"PEFT, one request at a time: {alone:.0f} tokens/s")
    worst = float(torch.tensor(differences).max())  # which keeps a NaN
    print(f"{len(mixed.unique(dim=0))} different answers to one prompt")
    print(f"{same} of {len(requests)} requests have the tokens of their adapter alone")
    print(f"largest difference of a logit of the prompt: {worst:.1e}")
    # In fp32 on a CPU tokens must agree; a GPU rounds otherwise, so there the logits must be close.
    agrees = worst < 1e-3 and same == len(requests) if device.type == "cpu" else worst < 0.1
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
