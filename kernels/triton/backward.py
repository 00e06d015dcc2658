"""dX = dy W + T A, dA = Tᵀ x and dB = dyᵀ S, with T = scaling · dy B, in one launch."""

import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fusedlora import tuning
from fusedlora.config import BackwardConfig, Problem, cdiv, check_for
from fusedlora.dropout import launch_dropout
from fusedlora.kernels.common import (
    CONVERTED,
    DONE,
    JOB,
    PROGRESS,
    TICKET,
    begin_early,
    conversions,
    leave,
    published,
    shrink_tasks,
    wait_for,
)
from fusedlora.kernels.jobs import REDUCE_SIZE, run_job
from fusedlora.kernels.launch import (
    Launcher,
    LaunchPlan,
    alignment,
    common_constants,
    device_facts,
    num_terms,
    separate,
)
from fusedlora.kernels.tiles import lora_tile, lora_tiles
from fusedlora.memory import Workspace, device_memory, row_major, skinny_rows
from fusedlora.schedule import SCHEDULED, backward_schedule, takes_turns


@triton.jit(do_not_specialize=["M", "scaling", *SCHEDULED, "parts", "job_period", "seed", "threshold"])
def backward_kernel(
    # gradient of the output: dy [M, N]
    dy_ptr,
    # saved from forward: x [M, K], S [M, r]; parameters: W [N, K], A [r, K], B [N, r]; None or scale []
    x_ptr, s_ptr, w_ptr, a_ptr, b_ptr, scale_ptr,
    # outputs: dX [M, K], dA [r, K], dB [N, r]
    dx_ptr, da_ptr, db_ptr,
    # None, or DoRA's: dm [N]; y [M, N], gain [N], norm [N], and of these the bias [N] or None
    dm_ptr, y_ptr, gain_ptr, norm_ptr, bias_ptr,
    # workspaces: T [M, r]; partial sums of dA and dB: [parts, K · r] and [parts or row blocks, N · r], and of dm
    # [parts, N]; with TERMS terms of A and B, then with more than one of T (in place of t_ptr's) and S, in dy's dtype;
    # synchronisation words
    t_ptr, da_partial_ptr, db_partial_ptr, dm_partial_ptr, terms_ptr, sync_ptr,
    M, N, K, r,
    stride_ym, stride_xm, stride_wn, stride_ar, stride_bn,
    scaling, num_tasks, shared_blocks, side_programs, tile_programs, parts, job_period,
    # with DROPOUT: a number or an address, and the least hash that is kept
    seed, threshold,
    DROPOUT: tl.constexpr, LEAST: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DA: tl.constexpr, NEED_DB: tl.constexpr,
    CONVERT: tl.constexpr, SHRINK: tl.constexpr, REST: tl.constexpr, FUSE_DB: tl.constexpr, TURNS: tl.constexpr,
    TERMS: tl.constexpr, PRECISION: tl.constexpr, PARTIALS: tl.constexpr, R_ALIGN: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_R: tl.constexpr, RANK_K: tl.constexpr,
    SHRINK_M: tl.constexpr, SHRINK_K: tl.constexpr, SHRINK_STAGES: tl.constexpr,
    STRIPE_N: tl.constexpr, STRIPE_M: tl.constexpr, STRIPE_STAGES: tl.constexpr,
    FLAT: tl.constexpr, DELAY: tl.constexpr,
):  # fmt: skip
    """T = scaling · scale · dy B, rounded once; dX = dy W + T A in one fp32 accumulator; dA = Tᵀ x; dB = dyᵀ S.

    SHRINK computes T in `num_tasks` tasks before the tiles and `side_programs` beside them, REST everything else; with
    both, tiles wait for their rows of T and the jobs of dA for all of it. A program computes its tiles, if its place is
    below `tile_programs`, and then takes jobs until none is left; with TURNS and a `job_period` it also takes one after
    every so many of its tiles, programs at different times. So jobs run while others compute: tiles leave memory idle.
    With FUSE_DB the shrink tasks form dB from the same read of dy, a partial sum for each row block, and the jobs of
    dB only add these up; without, they are stripes like dA's. With DoRA's tensors the gain is on the rows of W and B
    already; dB's stripes put it on theirs, and form dm where |gain| is not below LEAST. TERMS: A and B are fp32 beside
    a 16-bit dy, and CONVERT writes their terms.
    """
    begin_early(EARLY)
    r = r // R_ALIGN * R_ALIGN
    stride_bn = stride_bn // R_ALIGN * R_ALIGN
    if scale_ptr is not None:
        scaling *= tl.load(scale_ptr).to(tl.float32)
    planes_ptr = t_ptr
    first_ticket = 0
    if TERMS > 0:
        a_terms_ptr = terms_ptr
        b_terms_ptr = terms_ptr + TERMS * r * K
        s_terms_ptr = None
        # Only dX reads A, and only T reads B.
        a_size = r * K if NEED_DX else 0
        b_size = r * N if NEED_DX or NEED_DA else 0
        s_size = 0
        if TERMS > 1:
            planes_ptr = b_terms_ptr + TERMS * r * N
            if NEED_DB:
                s_terms_ptr = planes_ptr + TERMS * tl.cast(M, tl.int64) * r
                s_size = M * r
        if CONVERT:
            ticket, first_ticket = conversions(
                sync_ptr,
                a_ptr,
                b_ptr,
                s_ptr,
                a_terms_ptr,
                b_terms_ptr,
                s_terms_ptr,
                a_size,
                b_size,
                s_size,
                TERMS,
                DELAY,
            )
        a_ptr = a_terms_ptr
        b_ptr = b_terms_ptr
        if TERMS > 1:
            t_ptr = None
            if NEED_DB:
                s_ptr = s_terms_ptr
    if SHRINK:
        if not CONVERT:
            ticket = tl.atomic_add(sync_ptr + TICKET, 1, sem="relaxed")
        src_desc = tl.make_tensor_descriptor(dy_ptr, [M, N], [stride_ym, 1], [SHRINK_M, SHRINK_K])
        place = shrink_tasks(
            ticket, first_ticket, src_desc, b_ptr, t_ptr, planes_ptr, sync_ptr, s_ptr, db_partial_ptr,
            M, N, r, 1, stride_bn, scaling, num_tasks, shared_blocks, side_programs, None, None,
            FUSE_DB, 0, TERMS, PRECISION,
            BLOCK_M, BLOCK_R, SHRINK_M, SHRINK_K, SHRINK_STAGES, DELAY,
        )  # fmt: skip
    elif CONVERT:
        place = ticket - first_ticket
    else:
        place = tl.program_id(0)
    if REST:
        x_stripes = None
        dy_stripes = None
        y_stripes = None
        db_jobs = 0
        da_jobs = 0
        all_of_t = num_tasks + side_programs
        if NEED_DX:
            dy_desc = tl.make_tensor_descriptor(dy_ptr, [M, N], [stride_ym, 1], [BLOCK_M, BLOCK_K])
            w_desc = tl.make_tensor_descriptor(w_ptr, [N, K], [stride_wn, 1], [BLOCK_K, BLOCK_N])
            dx_desc = tl.make_tensor_descriptor(dx_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_N])
            tiles_left = tl.cdiv(M, BLOCK_M) * tl.cdiv(K, BLOCK_N) - place
            tiles_left = tl.cdiv(max(tiles_left, 0), tile_programs) if place < tile_programs else 0
            if not TURNS:
                lora_tiles(
                    place, tiles_left, tile_programs, all_of_t, False,
                    dy_desc, w_desc, dx_desc, planes_ptr, a_ptr, sync_ptr, None, None, None, None, None,
                    M, K, N, r, stride_ar, 1, seed, threshold,
                    dy_ptr.dtype.element_ty, False, SHRINK, DROPOUT, TERMS, PRECISION,
                    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, BLOCK_R, RANK_K, SHRINK_M, FLAT, DELAY,
                )  # fmt: skip
        if NEED_DB:
            if FUSE_DB:
                db_jobs = tl.cdiv(N * r, REDUCE_SIZE)
            else:
                dy_stripes = tl.make_tensor_descriptor(dy_ptr, [M, N], [stride_ym, 1], [STRIPE_M, STRIPE_N])
                if y_ptr is not None:
                    y_stripes = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [STRIPE_M, STRIPE_N])
                db_jobs = tl.cdiv(N, STRIPE_N) * parts
        if NEED_DA:
            x_stripes = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_xm, 1], [STRIPE_M, STRIPE_N])
            da_jobs = tl.cdiv(K, STRIPE_N) * parts
        arrived_ptr = sync_ptr + PROGRESS + tl.cdiv(M, max(BLOCK_M, SHRINK_M))
        # Stripes of dB need no T, so they come before dA's; sums of partial ones come after.
        first_da = 0 if FUSE_DB else db_jobs
        first_db = da_jobs if FUSE_DB else 0
        if TURNS:
            jobs_left = da_jobs + db_jobs > 0
            ready = False  # whether all of T is known to be there
            tile = place
            until_turn = place % job_period if job_period > 0 else tiles_left  # tiles
            # A `for`, in which triton 3.6 lets a store end while jobs run. One step past the tiles takes the jobs left.
            for _ in range(tiles_left + 1):
                count = min(tiles_left, 1)
                if FLAT:
                    count = min(tiles_left, max(until_turn, 0) + 1) if jobs_left else tiles_left
                if count > 0:
                    if FLAT:
                        ready = lora_tiles(
                            tile, count, tile_programs, all_of_t, ready,
                            dy_desc, w_desc, dx_desc, planes_ptr, a_ptr, sync_ptr, None, None, None, None, None,
                            M, K, N, r, stride_ar, 1, seed, threshold,
                            dy_ptr.dtype.element_ty, False, SHRINK, DROPOUT, TERMS, PRECISION,
                            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, BLOCK_R, RANK_K, SHRINK_M, True, DELAY,
                        )  # fmt: skip
                    else:
                        lora_tile(
                            tile, dy_desc, w_desc, dx_desc, planes_ptr, a_ptr, sync_ptr, None, None, None, None, None,
                            M, K, N, r, stride_ar, 1, seed, threshold,
                            dy_ptr.dtype.element_ty, False, SHRINK, DROPOUT, TERMS, PRECISION,
                            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, BLOCK_R, RANK_K, SHRINK_M, DELAY,
                        )  # fmt: skip
                tile += count * tile_programs
                tiles_left -= count
                until_turn -= count
                free = tiles_left == 0
                turn = jobs_left
                if not free:
                    turn = jobs_left and until_turn < 0
                    if SHRINK:
                        if turn and not ready:  # nobody with tiles left waits for a job
                            ready = published(sync_ptr + DONE) >= all_of_t
                            turn = ready
                while turn:
                    until_turn += job_period
                    job = tl.atomic_add(sync_ptr + JOB, 1, sem="relaxed")
                    jobs_left = job < da_jobs + db_jobs
                    turn = jobs_left and free
                    if not ready:
                        if CONVERT and NEED_DB:
                            wait_for(sync_ptr + CONVERTED, first_ticket)
                        if SHRINK:
                            if FUSE_DB or job >= first_da:
                                wait_for(sync_ptr + DONE, all_of_t)
                                ready = True
                    run_job(
                        job, first_da, da_jobs, first_db, db_jobs, parts,
                        x_stripes, dy_stripes, y_stripes, planes_ptr, s_ptr, da_ptr, db_ptr,
                        da_partial_ptr, db_partial_ptr, arrived_ptr,
                        gain_ptr, norm_ptr, bias_ptr, dm_ptr, dm_partial_ptr,
                        M, N, K, r, seed, threshold,
                        NEED_DA, NEED_DB, FUSE_DB, LEAST, DROPOUT, TERMS, PRECISION, PARTIALS,
                        BLOCK_R, SHRINK_M, STRIPE_N, STRIPE_M, STRIPE_STAGES,
                    )  # fmt: skip
        else:
            if SHRINK and FUSE_DB:
                wait_for(sync_ptr + DONE, all_of_t)
            if CONVERT and NEED_DB:
                wait_for(sync_ptr + CONVERTED, first_ticket)
            job = tl.atomic_add(sync_ptr + JOB, 1, sem="relaxed")
            waited = job >= da_jobs + db_jobs
            while job < da_jobs + db_jobs:
                if NEED_DA and SHRINK and not FUSE_DB:
                    if job >= first_da and not waited:
                        wait_for(sync_ptr + DONE, all_of_t)
                        waited = True
                run_job(
                    job, first_da, da_jobs, first_db, db_jobs, parts,
                    x_stripes, dy_stripes, y_stripes, planes_ptr, s_ptr, da_ptr, db_ptr,
                    da_partial_ptr, db_partial_ptr, arrived_ptr, gain_ptr, norm_ptr, bias_ptr, dm_ptr, dm_partial_ptr,
                    M, N, K, r, seed, threshold,
                    NEED_DA, NEED_DB, FUSE_DB, LEAST, DROPOUT, TERMS, PRECISION, PARTIALS,
                    BLOCK_R, SHRINK_M, STRIPE_N, STRIPE_M, STRIPE_STAGES,
                )  # fmt: skip
                job = tl.atomic_add(sync_ptr + JOB, 1, sem="relaxed")
    leave(sync_ptr, M, BLOCK_M, SHRINK_M, DELAY)


