"""Other libraries' block-sparse kernels on our lists; each is skipped where it is not installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.flex import FlexLists, TileOrder, block_map, lists_of_map, tile_order
from benchmarks.gpu.machine import missing
from benchmarks.gpu.stage import SkippedError
from veda_compile.kernels.call import AttentionCall, Selection

_WORKSPACE_BYTES = 128 * 2**20
_FLASHINFER_ROWS = 32_768  # of all heads together: its plan's buffer of lengths


@dataclass(frozen=True)
class Prepared:
    """A kernel ready to run. restore: its output to (B, H, N, D). plan_ms: spent on preparing its
    lists, the host's work included."""

    run: Callable[[], torch.Tensor]
    restore: Callable[[torch.Tensor], torch.Tensor]
    plan_ms: float


@dataclass(frozen=True)
class Rival:
    """One library. tile_size: what it is built for, or None where it takes ours."""

    name: str
    module: str
    tile_size: int | None
    prepare: Callable[[AttentionCall, Selection], Prepared]

    def require(self, device: str) -> None:
        """Raise SkippedError where it cannot run."""
        reason = missing(self.module)
        if reason is None and device != "cuda":
            reason = f"{self.name} needs a GPU"
        if reason is not None:
            raise SkippedError(reason)


def _flex_flash(call: AttentionCall, selection: Selection) -> Prepared:
    """FlexAttention on flash-attn-4's kernels."""
    order = tile_order(call)
    lists = FlexLists(order, call.plan.tile_size, {"BACKEND": "FLASH"})
    began = time.perf_counter()
    mask = lists.mask(block_map(call, selection, order))
    plan_ms = _milliseconds_since(began)
    q, k, v = (order.sort(x) for x in (call.q, call.k, call.v))
    return Prepared(lambda: lists.run(q, k, v, call.scale, mask), order.restore, plan_ms)


def _flashinfer(call: AttentionCall, selection: Selection) -> Prepared:
    """Blocks of variable size: no padding."""
    import flashinfer

    order = tile_order(call)
    places = order.real.nonzero()[:, 0]
    tokens = order.tokens[places]
    back = torch.argsort(tokens)
    batch, heads, length, head_dim = call.q.shape
    count = batch * heads
    if count * len(order.sizes) > _FLASHINFER_ROWS:
        raise SkippedError(f"flashinfer plans {_FLASHINFER_ROWS} rows of tiles, not more")
    kept = block_map(call, selection, order).flatten(0, 1)
    sizes = order.sizes.expand(count, -1).contiguous()
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=call.q.device)
    wrapper = flashinfer.sparse.VariableBlockSparseAttentionWrapper(workspace, backend="auto")
    began = time.perf_counter()
    wrapper.plan(
        block_mask_map=kept,
        block_row_sz=sizes,
        block_col_sz=sizes,
        num_qo_heads=count,
        num_kv_heads=count,
        head_dim=head_dim,
        sm_scale=call.scale,
        q_data_type=call.q.dtype,
    )
    plan_ms = _milliseconds_since(began)
    q, k, v = (x.index_select(2, tokens).flatten(0, 1) for x in (call.q, call.k, call.v))

    def restore(out: torch.Tensor) -> torch.Tensor:
        return out.view(batch, heads, length, head_dim).index_select(2, back)

    return Prepared(lambda: wrapper.run(q, k, v), restore, plan_ms)


def _fastvideo(call: AttentionCall, selection: Selection) -> Prepared:
    """Video sparse attention's kernel: tiles of 64, padded."""
    from fastvideo_kernel.block_sparse_attn import block_sparse_attn_from_indices

    order: TileOrder = tile_order(call)
    began = time.perf_counter()
    counts, indices = lists_of_map(block_map(call, selection, order))
    plan_ms = _milliseconds_since(began)
    q, k, v = (order.sort(x) for x in (call.q, call.k, call.v))
    return Prepared(
        lambda: block_sparse_attn_from_indices(q, k, v, indices, counts, order.sizes)[0],
        order.restore,
        plan_ms,
    )


def _cudnn(call: AttentionCall, selection: Selection) -> Prepared:
    """cuDNN frontend's block-sparse attention: tiles of 64, padded."""
    from cudnn import BSA

    order = tile_order(call)
    began = time.perf_counter()
    counts, indices = lists_of_map(block_map(call, selection, order))
    plan_ms = _milliseconds_since(began)
    q, k, v = (order.sort(x) for x in (call.q, call.k, call.v))

    def run() -> torch.Tensor:
        out: torch.Tensor = BSA.block_sparse_attention_forward(
            q,
            k,
            v,
            indices,
            block_sizes=order.sizes,
            q2k_block_nums=counts,
            sparse_block_size=64,
            softmax_scale=call.scale,
            layout="bhsd",
        )["o_tensor"]
        return out

    return Prepared(run, order.restore, plan_ms)


def _flash(call: AttentionCall, selection: Selection) -> Prepared:
    """flash-attn-4's own block sparsity. It masks no padding: every tile must be whole."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    order = tile_order(call)
    size = call.plan.tile_size
    if not bool((order.sizes == size).all()):
        raise SkippedError("flash-attn-4 takes whole tiles alone; FlexAttention on it takes all")
    began = time.perf_counter()
    counts, indices = lists_of_map(block_map(call, selection, order))
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(size, size),
    )
    plan_ms = _milliseconds_since(began)
    q, k, v = (order.sort(x).transpose(1, 2) for x in (call.q, call.k, call.v))

    def run() -> torch.Tensor:
        out = flash_attn_func(q, k, v, softmax_scale=call.scale, block_sparse_tensors=lists)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return Prepared(run, order.restore, plan_ms)


def _milliseconds_since(began: float) -> float:
    torch.cuda.synchronize()
    return round(1e3 * (time.perf_counter() - began), 3)


RIVALS = {
    rival.name: rival
    for rival in (
        Rival("cudnn block-sparse", "cudnn", 64, _cudnn),
        Rival("fastvideo-kernel", "fastvideo_kernel", 64, _fastvideo),
        Rival("flash-attn-4 block-sparse", "flash_attn", 128, _flash),
        Rival("flex on flash-attn-4", "flash_attn", None, _flex_flash),
        Rival("flashinfer", "flashinfer", None, _flashinfer),
    )
}
"""By name."""
