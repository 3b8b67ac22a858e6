"""Fine-tune a PEFT model with transformers.Trainer, without and with one line of fastlora.

    python examples/finetune_peft_trainer.py

A small Llama with random weights learns the next byte of Python's own manual: LoRA on every linear,
gradient checkpointing, gradient accumulation, bf16 where the GPU has it. Both runs start from the same
weights and see the same batches, so the loss curves must lie on each other. Nothing is downloaded. Needs
`pip install "fastlora-kernels[peft]"`; without a GPU it takes about a minute, and PEFT's own forward runs
in both, since the kernels need a GPU.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Sequence
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fastlora
from fastlora.cli.demo_task import LLAMA_LINEARS, TOPICS


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    large = torch.cuda.is_available()
    parser.add_argument("--steps", type=int, default=60, help="of the optimizer")
    parser.add_argument("--hidden", type=int, default=2048 if large else 128)
    parser.add_argument("--layers", type=int, default=4 if large else 2)
    parser.add_argument(
        "--length", type=int, default=512 if large else 128, help="bytes a sequence"
    )
    parser.add_argument("--batch", type=int, default=4, help="sequences a forward")
    parser.add_argument("--accumulate", type=int, default=2, help="forwards a step")
    parser.add_argument("--dropout", type=float, default=0.0, help="above 0 the masks differ")
    parser.add_argument("--reentrant", action="store_true", help="the older kind of checkpointing")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def make_model(args: argparse.Namespace) -> PeftModel:
    set_seed(args.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        max_position_embeddings=args.length,
        use_cache=False,
    )
    base = LlamaForCausalLM(config)
    if has_bf16():
        base = base.to("cuda", torch.bfloat16)
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=args.dropout,
        target_modules=list(LLAMA_LINEARS),
        modules_to_save=["embed_tokens", "lm_head"],  # random here, so they have to learn as well
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora)


def make_dataset(length: int) -> list[dict[str, torch.Tensor]]:
    text = "\n\n".join(topics[topic] for topic in TOPICS).encode()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def train(model: PeftModel, args: argparse.Namespace) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.accumulate,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": args.reentrant},
            bf16=has_bf16(),
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            label_names=["labels"],
            seed=args.seed,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=make_dataset(args.length))
        trainer.remove_callback(PrinterCallback)  # the curves are printed side by side below
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def compare(args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """The loss of each step with PEFT as it is, and with fastlora."""
    model = make_model(args)
    accelerated = copy.deepcopy(model)
    plain = train(model, args)

    report = fastlora.accelerate(accelerated)  # the one line
    print(report)
    return plain, train(accelerated, args)


def main(argv: Sequence[str] | None = None) -> None:
    plain, fast = compare(parse(argv))
    print(f"{'step':>4}  {'PEFT':>8}  {'accelerated':>11}")
    for step in range(0, len(plain), max(1, len(plain) // 20)):
        print(f"{step + 1:>4}  {plain[step]:>8.4f}  {fast[step]:>11.4f}")
    largest = max(abs(one - other) for one, other in zip(plain, fast, strict=True))
    print(f"Largest difference of the two loss curves: {largest:.2e}")


if __name__ == "__main__":
    main()