DORA_STRIPES = {"STRIPE_N": 128, "STRIPE_M": 64, "STRIPE_STAGES": 3}


@dataclasses.dataclass(frozen=True)
class Dora:
    """dm [N] for columns with |gain| ≥ least, and what it is made of: y [M, N], gain and norm [N], bias [N] or None."""

    dm: torch.Tensor
    y: torch.Tensor
    gain: torch.Tensor
    norm: torch.Tensor
    bias: torch.Tensor | None
    least: float

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.dm, self.y, self.gain, self.norm, self.bias


def beside_dora(config: BackwardConfig) -> BackwardConfig:
    """For DoRA's tensors: stripes of dB read y beside dy, into the same shared memory."""
    stripe = {name: min(getattr(config, name), most) for name, most in DORA_STRIPES.items()}
    return dataclasses.replace(config, FUSE_DB=False, **stripe)


@functools.lru_cache(maxsize=4096)
def _plan(
    device: torch.device,
    facts: tuple[int, int],
    sizes: tuple[int, int, int, int],
    strides: tuple[int, int, int],
    dtype: torch.dtype,
    param_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
    least: float | None,
    dropout: bool,
    config: BackwardConfig | None,
    tuned: bool,
    one_launch: bool,
    specialised: object,
) -> LaunchPlan:
    """`least` is None without DoRA's tensors.

    `specialised` is what else Triton compiles for: other dtypes, alignment, which tensors there are.
    """
    M, N, K, r = sizes
    need_dx, need_dA, need_dB = needs
    terms = num_terms(param_dtype, adapter_dtype, dtype)
    problem = Problem(M, K, N, r, dtype.itemsize, terms > 1, *facts, dropout)
    config = config or tuning.choose("backward", problem, device, tuned)[0]
    check_for(problem, config)
    if least is not None:
        config = beside_dora(config)
    schedule = backward_schedule(problem, config, *needs, dora=least is not None)
    parts = schedule.parts
    needs_t = need_dx or need_dA
    fuse_db = config.FUSE_DB and need_dB and needs_t and terms <= 1
    db_sums = cdiv(M, config.SHRINK_M) if fuse_db else parts if parts > 1 else 0
    constants = common_constants(r, facts[0], terms, dropout) | {
        "NEED_DX": need_dx,
        "NEED_DA": need_dA,
        "NEED_DB": need_dB,
        "PARTIALS": parts > 1,
        "LEAST": least,
        **{name: value for name, value in vars(config).items() if name != "stripe_rows"},
        "FUSE_DB": fuse_db,
        "TURNS": need_dx and takes_turns(problem, least is not None),
    }
    phases = [{"CONVERT": terms > 0, "SHRINK": needs_t, "REST": True}]
    if not one_launch:
        phases = separate(phases[0])
    return LaunchPlan(
        tuple(Launcher(backward_kernel, schedule.num_programs, device, constants | phase) for phase in phases),
        device_memory(device),
        Workspace(  # without DoRA none of its tensors; T, the partial sums of dA, dB and dm, terms of A, B, T and S
            *(() if least is not None else (None,) * 5),
            (dtype, M * r) if adapter_dtype == dtype and needs_t else None,
            (torch.float32, parts * K * r if parts > 1 and need_dA else 0),
            (torch.float32, db_sums * N * r if need_dB else 0),
            None if least is None else (torch.float32, parts * N if parts > 1 else 0),
            (dtype, terms * r * (K + N) + (2 * terms * M * r if terms > 1 else 0)) if terms else None,
        ),
        schedule.num_words,
        (*sizes, *strides, K, r),
        (*schedule.counts, parts, schedule.job_period),
    )


