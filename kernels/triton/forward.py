"""y = gain ∘ (x Wᵀ + scaling · (dropout(x) Aᵀ) Bᵀ) + bias in one launch."""

import functools

import torch
import triton
import triton.language as tl

from fusedlora import tuning
from fusedlora.config import Config, DecodeConfig, ForwardConfig, Problem, check_for
from fusedlora.dropout import launch_dropout
from fusedlora.kernels.common import (
    CONVERTED,
    TICKET,
    begin_early,
    conversions,
    leave,
    shrink_tasks,
    wait_for,
)
from fusedlora.kernels.decode import decode_plan
from fusedlora.kernels.launch import (
    Launcher,
    LaunchPlan,
    alignment,
    common_constants,
    device_facts,
    num_terms,
    separate,
)
from fusedlora.kernels.tiles import lora_tiles
from fusedlora.memory import Workspace, device_memory, row_major, skinny_rows
from fusedlora.schedule import SCHEDULED, forward_schedule


@triton.jit(do_not_specialize=["M", "scaling", *SCHEDULED, "seed", "threshold"])
def forward_kernel(
    # x [M, K], W [N, K], A [r, K], B [N, r]; each None or: bias [N], gain [N] fp32, scale []
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, gain_ptr, scale_ptr,
    # outputs: y [M, N], and S [M, r] or None
    y_ptr, s_ptr,
    # workspaces: with TERMS terms of A and B, then with more than one also of S, in x's dtype; synchronisation words
    terms_ptr, sync_ptr,
    M, N, K, r,
    stride_xm, stride_wn, stride_ar, stride_bn,
    scaling, num_tasks, shared_blocks, side_programs, tile_programs,
    # with DROPOUT: a number or an address, and the least hash that is kept
    seed, threshold,
    DROPOUT: tl.constexpr, CONVERT: tl.constexpr, SHRINK: tl.constexpr, TILES: tl.constexpr,
    TERMS: tl.constexpr, PRECISION: tl.constexpr, R_ALIGN: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_K: tl.constexpr,
    SHRINK_M: tl.constexpr, SHRINK_K: tl.constexpr, SHRINK_STAGES: tl.constexpr, IN_TILES: tl.constexpr,
    FLAT: tl.constexpr, DELAY: tl.constexpr,
):  # fmt: skip
    """S = scaling · scale · x Aᵀ, rounded once to S's dtype; y = gain ∘ (x Wᵀ + S Bᵀ) + bias, one fp32 accumulator.

    SHRINK computes S in `num_tasks` tasks before the tiles and `side_programs` beside them, TILES computes y on
    `tile_programs` programs; with both a tile waits for its rows of S. With IN_TILES every tile computes its rows of S
    by itself and nothing but terms is waited for. TERMS: A and B are fp32 beside a 16-bit x, and
    CONVERT writes their terms. R_ALIGN divides r and stride_bn.
    """
    begin_early(EARLY)
    r = r // R_ALIGN * R_ALIGN
    stride_bn = stride_bn // R_ALIGN * R_ALIGN
    if scale_ptr is not None:
        scaling *= tl.load(scale_ptr).to(tl.float32)
    small_ptr = s_ptr
    if TERMS > 0:
        a_terms_ptr = terms_ptr
        b_terms_ptr = terms_ptr + TERMS * r * K
        if TERMS > 1:
            small_ptr = b_terms_ptr + TERMS * r * N
        if CONVERT:
            ticket, first_ticket = conversions(
                sync_ptr, a_ptr, b_ptr, None, a_terms_ptr, b_terms_ptr, None, r * K, r * N, 0, TERMS, DELAY
            )
        a_ptr = a_terms_ptr
        b_ptr = b_terms_ptr
    if SHRINK:
        if not CONVERT:
            ticket = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
            first_ticket = 0
        src_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [SHRINK_M, SHRINK_K])
        place = shrink_tasks(
            ticket, first_ticket, src_desc, a_ptr, s_ptr, small_ptr, sync_ptr, None, None, M, K, r, stride_ar, 1,
            scaling, num_tasks, shared_blocks, side_programs, seed, threshold, False, DROPOUT, TERMS, PRECISION,
            BLOCK_M, BLOCK_R, SHRINK_M, SHRINK_K, SHRINK_STAGES, DELAY,
        )  # fmt: skip
    elif CONVERT:
        place = ticket - first_ticket
    else:
        place = tl.program_id(0)
    if TILES:
        if place < tile_programs:
            if IN_TILES and CONVERT:
                wait_for(sync_ptr + CONVERTED, first_ticket)
            x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
            w_desc = tl.make_tensor_descriptor(w_ptr, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
            y_desc = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
            num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
            lora_tiles(
                place, tl.cdiv(max(num_tiles - place, 0), tile_programs), tile_programs,
                num_tasks + side_programs, False,
                x_desc, w_desc, y_desc, small_ptr, b_ptr, sync_ptr,
                a_ptr if IN_TILES else None, stride_ar, scaling, gain_ptr, bias_ptr,
                M, N, K, r, 1, stride_bn, None, None,
                x_ptr.dtype.element_ty, True, SHRINK, 0, TERMS, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, BLOCK_R, RANK_K, SHRINK_M, FLAT, DELAY,
            )  # fmt: skip
    if SHRINK or CONVERT:
        leave(sync_ptr, M, BLOCK_M, SHRINK_M, DELAY)


@functools.lru_cache(maxsize=4096)
def _plan(
    device: torch.device,
    facts: tuple[int, int],
    sizes: tuple[int, int, int, int],
    strides: tuple[int, int],
    dtype: torch.dtype,
    param_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout: bool,
    save_s: bool,
    tiles: bool,
    config: Config | None,
    tuned: bool,
    one_launch: bool,
    specialised: object,
) -> LaunchPlan | None:
    """`specialised` is what else Triton compiles for: other dtypes, alignment, which tensors there are."""
    M, N, K, r = sizes
    terms = num_terms(param_dtype, adapter_dtype, dtype)
    problem = Problem(M, N, K, r, dtype.itemsize, terms > 1, *facts, dropout)
    config = config or tuning.choose("forward", problem, device, tuned)[0]
    if not tiles and (isinstance(config, DecodeConfig) or config.IN_TILES):
        return None
    if isinstance(config, DecodeConfig):
        return decode_plan(device, problem, config, strides, terms, save_s)
    assert isinstance(config, ForwardConfig)
    check_for(problem, config)
    schedule = forward_schedule(problem, config, tiles)
    constants = common_constants(r, facts[0], terms, dropout) | vars(config)
    phases = [{"CONVERT": terms > 0, "SHRINK": not config.IN_TILES, "TILES": tiles}]
    if not one_launch:
        phases = separate(phases[0])
    own_s = () if save_s else (None if config.IN_TILES else (adapter_dtype, M * r),)
    terms_size = terms * r * (K + N) + (terms * M * r if terms > 1 else 0)
    return LaunchPlan(
        tuple(Launcher(forward_kernel, schedule.num_programs, device, constants | phase) for phase in phases),
        device_memory(device),
        Workspace(*own_s, (dtype, terms_size) if terms else None),
        schedule.num_words,
        (*sizes, *strides, K, r),
        schedule.counts,
    )


def forward_plan(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    scale: torch.Tensor | None,
    gain: torch.Tensor | None,
    seed: torch.Tensor | None,
    adapter_dtype: torch.dtype,
    save_s: bool,
    tiles: bool = True,
    config: Config | None = None,
    one_launch: bool,
) -> LaunchPlan | None:
    """The launch for these tensors, x [M, K] as `row_major` and lora_A and lora_B as `skinny_rows` give them.

    It serves all tensors that have their shapes, strides, dtypes and device, and addresses aligned to 16 bytes alike.
    Without `tiles` S alone, with y None, in the same bits; None where no launch does that.
    """
    device = x.device
    sizes = (*x.shape[:1], *weight.shape, lora_A.shape[0])
    dtypes = (x.dtype, lora_A.dtype, adapter_dtype)
    optional = [None if tensor is None else tensor.dtype for tensor in (bias, scale)]
    specialised = (*optional, gain is None, seed is None or seed.is_cuda, alignment(lora_A, lora_B, bias, gain, scale))
    strides = (x.stride(0), weight.stride(0))
    facts = device_facts(device)
    return _plan(
        device, facts, sizes, strides, *dtypes, seed is not None, save_s, tiles,
        config, tuning.in_use(), one_launch, specialised,
    )  # fmt: skip


def lora_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    scaling: float,
    scale: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    adapter_dtype: torch.dtype,
    save_s: bool,
    config: Config | None = None,
    one_launch: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launches the forward kernel.

    Args:
        x: [M, K], bf16, fp16 or fp32. Copied where a descriptor can't read it (see `row_major`).
        weight: [N, K] of x's dtype, rows readable by a descriptor.
        lora_A, lora_B: [r, K] and [N, r], x's dtype or fp32, r ≤ 256.
        bias: [N] of x's dtype or fp32, or None.
        scaling: multiplies S in fp32, before its one rounding.
        scale: [], multiplies scaling, read on the device; None is 1.
        gain: [N] fp32, multiplies y before the bias; None is 1.
        seed: [1] int64 on the CPU or on x's device: of the dropout mask on the adapter's x; None is no dropout.
        dropout_p: its rate.
        adapter_dtype: dtype of S and of the adapter's products: x's, or fp32 to keep fp32 adapters' precision.
        save_s: whether S is wanted back.
        config: tile sizes, a DecodeConfig for the decode kernel; None takes a tuned table's or the heuristic's.
        one_launch: False computes S, and before it terms, in launches of their own; nothing waits for anything.

    Returns:
        y [M, N] of x's dtype and S [M, r] of `adapter_dtype` (None unless `save_s`).
    """
    M, N, r = x.shape[0], weight.shape[0], lora_A.shape[0]
    y = x.new_empty(M, N)
    s = x.new_empty(M, r, dtype=adapter_dtype) if save_s else None
    if M > 0:
        x, lora_A, lora_B = row_major(x), skinny_rows(lora_A), skinny_rows(lora_B)
        bias = None if bias is None else bias.contiguous()
        gain = None if gain is None else gain.contiguous()
        plan = forward_plan(
            x,
            weight,
            lora_A,
            lora_B,
            bias,
            scale=scale,
            gain=gain,
            seed=seed,
            adapter_dtype=adapter_dtype,
            save_s=save_s,
            config=config,
            one_launch=one_launch,
        )
        assert plan is not None
        tensors = (x, weight, lora_A, lora_B, bias, gain, scale, y)
        plan.launch(tensors if s is None else (*tensors, s), *launch_dropout(seed, dropout_p, scaling))
    return y, s
