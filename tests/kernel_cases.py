"""The calls of launchers that `compile_kernels.py` compiles."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a launcher: ``[M, K]`` x, ``[N, K]`` weight, rank R, on ``sm_{arch}``."""

    op: str
    arch: int
    dtype: str = "bf16"
    R: int = 16
    dropout: bool = False
    bias: bool = False
    fp32_adapters: bool = False
    tensor_scaling: bool = False
    ranks: bool = False
    M: int = 8192
    K: int = 4096
    N: int = 4096

    @property
    def name(self) -> str:
        """What differs from the defaults, in words."""
        names = ("dropout", "bias", "fp32_adapters", "tensor_scaling", "ranks")
        flags = [name for name in names if vars(self)[name]]
        shape = f"{self.M}x{self.K}x{self.N}"
        return "-".join([self.op, f"sm{self.arch}", self.dtype, f"r{self.R}", shape, *flags])


def cases() -> list[Case]:
    """A cover, not a product: each kernel with each dtype, each tile size and each flag at least once."""
    odd = {
        "M": 1000,
        "K": 4099,
        "N": 4101,
    }  # rows that TMA cannot address, sizes that no tile divides
    few = {"M": 1024}  # fewer tiles than SMs
    found = [
        Case("one_pass", 90),
        Case("one_pass", 90, R=32),
        Case("one_pass", 90, dtype="fp16", R=64, bias=True),
        Case("one_pass", 90, bias=True, tensor_scaling=True, **few),
        Case("grad_ab_ds", 90),
        Case("grad_ab_ds", 90, R=32, tensor_scaling=True),
        Case("grad_ab_ds", 90, dtype="fp16", R=64),
        Case("grad_ab_ds", 90, dtype="fp16", dropout=True),
        Case("grad_ab_ds", 90, R=8, dropout=True, fp32_adapters=True, **few),
        Case("grad_ab_ds", 90, N=14336),
        Case("grad_ab_ds", 90, R=64, N=14336),
        Case("grad_x_ready", 90),
        Case("grad_x_ready", 90, R=64, **few),
        Case("grad_x_ready", 90, dropout=True),
        Case("grad_x_ready", 90, "fp16", dropout=True, **few),
        Case("one_pass", 90, R=128),
        Case("forward", 90),
        Case("forward", 90, R=16, bias=True, **few),
        Case("forward", 90, R=64, fp32_adapters=True),
        Case("forward", 90, R=128, bias=True, fp32_adapters=True),
        Case("forward", 90, R=256),
        Case("forward", 90, "fp16", R=32),
        Case("forward", 90, "tf32", bias=True),
        Case("forward", 90, "tf32", R=64),
        Case("forward", 90, "tf32", R=128, **few),
        Case("forward", 90, "ieee"),
        Case("forward", 90, R=64, **odd),
        Case("grad_x", 90),
        Case("grad_x", 90, dropout=True),
        Case("grad_x", 90, R=16, dropout=True, **few),
        Case("grad_x", 90, R=64, dropout=True, fp32_adapters=True),
        Case("grad_x", 90, R=256, dropout=True),
        Case("grad_x", 90, "fp16", R=32, dropout=True),
        Case("grad_x", 90, "tf32", dropout=True),
        Case("grad_x", 90, "tf32", R=64, dropout=True),
        Case("grad_x", 90, "tf32", R=128, **few),
        Case("grad_x", 90, "ieee", dropout=True),
        Case("grad_x", 90, R=64, dropout=True, **odd),
        Case("grad_x_beside", 90),
        Case("grad_x_beside", 90, R=128, fp32_adapters=True),
        Case("grad_x_beside", 90, dropout=True),
        Case("grad_x_beside", 90, R=64, dropout=True),
        Case("grad_x_beside", 90, R=256, dropout=True),
        Case("grad_x_beside", 90, "fp16", dropout=True, **few),
        Case("grad_x_beside", 90, "tf32"),
        Case("grad_x_beside", 90, "tf32", R=64, dropout=True),
        Case("forward", 90, M=2048),
        Case("dora_forward", 90),
        Case("dora_forward", 90, R=64, bias=True, M=2048),
        Case("dora_forward", 90, R=128, bias=True, fp32_adapters=True, **few),
        Case("dora_forward", 90, "fp16", R=32, bias=True),
        Case("dora_forward", 90, "tf32", bias=True),
        Case("dora_forward", 90, "ieee"),
        Case("dora_forward", 90, R=64, bias=True, **odd),
        Case("dora_forward", 80, bias=True),
        Case("dora_forward", 80, "tf32", R=64),
        Case("dora_forward", 80, "ieee", bias=True),
        Case("shrink_beside", 90, M=2048),
        Case("shrink_beside", 90, N=1024),
        Case("shrink_beside", 90, R=32, dropout=True, fp32_adapters=True, N=1024),
        Case("forward", 80, bias=True),
        Case("forward", 80, R=64, fp32_adapters=True),
        Case("forward", 80, R=256, **odd),
        Case("grad_x", 80, dropout=True),
        Case("grad_x", 80, R=64, fp32_adapters=True),
        Case("grad_x", 80, R=256, dropout=True, **odd),
    ]
    for op in ("forward", "grad_x"):
        drop = {"dropout": op == "grad_x"}
        found += [Case(op, 80, "fp16", **drop), Case(op, 80, "ieee", R=64, **drop)]
        found += [Case(op, 80, "tf32", **drop), Case(op, 80, "tf32", R=256, **drop)]
    for arch in (80, 90):
        for op in ("shrink", "grad_a", "grad_ab"):
            found.append(Case(op, arch))
            found += [Case(op, arch, R=rank, dropout=True) for rank in (16, 64, 128, 256)]
            found += [
                Case(op, arch, R=16, dropout=True, fp32_adapters=True, tensor_scaling=True),
                *(Case(op, arch, R=rank, fp32_adapters=True) for rank in (64, 128, 256)),
                Case(op, arch, "fp16", R=64, dropout=True),
                Case(op, arch, "tf32", R=16),
                Case(op, arch, "tf32", R=256, dropout=True),
                Case(op, arch, "ieee", R=64, dropout=True),
                Case(op, arch, R=8, dropout=True, **odd),
            ]
        found += [
            Case("dora_norm", arch),
            Case("dora_norm", arch, R=64, fp32_adapters=True, tensor_scaling=True),
            Case("dora_norm", arch, R=256),
            Case("dora_norm", arch, "fp16", R=128),
            Case("dora_norm", arch, "tf32", R=256),
            Case("dora_norm", arch, "ieee", R=64),
            Case("dora_norm", arch, "ieee", R=256),
            Case("dora_norm", arch, R=8, **odd),
            Case("dora_grad", arch),
            Case("dora_grad", arch, "fp16", fp32_adapters=True),
            Case("dora_grad", arch, "tf32"),
            Case("dora_grad", arch, "ieee"),
            Case("dora_grad", arch, **odd),
        ]
        for op in ("merge", "merge_many"):
            found += [
                Case(op, arch, R=256),
                Case(op, arch, "fp16", R=64),
                Case(op, arch, "ieee", R=16),
                Case(op, arch, R=16, fp32_adapters=True),
                Case(op, arch, R=8, **odd),
            ]
        for rank in (48, 256):
            found.append(Case("shrink_group", arch, R=rank, dropout=True))
        found += [
            Case("grad_b", arch, R=16),
            Case("grad_b", arch, R=32, fp32_adapters=True, tensor_scaling=True),
            Case("grad_b", arch, R=64),
            Case("grad_b", arch, R=256, fp32_adapters=True),
            Case("grad_b", arch, "fp16", R=16),
            Case("grad_b", arch, "tf32", R=32),
            Case("grad_b", arch, "ieee", R=16),
            Case("grad_b", arch, R=8, **odd),
        ]
        found += [
            Case("expand", arch),
            Case("expand", arch, R=256, dropout=True, fp32_adapters=True, bias=True),
            Case("expand", arch, "fp16", R=8, dropout=True, M=16),
            Case("expand", arch, "ieee", R=64),
            Case("expand", arch, "tf32", R=200, **odd),
            Case("decode", arch, M=1),
            Case("decode", arch, R=64, bias=True, fp32_adapters=True, tensor_scaling=True, M=16),
            Case("decode", arch, "fp16", R=8, M=16, N=14336),
            Case("decode", arch, R=64, M=16, N=14336),
            Case("decode", arch, R=3, M=5, K=4099, N=4101),
            Case("decode", arch, M=16, K=1032, N=1032),
            Case("shrink", arch, M=64),
            *(Case("ds", arch, R=rank) for rank in (4, 8, 24, 128)),
            *(Case("shrink", arch, R=rank) for rank in (64, 128, 256)),
            *(Case("grad_ab", arch, R=rank) for rank in (4, 8)),
            Case("shrink", arch, R=64, dropout=True, M=20),
            Case("embedding", arch),
            Case("embedding", arch, R=64, fp32_adapters=True, tensor_scaling=True),
            Case("embedding", arch, "fp16", R=256),
            Case("embedding", arch, "tf32", R=32),
            Case("embedding", arch, "ieee", R=16),
            Case("embedding", arch, R=8, **odd),
            Case("embedding_grad_a", arch),
            Case("embedding_grad_a", arch, "fp16", R=256, fp32_adapters=True),
            Case("embedding_grad_a", arch, "ieee", R=1),
            Case("sliced", arch, bias=True),
            Case("sliced", arch, "fp16", R=64, fp32_adapters=True, M=1024),
            Case("sliced", arch, "tf32", R=64),
            Case("sliced", arch, "ieee"),
            Case("sliced", arch, R=256, **odd),
            Case("multi_shrink", arch),
            Case("multi_shrink", arch, R=64, dropout=True, fp32_adapters=True),
            Case("multi_shrink", arch, R=256),
            Case("multi_shrink", arch, "fp16", M=64),
            Case("multi_shrink", arch, "tf32", dropout=True),
            Case("multi_shrink", arch, "ieee", R=64),
            Case("multi_shrink", arch, R=8, dropout=True, **odd),
            Case("multi_shrink_rows", arch, M=64),
            Case("multi_shrink_rows", arch, R=256, fp32_adapters=True, M=64),
            Case("multi_shrink_rows", arch, "fp16", R=8, M=16),
            Case("multi_shrink_rows", arch, "tf32", R=64, M=256),
            Case("multi_shrink_blocks", arch, M=256),
            Case("multi_shrink_blocks", arch, R=256, fp32_adapters=True, M=16),
            Case("multi_shrink_blocks", arch, "fp16", R=8, M=128),
            Case("multi_shrink_blocks", arch, "tf32", R=64, M=256),
            Case("multi_shrink_blocks", arch, R=3, M=100, K=4099),
            *(Case("route_rows", arch, M=rows) for rows in (1, 64, 8192, 16384)),
            Case("route_tables", arch),
            *(Case("route_tables", arch, M=rows) for rows in (64, 300)),
            *(Case(op, arch) for op in ("route_blocks", "route_segments", "route_tiles")),
            Case("multi_grad", arch, dropout=True),
            Case("multi_grad", arch, R=64, fp32_adapters=True),
            Case("multi_grad", arch, "fp16", R=64, dropout=True),
            Case("multi_grad", arch, "tf32", R=64),
            Case("multi_grad", arch, "ieee", R=64, dropout=True),
            Case("multi_grad", arch, R=8, **odd),
            Case("multi_forward", arch, bias=True),
            Case("multi_forward", arch, R=64, fp32_adapters=True),
            Case("multi_forward", arch, R=256),
            Case("multi_forward", arch, "fp16"),
            Case("multi_forward", arch, "tf32"),
            Case("multi_forward", arch, "ieee"),
            Case("multi_forward", arch, R=64, **odd),
            *(Case("multi_forward", arch, R=64, M=rows) for rows in (16, 32, 64, 256)),
            *(Case("multi_forward", arch, R=8, M=rows) for rows in (16, 64, 256)),
            *(Case("multi_forward", arch, M=rows) for rows in (16, 64, 256)),
            Case("multi_forward", arch, "tf32", M=64, N=32768),
            Case("multi_forward", arch, "tf32", M=256),
            Case("multi_forward", arch, R=24, fp32_adapters=True, M=256),
            Case("multi_forward", arch, bias=True, ranks=True),
            Case("multi_forward", arch, R=64, ranks=True, M=1024),
            Case("multi_forward", arch, "fp16", R=8, ranks=True),
            Case("multi_grad_x", arch, ranks=True),
            Case("multi_grad_x", arch, "fp16", R=64, ranks=True, M=1024),
            Case("multi_grad_x", arch, dropout=True, fp32_adapters=True),
            Case("multi_grad_x", arch, R=64),
            Case("multi_grad_x", arch, "fp16", R=64, dropout=True),
            Case("multi_grad_x", arch, "tf32", dropout=True),
            Case("multi_grad_x", arch, "ieee"),
        ]
    for arch in (100, 120):
        found += [Case("merge", arch), Case("merge_many", arch), Case("sliced", arch)]
        found += [Case("dora_norm", arch), Case("dora_forward", arch), Case("dora_grad", arch)]
        found += [Case("multi_forward", arch, M=rows) for rows in (16, 256, 8192)]
        found += [Case("forward", arch, bias=True), Case("grad_x", arch, R=64, dropout=True)]
        found += [Case("shrink", arch, dropout=True), Case("grad_a", arch, R=64, dropout=True)]
        found += [Case("grad_b", arch), Case("forward", arch, "tf32", R=64)]
    return found