def backward_plan(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor | None,
    *,
    scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    adapter_dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
    dora: Dora | None = None,
    config: BackwardConfig | None = None,
    one_launch: bool,
) -> LaunchPlan:
    """The launch for these tensors, dy [M, N] and x as `row_major`, lora_A and lora_B as `skinny_rows` give them.

    It serves all tensors that have their shapes, strides, dtypes and device, and addresses aligned to 16 bytes alike.
    """
    device = dy.device
    sizes = (*dy.shape, weight.shape[1], lora_A.shape[0])
    dtypes = (dy.dtype, lora_A.dtype, adapter_dtype)
    optional: tuple[Any, ...] = (None if scale is None else scale.dtype, seed is None or seed.is_cuda)
    least = None
    if dora is not None:
        least = dora.least
        optional = (*optional, dora.dm.dtype, None if dora.bias is None else dora.bias.dtype, alignment(*dora.tensors))
    specialised = (*optional, alignment(lora_A, lora_B, s, scale))
    strides = (dy.stride(0), x.stride(0), weight.stride(0))
    facts = device_facts(device)
    return _plan(
        device, facts, sizes, strides, *dtypes, needs, least, seed is not None,
        config, tuning.in_use(), one_launch, specialised,
    )  # fmt: skip


def lora_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor,
    *,
    scaling: float,
    scale: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    adapter_dtype: torch.dtype,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    dora: Dora | None = None,
    config: BackwardConfig | None = None,
    one_launch: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Launches the backward kernel.

    Args:
        dy: [M, N], gradient of y. Copied where a descriptor can't read it (see `row_major`).
        x, weight, lora_A, lora_B: as given to `lora_forward`; x only for dA.
        scaling, scale, seed, dropout_p, adapter_dtype: as given to `lora_forward`.
        s: [M, r], as `lora_forward` returned it; only for dB.
        need_dx, need_dA, need_dB: which gradients to compute.
        dora: with need_dB, what dm is made of and goes to; weight and lora_B then have the gain on their rows.
        config: tile sizes; None takes a tuned table's or the heuristic's.
        one_launch: False computes T in a launch of its own, and nothing waits for anything.

    Returns:
        dX [M, K] of dy's dtype, dA [r, K] and dB [N, r] of their parameters' dtypes, None where not needed.
    """
    M, N = dy.shape
    K = weight.shape[1]
    r = lora_A.shape[0]
    dx = dy.new_empty(M, K) if need_dx else None
    da = lora_A.new_empty(r, K) if need_dA else None
    db = lora_B.new_empty(N, r) if need_dB else None
    if M == 0:
        return dx, da if da is None else da.zero_(), db if db is None else db.zero_()
    if not (need_dx or need_dA or need_dB):
        return dx, da, db
    dy, lora_A, lora_B = row_major(dy), skinny_rows(lora_A), skinny_rows(lora_B)
    x = row_major(x) if need_dA else dy
    s = s.contiguous() if need_dB else None
    plan = backward_plan(
        dy,
        x,
        weight,
        lora_A,
        lora_B,
        s,
        scale=scale,
        seed=seed,
        adapter_dtype=adapter_dtype,
        needs=(need_dx, need_dA, need_dB),
        dora=dora,
        config=config,
        one_launch=one_launch,
    )
    tensors = (dy, x, s, weight, lora_A, lora_B, scale, dx, da, db)
    plan.launch(tensors if dora is None else (*tensors, *dora.tensors), *launch_dropout(seed, dropout_p, scaling))
    return dx, da, db
