"""Any shape, strides, dtype, probability and set of wanted gradients: fused against the oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora import reference
from fastlora.kernels.config import DROPOUT_LEVELS, dropout_threshold
from fastlora.kernels.lora_shrink import lora_shrink

HAS_CUDA = torch.cuda.is_available()
# On a GPU nearly every example compiles kernels anew: 1, a multiple of 16 and other sizes differ.
EXAMPLES = 12 if HAS_CUDA else 15  # on a GPU nearly every example compiles its kernels
SIDE, RANK = (200, 80) if HAS_CUDA else (70, 20)

PRECISIONS = [
    pytest.param(torch.bfloat16, False, id="bf16"),
    pytest.param(torch.float16, False, id="fp16"),
    pytest.param(torch.float32, False, id="fp32-ieee"),
    pytest.param(torch.float32, True, id="fp32-tf32"),
]
# Down to 0.05 only: below, fp16 gradients become subnormal, in eager too, and no error is relative.
SCALINGS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.05, 4.0), st.floats(-4.0, -0.05))
PS = st.one_of(st.sampled_from([0.0, 2.0**-14, 0.1, 1.0]), st.floats(0.0, 0.99))


@st.composite
def layouts(draw):
    """A function that gives the same 2-D values other strides, a padded or an unaligned start."""
    before, after = draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
    row_step, column_step = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    turned = draw(st.booleans())

    def layout(t):
        rows, columns = (t.t() if turned else t).shape
        # NaN around the values: a read outside them would show.
        wide = t.new_full(
            (row_step * rows + 1, before + column_step * columns + after), float("nan")
        )
        view = wide[: row_step * rows : row_step, before:][:, : column_step * columns : column_step]
        view = view.t() if turned else view
        view.copy_(t)
        return view

    return draw(st.sampled_from([lambda t: t, layout, layout]))


# Multiples of 8 keep the TMA variants in play.
sides = st.one_of(st.integers(1, SIDE), st.integers(1, SIDE // 8).map(lambda n: 8 * n))


@pytest.mark.parametrize(("dtype", "tf32"), PRECISIONS)
def test_fused_is_as_exact_as_eager(oracle, device, dtype, tf32):
    @settings(max_examples=EXAMPLES)
    @given(
        shape=st.tuples(st.integers(0, SIDE), sides, sides, st.integers(1, RANK)),
        fp32_adapters=st.booleans(),
        bias=st.booleans(),
        p=PS,
        scaling=SCALINGS,
        wanted=st.sets(st.sampled_from(["x", "weight", "lora_A", "lora_B", "bias"]), min_size=1),
        everything=st.booleans(),
        relaid=st.dictionaries(st.sampled_from(["x", "weight", "lora_A", "lora_B"]), layouts()),
        dy_layout=layouts(),
        seed=st.integers(0, 2**31),
    )
    def holds(shape, fp32_adapters, bias, p, scaling, wanted, everything, relaid, dy_layout, seed):
        torch.manual_seed(seed)
        case = oracle.make_case(
            *shape,
            dtype,
            device,
            bias=bias,
            adapter_dtype=torch.float32 if fp32_adapters else None,
            dropout_p=p,
            scaling=scaling,
        )
        if not everything:
            wanted = wanted if bias else wanted - {"bias"} or {"x"}
            case = dataclasses.replace(case, wanted=tuple(sorted(wanted)))
        case = case.relaid(**{name: layout(case.tensors[name]) for name, layout in relaid.items()})
        case = dataclasses.replace(case, dy=dy_layout(case.dy))
        if shape[0] == 0:
            got = oracle.run(oracle.fused_call, case)
            assert got["y"].shape == case.dy.shape
            assert not any(grad.any() for name, grad in got.items() if name not in ("x", "y"))
        else:
            oracle.check(case)

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        holds()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_mask_equals_the_reference(device):
    @settings(max_examples=4 * EXAMPLES)
    @given(
        M=st.integers(1, SIDE),
        K=st.integers(1, 3 * SIDE),
        p=st.one_of(PS, st.integers(1, DROPOUT_LEVELS - 1).map(lambda n: n / DROPOUT_LEVELS)),
        seed=st.integers(-(2**63), 2**63 - 1),
    )
    def holds(M, K, p, seed):
        seed = torch.tensor(seed, dtype=torch.int64, device=device)
        x = torch.ones(M, K, dtype=torch.float16, device=device)
        _, mask = lora_shrink(x, x[:1], 1.0, p, seed)
        if mask is None:
            assert dropout_threshold(p) == 0
            return
        lanes = torch.arange(8, dtype=torch.uint8, device=device)
        keep = ((mask[:, :, None] >> lanes) & 1).reshape(M, -1)[:, :K].bool()
        assert torch.equal(keep, reference.dropout_keep_mask(seed, M, K, p, device))

    holds()
