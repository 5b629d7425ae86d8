"""The reference executor: float32 attention under a dense token mask. It defines correctness."""

from __future__ import annotations

import torch

from .call import DTYPES, AttentionCall, Selection, empty_output
from .executors import YES, Answer, Traits
from .selection import kept_map, select_tiles
from .tiles import tile_table


class ReferenceExecutor:
    """Plain torch on any device, O(N^2) memory per head: for checking, not for speed."""

    name = "reference"

    def verify(self, traits: Traits) -> Answer:
        """Any device, head_dim and tile size; see `Executor.verify`."""
        if traits.dtype not in DTYPES:
            return Answer(False, f"dtype {traits.dtype}: must be float32, float16 or bfloat16")
        return YES

    def select(self, call: AttentionCall) -> Selection:
        """`select_tiles`."""
        return select_tiles(call)

    def attend(
        self, call: AttentionCall, selection: Selection
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact softmax over the kept tokens. A row without any key gives 0 and LSE -inf."""
        out = empty_output(call.q)
        lse = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
        for head in range(call.q.shape[1]):
            mask = _token_mask(call, selection, head)
            kv_head = head // call.kv_repeat
            logits = call.q[:, head].float() @ call.k[:, kv_head].float().transpose(1, 2)
            logits = (logits * call.scale).masked_fill(~mask, -torch.inf)
            lse[:, head] = torch.logsumexp(logits, dim=-1)
            weights = torch.exp(logits - lse[:, head, :, None])
            # -inf - -inf is NaN where no key is kept; such rows are zero
            weights = weights.masked_fill(~mask, 0.0)
            value = call.v[:, kv_head].float()
            if call.key_valid is not None:  # 0 * NaN is NaN: padding must not leak through v
                value = value.masked_fill(~call.key_valid[..., None], 0.0)
            out[:, head] = (weights @ value).to(call.q.dtype)
        return out, lse


def _token_mask(call: AttentionCall, selection: Selection, head: int) -> torch.Tensor:
    """(B, Nq, Nk) bool: may a query attend to a key. Tokens without a grid may, both ways."""
    table = tile_table(call.layout, call.plan.tile_shapes[head], call.q.device)
    keep = kept_map(selection, [head], table.tiles)[:, 0]
    q_tile, k_tile = table.tile_of_query.long(), table.tile_of_token.long()
    mask = keep[:, q_tile.clamp(min=0)][:, :, k_tile.clamp(min=0)]
    mask = mask | (q_tile < 0)[:, None] | (k_tile < 0)
    if call.key_valid is not None:
        mask = mask & call.key_valid[:, None, :]
    return mask
