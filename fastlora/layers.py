"""The embedding with LoRA as a module."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.embedding import lora_embedding
from fastlora.merge_products import Product
from fastlora.modules import LoRAWeightLayer, check_lora_options, layer_problem, lora_scaling


class LoRAEmbedding(LoRAWeightLayer):
    """A frozen embedding with a trainable low-rank update.

    ``y = weight[ids] + scaling * lora_A[:, ids]^T lora_B^T``

    ``weight`` is the very Parameter of ``base``, so a tied weight stays tied, and it is frozen
    here. ``padding_idx``, ``max_norm``, ``norm_type``, ``scale_grad_by_freq`` and ``sparse`` are
    those of ``base``, with the meaning that `fastlora.lora_embedding` gives them. The state dict
    has loralib's keys ``weight``, ``lora_A`` and ``lora_B``; ``lora_A`` starts at zero, so that
    a new layer computes what ``base`` does, and ``lora_B`` is normal.

    Shapes: ids any, y ``(*ids.shape, embedding_dim)``, weight ``(num_embeddings,
    embedding_dim)``, lora_A ``(r, num_embeddings)``, lora_B ``(embedding_dim, r)``.

    Args:
        base: The embedding to adapt. It may live on any device, ``meta`` included.
        r: The rank, 1 to 256.
        lora_alpha: ``scaling`` is ``lora_alpha / r``, with rsLoRA ``lora_alpha / sqrt(r)``.
        use_rslora: Divide by ``sqrt(r)`` instead of ``r``.
        adapter_dtype: dtype of ``lora_A`` and ``lora_B``; None means the dtype of ``base``.
        merge_weights: Merge in ``eval()`` and unmerge in ``train()``, as loralib's layers do.

    Raises:
        TypeError: ``base`` is no plain ``nn.Embedding`` or an argument has the wrong type.
        ValueError: An argument is out of range, or ``base.weight`` is not fp16, bf16, fp32 or fp64.

    Example:
        >>> import torch
        >>> from fastlora import LoRAEmbedding
        >>> base = torch.nn.Embedding(100, 16, padding_idx=0)
        >>> layer = LoRAEmbedding(base, r=4, lora_alpha=8)
        >>> ids = torch.tensor([[5, 7, 0]])
        >>> torch.equal(layer(ids), base(ids))
        True
    """

    peft_names = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}  # noqa: RUF012

    def __init__(
        self,
        base: nn.Embedding,
        r: int,
        lora_alpha: float,
        use_rslora: bool = False,
        *,
        adapter_dtype: torch.dtype | None = None,
        merge_weights: bool = False,
    ) -> None:
        """Freeze ``base`` and make an adapter beside it."""
        super().__init__()
        check_lora_options(r, lora_alpha, 0.0, use_rslora, "kaiming", adapter_dtype)
        problem = layer_problem(base, nn.Embedding, ("weight",))
        if problem is not None:
            raise problem
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.padding_idx, self.max_norm = base.padding_idx, base.max_norm
        self.norm_type, self.sparse = base.norm_type, base.sparse
        self.scale_grad_by_freq = base.scale_grad_by_freq
        self.r = r
        self.lora_alpha = lora_alpha if isinstance(lora_alpha, int) else float(lora_alpha)
        self.use_rslora = use_rslora

        weight = cast(nn.Parameter, base.weight)
        dtype = weight.dtype if adapter_dtype is None else adapter_dtype
        lora_a = torch.empty((r, self.num_embeddings), dtype=dtype, device=weight.device)
        lora_b = torch.empty((self.embedding_dim, r), dtype=dtype, device=weight.device)
        self.register_parameter("weight", weight)
        self.register_parameter("lora_A", nn.Parameter(lora_a))
        self.register_parameter("lora_B", nn.Parameter(lora_b))
        self.scaling = lora_scaling(r, self.lora_alpha, use_rslora)
        self.reset_lora_parameters()
        self._init_merging(merge_weights, base.training)
        weight.requires_grad_(False)

    def reset_lora_parameters(self) -> None:
        """Set ``lora_A`` to zero and draw ``lora_B`` anew; the frozen weight stays as it is."""
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, ids: Tensor) -> Tensor:
        """Look the ids up. Merged, it is the plain embedding."""
        if self._frozen is not None:
            if self.training:
                self._refuse_training_while_merged()
            return F.embedding(
                ids,
                self.weight,
                self.padding_idx,
                self.max_norm,
                self.norm_type,
                self.scale_grad_by_freq,
                self.sparse,
            )
        return lora_embedding(
            ids,
            self.weight,
            self.lora_A,
            self.lora_B,
            scaling=self._scaling_now,
            padding_idx=self.padding_idx,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )

    def _products(self, source: Tensor, target: Tensor) -> list[Product]:
        scaling = float(self.scaling)
        return [Product(source, target, self.lora_B.t(), self.lora_A.t(), scaling)]

    def extra_repr(self) -> str:
        """Show the sizes and the settings in ``repr``."""
        shown = f"{self.num_embeddings}, {self.embedding_dim}, r={self.r}, "
        shown += f"lora_alpha={self.lora_alpha}"
        for name, default in (
            ("padding_idx", None),
            ("max_norm", None),
            ("norm_type", 2.0),
            ("scale_grad_by_freq", False),
            ("sparse", False),
            ("use_rslora", False),
        ):
            if getattr(self, name) != default:
                shown += f", {name}={getattr(self, name)}"
        return shown
