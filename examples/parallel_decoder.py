"""A Llama with random weights that decodes with an adapter for each row, whole or cut over the ranks.

What `serve_tensor_parallel.py` times and checks.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import transformers
from finetune_distributed import SIZES
from torch import Tensor, nn

import fastlora
from fastlora.distributed import shard_adapter, shard_linears

COLWISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
ROWWISE = ("o_proj", "down_proj")
ADAPTED = (*COLWISE[:-1], *ROWWISE)


def build_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The same whole model on every rank."""
    torch.manual_seed(0)
    sizes = dict(SIZES[args.size])
    sizes["num_hidden_layers"] = args.layers or sizes["num_hidden_layers"]
    length = args.prompt + args.steps
    config = transformers.LlamaConfig(**sizes, use_cache=False, max_position_embeddings=length)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with device:
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def adapter(
    index: int, shapes: dict[str, torch.Size], rank: int, like: Tensor
) -> dict[str, Tensor]:
    """Adapter number ``index``, whole, named as PEFT names it; the same on every rank."""
    generator = torch.Generator(like.device).manual_seed(1000 + index)
    options = {"generator": generator, "device": like.device, "dtype": like.dtype}
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        lora_a = torch.randn(rank, in_features, **options) / in_features**0.5
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora_a
        lora_b = 0.05 * torch.randn(out_features, rank, **options)
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b
    return tensors


class Cache:
    """Keys and values of one rank's heads at fixed addresses: a graph can replay its updates."""

    def __init__(self, layers: int, shape: tuple[int, ...], position: Tensor, like: Tensor) -> None:
        self.keys = [like.new_zeros(shape) for _ in range(layers)]
        self.values = [like.new_zeros(shape) for _ in range(layers)]
        self.position = position

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        self.keys[layer].index_copy_(2, self.position, keys)
        self.values[layer].index_copy_(2, self.position, values)
        return self.keys[layer], self.values[layer]


class Decoder:
    """Greedy decoding of all rows, in one process or cut over the ranks."""

    def __init__(self, args: argparse.Namespace, device: torch.device, sharded: bool) -> None:
        self.args, self.device, self.sharded = args, device, sharded
        self.ranks = dist.get_world_size() if sharded else 1
        model = build_model(args, device)
        modules = dict(model.named_modules())
        shapes = {n: m.weight.shape for n, m in modules.items() if n.endswith(ADAPTED)}
        if sharded:
            shard_linears(model, COLWISE, ROWWISE)
        self.model = model
        self.bank = self._bank(shapes) if args.lora == "fastlora" else None
        config = model.config
        heads = config.num_key_value_heads // self.ranks
        head_dim = config.hidden_size // config.num_attention_heads
        length = args.prompt + args.steps
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.columns = torch.arange(length, device=device)
        self.tokens = torch.zeros(args.rows, 1, dtype=torch.int64, device=device)
        shape = (args.rows, heads, length, head_dim)
        self.cache = Cache(config.num_hidden_layers, shape, self.position, model.lm_head.weight)
        self.logits = torch.empty(0)
        ids = torch.full((args.rows,), -1, dtype=torch.int32, device=device)
        self.routing = fastlora.route(ids, args.adapters)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _bank(self, shapes: dict[str, torch.Size]) -> fastlora.AdapterBank:
        args = self.args
        bank = fastlora.AdapterBank(
            self.model, slots=args.adapters, max_rank=args.rank, target_modules=ADAPTED
        )
        for index in range(args.adapters):
            tensors = adapter(index, shapes, args.rank, self.model.lm_head.weight)
            if self.sharded:
                tensors = shard_adapter(tensors, COLWISE, ROWWISE)
            bank.add(f"adapter-{index}", tensors, config={"lora_alpha": 2 * args.rank})
        fastlora.serve(self.model, bank)
        return bank

    @contextlib.contextmanager
    def using(self, names: list[str | None]) -> Iterator[None]:
        """Hold the adapters of the rows; the tables of the routing keep their addresses."""
        if self.bank is None:
            yield
            return
        with self.bank.use(names) as ids:
            self.routing.update_(ids)
            yield

    @torch.no_grad()
    def eager_step(self) -> None:
        """One token for each row, with no work on the host that a graph could not replay."""
        adapters = {"adapter_ids": self.routing} if self.bank is not None else {}
        output = self.model(
            input_ids=self.tokens,
            attention_mask=(self.columns <= self.position).view(1, 1, 1, -1),
            position_ids=self.position.view(1, 1),
            past_key_values=self.cache,
            use_cache=False,
            **adapters,
        )
        self.logits = output.logits[:, -1]
        self.tokens.copy_(self._best_tokens(self.logits))
        self.position += 1

    def _best_tokens(self, logits: Tensor) -> Tensor:
        """The largest logit's token; of a cut vocabulary, the best of each rank's best."""
        values, tokens = logits.max(-1, keepdim=True)
        if not self.sharded:
            return tokens
        rank = dist.get_rank()
        tokens = tokens + rank * logits.shape[-1]
        # As fp32, which holds any token's number below 2**24, in one collective.
        best = torch.zeros(self.ranks, 2, *values.shape, device=self.device)
        best[rank, 0], best[rank, 1] = values, tokens
        dist.all_reduce(best)
        values, tokens = best.unbind(1)
        return tokens.gather(0, values.argmax(0, keepdim=True))[0].long()

    def step(self) -> None:
        if self.graph is None:
            self.eager_step()
        else:
            self.graph.replay()

    def capture(self) -> str:
        """Capture a step, or say why not: everything has run before, compiled and connected."""
        try:
            graph = torch.cuda.CUDAGraph()
            # thread_local: NCCL's watchdog may ask for events meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.eager_step()
        except RuntimeError as error:
            return str(error).splitlines()[0] or type(error).__name__
        self.graph = graph
        return ""

    def start(self, prompt: Tensor) -> None:
        """Feed the prompt ``[length, rows, 1]``, a token a step, to an empty cache."""
        self.position.zero_()
        for tokens in prompt:
            self.tokens.copy_(tokens)
            self.step()

    def close(self) -> None:
        if self.graph is not None:
            self.graph.reset()  # NCCL keeps a communicator that a graph still holds
            self.graph = None
