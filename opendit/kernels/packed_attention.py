"""out = softmax(scale · q·kᵀ) · v for every head, with q, k and v read where the projection wrote them.

qkv [B, L, 3, H, K]; out [B, L, H, K]; lse [B, H, L] float32; B batch, L tokens, H heads, K head dim; no mask.

With s = scale · q·kᵀ, lse = log Σ_keys exp(s), p = exp(s − lse) and do = d(out):

    out   = p · v
    delta = Σ_K do · out                    per query and head
    ds    = p · (do·vᵀ − delta)
    dq    = scale · ds · k;  dk = scale · dsᵀ · q;  dv = pᵀ · do

dq, dk and dv go straight into dqkv [B, L, 3, H, K], so that nothing is stacked afterwards, and their sums over all
tokens, which are the gradient of the projection's bias, can be had from the same pass.
"""

# mypy: disable-error-code="no-untyped-call"

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opendit.kernels._attention import (
    JOINT_LIMIT,
    STRIDE_LIMIT,
    VARIANTS,
    Backward,
    Launch,
    attention_backward_finish,
    attention_backward_joint,
    attention_backward_keys,
    attention_backward_queries,
    attention_forward,
    backward_launch,
    forward_launch,
    pieces,
)
from opendit.kernels._rows import direct, register, sum_programs
from opendit.kernels.backend import resolve

