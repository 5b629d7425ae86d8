"""A low-rank form of the score's second-order term, fitted in closed form.

The term is a . b with a = E[q^2] of a query tile and b = Var(k) of a key tile. Over all pairs of
tiles the rank-r form (a F_q) . (b F_k) with the least squared error follows from the moments of a
and b alone: with A = E[a a^T] and B = Cov(b) (what is the same for all key tiles of a row does not
change which are chosen) it is the truncated singular value decomposition of A^1/2 B^1/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-12


class SpreadMoments:
    """Sums of a a^T and of centred b b^T for every head of a layer, float64 on CPU.

    left, right: (H, D, D). count: samples seen.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        self.left = torch.zeros((heads, head_dim, head_dim), dtype=torch.float64, device="cpu")
        self.right = torch.zeros_like(self.left)
        self.count = 0

    def add(self, heads: list[int], second: Tensor, variance: Tensor) -> None:
        """second, variance: (B, h, n, D) of query and key tiles of `heads`; see TileStatistics."""
        centred = variance - variance.mean(2, keepdim=True)
        for sums, x in ((self.left, second), (self.right, centred)):
            x = x.double()
            product = torch.einsum("bhnd,bhne->hde", x, x) / (x.shape[0] * x.shape[2])
            sums[heads] += product.cpu()
        self.count += 1

    def factors(self, rank: int) -> Tensor:
        """(2, H, D, rank) float32, as `Plan.factors` takes them."""
        left, left_inverse = _roots(self.left)
        right, right_inverse = _roots(self.right)
        u, values, vt = torch.linalg.svd(left @ right)
        weight = values[:, None, :rank].sqrt()
        f_q = left_inverse @ (u[..., :rank] * weight)
        f_k = right_inverse @ (vt[:, :rank].transpose(1, 2) * weight)
        return torch.stack([f_q, f_k]).float()


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and pseudo-inverse square root of symmetric positive matrices (H, D, D)."""
    values, vectors = torch.linalg.eigh(moments)
    least = _LEAST * values[:, -1:].clamp(min=_LEAST)
    real = values > least
    root = values.clamp(min=0.0).sqrt()
    inverse = torch.where(real, 1.0 / values.clamp(min=_LEAST).sqrt(), 0.0)
    return (
        (vectors * root[:, None]) @ vectors.transpose(1, 2),
        (vectors * inverse[:, None]) @ vectors.transpose(1, 2),
    )
