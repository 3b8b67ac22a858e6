"""The dropout mask as the kernels draw it, and its seed, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.kernels.config import DROPOUT_LEVELS, PHILOX_ROUNDS, dropout_threshold

_SEEDS = 2**63 - 1
_MASK_32 = 0xFFFFFFFF
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57


def draw_seed(device: torch.device) -> Tensor:
    """Draw a 0-dim int64 seed from torch's generator of ``device``, without a device sync.

    Drawing it inside forward is what lets activation checkpointing replay the mask, and a captured CUDA
    graph draw a fresh one at every replay. It is an op that torch.compile knows to be random: it is
    neither merged with another draw nor recomputed.
    """
    return torch.randint(_SEEDS, (), device=device)


def _philox_4x32(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32 (Salmon et al., 2011) of counters ``(c0, c1, 0, 0)``, in int64 arithmetic."""
    k0, k1 = seed & _MASK_32, (seed >> 32) & _MASK_32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(PHILOX_ROUNDS):
        # The products wrap around modulo 2**64, which leaves all of their 64 bits right.
        prod_a, prod_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((prod_b >> 32) & _MASK_32) ^ c1 ^ k0
        c2 = ((prod_a >> 32) & _MASK_32) ^ c3 ^ k1
        c1, c3 = prod_b & _MASK_32, prod_a & _MASK_32
        k0, k1 = (k0 + _KEY_A) & _MASK_32, (k1 + _KEY_B) & _MASK_32
    return c0, c1, c2, c3


def dropout_keep_mask(
    seed: Tensor | int,
    M: int,
    K: int,
    p: float,
    device: torch.device | str = "cpu",
    first_row: int = 0,
) -> Tensor:
    """The boolean keep mask ``[M, K]`` that the kernels draw for ``seed``.

    Element ``(m, k)`` owns 16 bits of the Philox block whose counter is ``(k // 8, m)``: lane ``k % 8``,
    low half of word 0 first; the low 14 of them, from which the kernels decide for two elements at once,
    are its draw. It depends on nothing else, so any tiling and the backward agree.

    Args:
        seed (Tensor | int): 64-bit seed, as `draw_seed` gives it.
        M (int): rows of x, its leading dimensions flattened.
        K (int): in_features.
        p (float): probability of dropping an element, rounded to a multiple of 2**-14.
        device (torch.device | str): where the mask is made. Default: ``"cpu"``.
        first_row (int): the row of x that the mask begins with, for a part of it. Default: 0.

    Returns:
        Tensor: bool ``[M, K]``, True where the element is kept.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    # The seed's zero keeps a compiler from folding a constant times an index into 32-bit index arithmetic.
    groups = (torch.arange((K + 7) // 8, device=device) + (seed & 0)).expand(M, -1)
    rows = torch.arange(first_row, first_row + M, device=device)[:, None].expand_as(groups)
    words = torch.stack(_philox_4x32(seed, groups, rows), dim=-1)  # [M, K/8, 4]
    draws = torch.stack((words, words >> 16), dim=-1) & (DROPOUT_LEVELS - 1)  # [M, K/8, 4, 2]
    return draws.reshape(M, 8 * groups.shape[-1])[:, :K] >= dropout_threshold(p)