NAME = "packed_attention"
MAX_HEAD_DIM = 128
FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def packed_attention_reference(qkv: Tensor, *, scale: float | None = None) -> Tensor:
    """The specification: float32 inside (float64 if qkv is), one downcast at the end."""
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    q, k, v = qkv.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(-2, -1)) * (qkv.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous().to(qkv.dtype)


def _packed(tensor: Tensor) -> Tensor:
    """The tensor itself if each token's elements lie together, whatever B's stride and almost any of L; else a copy."""
    dense = 1
    if tensor.stride(1) >= STRIDE_LIMIT:
        return tensor.contiguous()
    for size, stride in zip(tensor.shape[:1:-1], tensor.stride()[:1:-1], strict=True):
        if size != 1 and stride != dense:
            return tensor.contiguous()
        dense *= size
    return tensor


def _options(launch: Launch, wrap: Any) -> dict[str, int]:
    """Triton's own launch arguments. torch.compile's wrapper knows no register cap."""
    capped = {"maxnreg": launch.registers} if launch.registers and wrap is not torch.library.wrap_triton else {}
    return {"num_warps": launch.warps, **capped}


def _tile(launch: Launch, length: int) -> dict[str, Any]:
    """A kernel's compile-time block sizes; EVEN when blocks fit the tokens exactly, so that nothing is masked."""
    even = length % launch.queries == 0 and length % launch.keys == 0
    return {"QUERIES": launch.queries, "KEYS": launch.keys, "STAGES": launch.stages, "EVEN": even}


def forward_fake(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The forward's outputs, unwritten: out [B, L, H, K], contiguous; lse [B, H, L] float32."""
    B, L, _, H, K = qkv.shape
    return qkv.new_empty(B, L, H, K), qkv.new_empty(B, H, L, dtype=torch.float32)


def launch_forward(
    qkv: Tensor, scale: float, wrap: Any = direct, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """``forward_fake``'s outputs, written."""
    out, lse = forward_fake(qkv, scale)
    if qkv.numel() == 0:
        return out, lse
    qkv = _packed(qkv)
    B, L, _, H, K = qkv.shape
    HEAD, TAIL = pieces(K)
    launch = launch or forward_launch(L, K, qkv.element_size())
    blocks = -(-L // launch.queries)
    wrap(attention_forward)[(B * H * blocks,)](
        *(qkv, out, lse, qkv.stride(0), qkv.stride(1), L, blocks, scale),
        H=H,
        K=K,
        HEAD=HEAD,
        TAIL=TAIL,
        **_tile(launch, L),
        **_options(launch, wrap),
    )
    return out, lse


def backward_fake(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, bias_sums: bool
) -> tuple[Tensor, Tensor]:
    """The backward's outputs, unwritten: dqkv [B, L, 3, H, K], contiguous; sums [3·H·K] float32, or empty."""
    _, _, _, H, K = qkv.shape
    return qkv.new_empty(qkv.shape), qkv.new_empty((3 * H * K if bias_sums else 0,), dtype=torch.float32)


def launch_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias_sums: bool,
    wrap: Any = direct,
    launch: Backward | None = None,
) -> tuple[Tensor, Tensor]:
    """``backward_fake``'s outputs, written. The sums are of the float32 values, before they are rounded into dqkv.

    All but launches of the variant "atomic" are bit-identical when repeated.
    """
    dqkv, sums = backward_fake(dout, qkv, out, lse, scale, bias_sums)
    if qkv.numel() == 0:
        return dqkv, sums.zero_()
    dout, qkv, out = _packed(dout), _packed(qkv), out.contiguous()
    B, L, _, H, K = qkv.shape
    HEAD, TAIL = pieces(K)
    launch = launch or backward_launch(L, K, qkv.element_size())
    keys, queries = launch.keys, launch.queries
    if launch.variant == "joint":
        queries = keys
    elif launch.variant not in VARIANTS:
        raise ValueError(f"{NAME}: variant is {launch.variant!r}; allowed are {', '.join(map(repr, VARIANTS))}")
    q_blocks, k_blocks = -(-L // queries.queries), -(-L // keys.keys)
    delta = torch.empty_like(lse)
    part_q = qkv.new_empty((1, B * q_blocks, 1, H * K) if bias_sums else (0,), dtype=torch.float32)
    part_kv = qkv.new_empty((1, B * k_blocks, 2, H * K) if bias_sums else (0,), dtype=torch.float32)
    strides = (qkv.stride(0), qkv.stride(1), dout.stride(0), dout.stride(1))
    shape = {"H": H, "K": K, "HEAD": HEAD, "TAIL": TAIL, "WANT_SUMS": bias_sums}

    if launch.variant == "joint":
        if L > JOINT_LIMIT:
            raise ValueError(
                f"{NAME}: variant is 'joint' and L is {L}; it takes at most {JOINT_LIMIT}; use variant='split'"
            )
        programs = min(launch.programs, B * H)
        scratch = qkv.new_empty((programs, q_blocks * keys.queries, HEAD + TAIL), dtype=torch.float32)
        wrap(attention_backward_joint)[(programs,)](
            *(qkv, dout, out, lse, delta, dqkv, scratch, part_q, part_kv, *strides, L, B * H, programs, scale),
            **shape,
            **_tile(keys, L),
            BLOCKS=k_blocks,
            **_options(keys, wrap),
        )
    else:
        # This one finds delta too, which the other needs, so it comes first whether it finds dq or not.
        atomic = launch.variant == "atomic"
        wrap(attention_backward_queries)[(B * H * q_blocks,)](
            *(qkv, dout, out, lse, delta, dqkv, part_q, *strides, L, q_blocks, scale),
            **shape,
            **_tile(queries, L),
            WANT_DQ=not atomic,
            **_options(queries, wrap),
        )
        dq = qkv.new_zeros((B, L, H, K) if atomic else (0,), dtype=torch.float32)
        wrap(attention_backward_keys)[(B * H * k_blocks,)](
            *(qkv, dout, lse, delta, dqkv, dq, part_kv, *strides, L, k_blocks, scale),
            **shape,
            **_tile(keys, L),
            ATOMIC=atomic,
            **_options(keys, wrap),
        )
        if atomic:
            wrap(attention_backward_finish)[(B * H * q_blocks,)](
                *(dq, dqkv, part_q, L, q_blocks, scale), **shape, QUERIES=queries.queries, num_warps=4
            )
    if bias_sums:
        sum_programs(part_q, sums[: H * K].view(1, 1, H * K), wrap)
        sum_programs(part_kv, sums[H * K :].view(1, 2, H * K), wrap)
    return dqkv, sums


def forward(qkv: Tensor, scale: float | None = None, *, launch: Launch | None = None) -> tuple[Tensor, Tensor]:
    """(out [B, L, H, K], lse [B, H, L] float32), without autograd; for those who write their own."""
    scale = _check(qkv, scale)
    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        return launch_forward(qkv, scale, launch=launch)


def backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float | None = None,
    *,
    bias_sums: bool = False,
    launch: Backward | None = None,
) -> tuple[Tensor, Tensor]:
    """(dqkv [B, L, 3, H, K], sums [3·H·K] float32) from ``forward``'s outputs; sums is empty unless wanted."""
    scale = _check(qkv, scale)
    with torch.cuda.device_of(qkv):
        return launch_backward(dout, qkv, out, lse, scale, bias_sums, launch=launch)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)


def _gradient(ctx: Any, dout: Tensor, run: Any) -> tuple[Tensor, None]:
    return run(dout, *ctx.saved_tensors, ctx.scale, False)[0], None


class _PackedAttention(torch.autograd.Function):
    """The eager path. A registered operator costs several times more host time per call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch.cuda.device_of(inputs[0]):  # Triton launches on the current device; autograd sets it itself
            output = launch_forward(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return _gradient(ctx, dout, launch_backward)


forward_op = register("packed_attention_forward", launch_forward, forward_fake)
backward_op = register("packed_attention_backward", launch_backward, backward_fake)
if forward_op is not None:
    forward_op.register_autograd(lambda ctx, dout, *_: _gradient(ctx, dout, backward_op), setup_context=_save)


def packed_attention(qkv: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """Softmax attention of every token to every token, on the packed output of a qkv projection.

    Args:
        qkv: [B, L, 3, H, K], bfloat16, float16 or float32 for the fused kernels, K a multiple of 8 up to 128. Strides
            of B and L may be anything; other strides that are not dense cost a copy.
        scale: what q·kᵀ is multiplied by, positive; 1/√K by default.
        backend: "auto", "triton" or "reference"; see ``opendit.kernels.backend``. "auto" takes the reference for
            what the kernels do not take.

    Returns:
        [B, L, H, K], contiguous. Statistics are float32; probabilities are rounded to qkv's dtype before they meet v.
        The gradient is contiguous and bit-identical when repeated. Differentiable once.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or dtype, or the backend cannot run here.
    """
    scale = _check(qkv, scale)
    reason = _unfit(qkv)
    if backend == "triton" and reason is not None:
        raise ValueError(f"{NAME}: backend={backend!r} cannot run here: {reason}; pass backend='reference'")
    chosen = resolve(backend, NAME, qkv.device, qkv.shape[-1], qkv.dtype == torch.float64)
    if reason is not None or chosen == "reference":
        return packed_attention_reference(qkv, scale=scale)
    if torch.compiler.is_compiling():
        return forward_op(qkv, scale)[0]
    return _PackedAttention.apply(qkv, scale)


def _check(qkv: Any, scale: Any) -> float:
    """The scale to use, or an error that says what is wrong."""
    if not isinstance(qkv, Tensor):
        raise TypeError(f"{NAME}: qkv is a {type(qkv).__name__}; pass a floating-point tensor [B, L, 3, H, K]")
    if not qkv.is_floating_point():
        raise TypeError(f"{NAME}: qkv has dtype {qkv.dtype}; convert it to a floating-point dtype")
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[3] == 0 or qkv.shape[4] == 0:
        raise ValueError(
            f"{NAME}: qkv has shape {tuple(qkv.shape)}; it must be [B, L, 3, H, K] with H, K > 0; "
            "view the projection's output [B, L, 3·H·K] that way"
        )
    if scale is None:
        return float(qkv.shape[4] ** -0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{NAME}: scale is a {type(scale).__name__}; pass a positive number, or None for 1/√K")
    if not 0 < scale < math.inf:
        raise ValueError(f"{NAME}: scale is {scale}; it must be positive and finite, or None for 1/√K")
    return float(scale)


def _unfit(qkv: Tensor) -> str | None:
    """Why the kernels cannot take these inputs, or None."""
    if qkv.dtype not in FUSED_DTYPES:
        return f"its kernels take bfloat16, float16 and float32, and qkv is {qkv.dtype}"
    if qkv.shape[4] > MAX_HEAD_DIM or qkv.shape[4] % 8:
        return f"its kernels take a head dim that is a multiple of 8 up to {MAX_HEAD_DIM}, and K is {qkv.shape[4]}"
    return None
