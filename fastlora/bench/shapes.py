"""Layer sizes of the models whose linears are measured: the one place that holds them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer's decoder layer, as its configuration file gives them."""

    label: str
    hidden: int
    q: int
    """Outputs of the query projection: heads times their size."""
    kv: int
    """Outputs of the key projection, and of the value projection."""
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    gated: bool = True
    """Whether the MLP has a gate; GPT-2's has none, and its q, k and v are one linear."""

    def linears(self) -> dict[str, tuple[int, int]]:
        """``in_features, out_features`` of every linear of a decoder layer."""
        if not self.gated:
            return {
                "c_attn": (self.hidden, self.q + 2 * self.kv),
                "c_proj": (self.q, self.hidden),
                "c_fc": (self.hidden, self.intermediate),
                "mlp.c_proj": (self.intermediate, self.hidden),
            }
        return {
            "q_proj": (self.hidden, self.q),
            "k_proj": (self.hidden, self.kv),
            "v_proj": (self.hidden, self.kv),
            "o_proj": (self.q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def distinct_linears(self) -> tuple[tuple[int, int], ...]:
        """The sizes that occur, each once."""
        return tuple(dict.fromkeys(self.linears().values()))


MODELS = {
    "llama-3.1-8b": ModelShape("Llama-3.1-8B", 4096, 4096, 1024, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": ModelShape("Llama-3.1-70B", 8192, 8192, 1024, 28672, 80, 64, 8, 128256),
    "qwen2.5-7b": ModelShape("Qwen2.5-7B", 3584, 3584, 512, 18944, 28, 28, 4, 152064),
    "gemma-2-9b": ModelShape("Gemma-2-9B", 3584, 4096, 2048, 14336, 42, 16, 8, 256000),
    "gpt2": ModelShape("GPT-2", 768, 768, 768, 3072, 12, 12, 12, 50257, gated=False),
}

LLAMA_LINEARS = tuple(MODELS["llama-3.1-8b"].linears())
"""What every LoRA of the model suite is put on."""
