"""A whole transformer block with adaptive LayerNorm as one autograd function, with its backward written out.

    (shift_a, scale_a, gate_a, shift_m, scale_m, gate_m) = SiLU(c)·Wadaᵀ + bada
    h_a = LN(x)·(1 + scale_a) + shift_a;   qkv = h_a·Wqkvᵀ + bqkv;   o = attention(qkv);   y_a = o·Wprojᵀ + bproj
    r   = x + gate_a·y_a
    h_m = LN(r)·(1 + scale_m) + shift_m;   p = h_m·W1ᵀ + b1;         g = GELU(p);          y_m = g·W2ᵀ + b2
    out = r + gate_m·y_m

x, r, out [B, L, D] in the residual stream's dtype; c [B, C]; everything between is in the compute dtype: qkv
[B, L, 3·D], p, g [B, L, F], the others [B, L, D]. B batch, L tokens, D hidden, F hidden of the MLP, H heads. M = B·L.

What one function gains over its parts: bias gradients come out of passes that are made anyway; dq, dk and dv are packed
once or never apart; h_a, h_m and g need not be kept, since the backward's passes write them again on their way; weight
gradients leave the matrix product in the parameters' own dtype; W2 is laid out as the matrix products like it; and
between two of forty launches there is next to no Python.

With a `sequence` x, out and all else are of this process's tokens, but for what attention sees (`fastseq/in_block.py`);
collectives are launches among others, in CUDA graphs too.

With `fp8` the products of qkv, p and y_m, and of the gradients of h_a, g and h_m, are of rows in 8 bits, each with a
scale of its own (`kernels/fp8.py`), which the passes before them write; weight gradients and all else stay in the
compute dtype. h_a, h_m and g are not made in it before the backward then, so "all" keeps what "selective" does.
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from opendit.attention import two_pass
from opendit.fastseq import Sequence as Spread
from opendit.fastseq import in_block
from opendit.kernels import attention_backward as short_attention
from opendit.kernels import fp8
from opendit.kernels import gate_residual as gating
from opendit.kernels import gate_residual_layernorm_modulate as fused
from opendit.kernels import gelu as activation
from opendit.kernels import layernorm_modulate as norm
from opendit.kernels import pack_qkv as packing
from opendit.kernels.transpose import transpose_into
from opendit.patch import graphs

KEEP = ("all", "selective", "full")
"""What is kept between forward and backward, per token: 18·D values; 12·D, with h_a, h_m and g computed again; D (x),
with the whole forward computed again."""

# From this many tokens on, another layout of W2 saves more in the matrix products than its copy costs: on an H200 at
# 65536 tokens, D=1152, F=4608, 0.96 for 1.05 ms forward, 0.95 for 1.12 and 0.93 for 1.17 backward, for 0.04 ms.
_TRANSPOSE_FROM = 4096

# Up to this size of x its kernels can be quicker than their launches. Beyond, nothing is gained for the memory:
# DiT-XL/2 at B=256 takes 395 ms either way on an H200, and 12.7 GiB more.
_GRAPHS_UP_TO = 1 << 26

PARAMETERS = ("ada_w", "ada_b", "qkv_w", "qkv_b", "proj_w", "proj_b", "w1", "b1", "w2", "b2")
"""A block's parameters: weights [out, in]; biases may be absent; qkv_w and qkv_b may be three tensors,
for q, k and v."""
W2 = PARAMETERS.index("w2")
# Multiplied in 8 bits, where that is asked for: read as they are, in the forward and again in the backward.
_WIDE = tuple(PARAMETERS.index(name) for name in ("qkv_w", "w1", "w2"))
_GRADIENTS = ("x", "c", *PARAMETERS)


class Static(NamedTuple):
    """What of a call is no tensor. `counts`: how many tensors each of PARAMETERS is; `fp8`: products in 8 bits;
    `wide`: r and its gradient are fp32, whatever x is; `sequence`: how tokens are spread over processes, if they are.
    """

    heads: int
    eps_a: float
    eps_m: float
    tanh: bool
    attention: str
    keep: str
    dtype: torch.dtype
    counts: tuple[int, ...]
    fp8: bool = False
    wide: bool = False
    sequence: Spread | None = None

    @property
    def gathers(self) -> bool:
        """Whether q, k and v are computed of other processes' tokens too, and not of h_a."""
        return self.sequence is not None and self.sequence.method == "fastseq"

    @property
    def attend(self) -> in_block.Attend:
        """Attention of sequences that are whole here."""
        return in_block.Attend(
            lambda q, k, v: two_pass.forward(q, k, v, self.attention),
            lambda da, q, k, v, a, more: two_pass.backward(da, q, k, v, a, more, self.attention),
            lambda dq, dk, dv, want_sum: packing.pack_qkv(dq, dk, dv, want_sum),
        )


Groups = Sequence[Sequence[Tensor]]


def grouped(flat: Sequence[Any], counts: Sequence[int]) -> list[Sequence[Any]]:
    """The entries of `flat`, one list for each of PARAMETERS."""
    groups, at = [], 0
    for count in counts:
        groups.append(flat[at : at + count])
        at += count
    return groups


def _is_cast(index: int, group: Sequence[Tensor], static: Static, tokens: int) -> bool:
    """Whether the weight that the block computes with is a tensor of its own, not the parameter."""
    if static.fp8 and index in _WIDE:
        return False
    if len(group) != 1:
        return len(group) > 1
    return group[0].dtype != static.dtype or (index == W2 and _turned(group[0], tokens))


def _turned(w2: Tensor, tokens: int) -> bool:
    """Whether W2 is copied into [F, D]."""
    return w2.is_cuda and tokens >= _TRANSPOSE_FROM


def _as_it_is(index: int, group: Sequence[Tensor], static: Static) -> Tensor:
    """A parameter that is not cast: turned where it is W2, but for products in 8 bits, which take all by rows."""
    if static.fp8 and index in _WIDE:
        return group[0] if len(group) == 1 else torch.cat([p.detach() for p in group])
    return group[0].t() if index == W2 else group[0]


def cast_weights(groups: Groups, static: Static, tokens: int) -> list[Tensor | None]:
    """The parameters as the block computes with them: in its dtype, q's, k's and v's as one, W2 turned to [F, D]."""
    dtype = static.dtype
    weights: list[Tensor | None] = []
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for index, group in enumerate(groups):
        if not group:
            weights.append(None)
        elif not _is_cast(index, group, static, tokens):
            weights.append(_as_it_is(index, group, static))
        else:
            shape = (sum(len(p) for p in group), *group[0].shape[1:])
            if index == W2 and _turned(group[0], tokens):
                weights.append(transpose_into(group[0].detach(), group[0].new_empty(shape[::-1], dtype=dtype)))
                continue
            whole = group[0].new_empty(shape, dtype=dtype)
            targets += whole.split([len(p) for p in group]) if len(group) > 1 else [whole]
            sources += group
            weights.append(whole.t() if index == W2 else whole)
    if targets:
        torch._foreach_copy_(targets, sources)  # one launch for all of them
    return weights


def uncast(groups: Groups, static: Static, tokens: int) -> list[Tensor]:
    """The parameters that the block computes with as they are."""
    return [p for i, group in enumerate(groups) if group and not _is_cast(i, group, static, tokens) for p in group]


def _linear(x: Tensor, weight_t: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, in] · weight_t [in, out] + bias."""
    return torch.mm(x, weight_t) if bias is None else torch.addmm(bias, x, weight_t)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a·b in `dtype`, accumulated in fp32 and rounded once, in memory that is given or new."""
    if dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    product = torch.mm(a, b)
    return product.to(dtype) if out is None else out.copy_(product)


def _short(attention: str, qkv: Tensor) -> bool:
    """Whether attention's backward is our own kernel, after cuDNN's forward.

    At 65536 tokens on an H200, with gradients packed and what the bias gradient needs, against cuDNN's and a pass that
    packs and sums: 16 heads of 72, 1.01 against 1.46 ms at L=256, 1.55 against 2.01 at 512, 2.80 against 3.10 at 1024,
    5.44 against 5.35 at 2048; 12 heads of 64, 0.55 against 0.84, 0.83 against 1.08, 1.47 against 1.56, 2.78 against
    2.58.
    """
    L, K = qkv.shape[1], qkv.shape[4]
    return attention == "sdpa-cudnn" and L <= 1024 and K <= 96 and short_attention.fits(qkv.dtype, K)


def _norm_fake(*inputs: Any, scale8: Tensor | None = None) -> Any:
    return norm.forward_fake(*(*inputs, True))


def _fused_fake(*inputs: Any, scale8: Tensor | None = None) -> Any:
    return fused.forward_fake(*inputs)


def _gate_fake(*inputs: Any, residual: Tensor | None = None) -> Tensor:
    return gating.forward_fake(*inputs) if residual is None else residual


class _Launch:
    """The kernels, and what stands for them where only shapes are asked for."""

    norm = staticmethod(norm.launch_forward)
    fused = staticmethod(fused.launch_forward)
    gelu = staticmethod(activation.launch_forward)
    gate = staticmethod(gating.launch_forward)
    quantize = staticmethod(fp8.quantize_rows)
    gelu8 = staticmethod(fp8.gelu_rows)


class _Fake:
    norm = staticmethod(_norm_fake)
    fused = staticmethod(_fused_fake)
    quantize = staticmethod(fp8.quantize_rows_fake)
    gelu8 = staticmethod(fp8.gelu_rows_fake)
    gelu = staticmethod(activation.forward_fake)
    gate = staticmethod(_gate_fake)


class _Forward:
    """The forward's intermediate results, by name."""

    SMALL = ("modulation", "mean_a", "rstd_a", "mean_m", "rstd_m")
    LARGE = ("qkv", "o", "y_a", "r", "p", "y_m")
    CHEAP = ("h_a", "h_m", "g")

    def __init__(
        self,
        x: Tensor,
        c: Tensor,
        weights: Sequence[Any],
        static: Static,
        run: Any = _Launch,
        out: Tensor | None = None,
    ) -> None:
        ada_w, ada_b, qkv_w, qkv_b, proj_w, proj_b, w1, b1, w2t, b2 = weights
        B, L, D = x.shape
        M, dtype = B * L, static.dtype
        # With fp8: what h_a and h_m are written in, and where the scales of their rows go.
        low = fp8.E4M3 if static.fp8 else dtype
        rows_a, rows_m = ({"scale8": x.new_empty((M, 1), dtype=torch.float32)} if static.fp8 else {} for _ in range(2))

        def product(h: Tensor, w: Tensor, bias: Tensor | None, scale8: Tensor | None = None) -> Tensor:
            if scale8 is not None:
                return fp8.scaled_product((h, scale8), run.quantize(w), dtype, bias, fast=True)
            return _linear(h, w.t(), bias)

        self.modulation = _linear(F.silu(c).to(dtype), ada_w.t(), ada_b)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation.chunk(6, dim=1)
        self.h_a, self.mean_a, self.rstd_a = run.norm(x, shift_a, scale_a, None, None, static.eps_a, low, **rows_a)
        if static.sequence is None:
            self.qkv = product(self.h_a.view(M, D), qkv_w, qkv_b, **rows_a).view(B, L, 3, static.heads, -1)
            q, k, v = self.qkv.unbind(2)
            o, self.attention = two_pass.forward(q, k, v, static.attention)
            self.o = o.reshape(B, L, -1)
        else:
            self.o, self.attention = in_block.forward(
                self.h_a, qkv_w, qkv_b, static.heads, static.sequence, static.attend
            )
        self.y_a = _linear(self.o.view(M, -1), proj_w.t(), proj_b).view(B, L, D)
        # Rounded in the middle of a block too, a bf16 stream would lose twice as much.
        middle, end = (torch.float32, x.dtype) if static.wide else (None, None)
        self.r, self.h_m, self.mean_m, self.rstd_m = run.fused(
            x, self.y_a, gate_a, shift_m, scale_m, None, None, static.eps_m, low, True, middle, **rows_m
        )
        self.p = product(self.h_m.view(M, D), w1, b1, **rows_m)
        if static.fp8:
            g8, rows_g = run.gelu8(self.p, static.tanh)
            self.y_m = product(g8, w2t, b2, rows_g).view(B, L, D)
        else:
            self.g = run.gelu(self.p, static.tanh)
            self.y_m = _linear(self.g, w2t, b2).view(B, L, D)
        self.out = run.gate(self.r, self.y_m, gate_m, end, residual=out)

    def saved(self, keep: str, static: Static) -> list[Tensor]:
        """What the backward needs besides the inputs, in the order of `_names`."""
        return [] if keep == "full" else [getattr(self, name) for name in _names(keep, static)] + self.attention


def _names(keep: str, static: Static) -> tuple[str, ...]:
    left = {"qkv"} if static.sequence is not None else set()  # q, k and v are among what attention keeps
    left |= {"h_a"} if static.gathers else set()
    names = _Forward.SMALL + _Forward.LARGE + (_Forward.CHEAP if keep == "all" else ())
    return tuple(name for name in names if name not in left)


def _keep(static: Static) -> str:
    return "selective" if static.fp8 and static.keep == "all" else static.keep


def forward(
    x: Tensor, c: Tensor, groups: Groups, static: Static, run: Any = _Launch, out: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """(out, what `backward` needs besides the inputs: the weights that were cast, then the intermediate results).

    out: memory to write out to; new if not given.
    """
    tokens = x.shape[0] * x.shape[1]
    weights = cast_weights(groups, static, tokens)
    done = _Forward(x, c, weights, static, run, out)
    cast = [w for i, w in enumerate(weights) if w is not None and _is_cast(i, groups[i], static, tokens)]
    # W2 is handed on as it lies in memory, so that no output of the operator is a view.
    return done.out, [w if w.dim() < 2 or w.is_contiguous() else w.t() for w in cast] + done.saved(
        _keep(static), static
    )


def _weights_again(
    groups: Groups, saved: Sequence[Tensor], static: Static, tokens: int
) -> tuple[list[Any], Sequence[Tensor]]:
    """(the weights as `cast_weights` gave them, the rest of `saved`)."""
    weights: list[Any] = []
    at = 0
    for index, group in enumerate(groups):
        if group and _is_cast(index, group, static, tokens):
            laid_out_as_given = index == W2 and not _turned(group[0], tokens)
            weights.append(saved[at].t() if laid_out_as_given else saved[at])
            at += 1
        else:
            weights.append(_as_it_is(index, group, static) if group else None)
    return weights, saved[at:]


def backward(
    dout: Tensor,
    x: Tensor,
    c: Tensor,
    groups: Groups,
    saved: Sequence[Tensor],
    static: Static,
    wants: Sequence[bool],
    into: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The gradients of x, c and PARAMETERS by name, as far as `wants` (in that order) asks; x's always.

    Weight gradients are accumulated in fp32 and rounded once to the parameter's dtype. into: memory for all of them, by
    name; new if not given.
    """
    into = into or {}
    B, L, D = x.shape
    M, dtype = B * L, static.dtype
    weights, saved = _weights_again(groups, saved, static, M)
    ada_w, _, qkv_w, _, proj_w, _, w1, _, w2t, _ = weights
    keep = _keep(static)
    if keep == "full":
        keep = "selective" if static.fp8 else "all"
        saved = _Forward(x, c, weights, static).saved(keep, static)
    names = _names(keep, static)
    s = dict(zip(names, saved, strict=False))
    want = dict(zip(_GRADIENTS, wants, strict=True))
    to = {name: group[0].dtype if group else dtype for name, group in zip(PARAMETERS, groups, strict=True)}
    modulated = want["c"] or want["ada_w"] or want["ada_b"]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = s["modulation"].chunk(6, dim=1)
    grads: dict[str, Tensor] = {}

    # out = r + gate_m·y_m
    dout = dout.contiguous()
    dy_m = torch.empty_like(s["y_m"])
    sums_m = x.new_empty((B, int(modulated) + int(want["b2"]), D), dtype=torch.float32)
    gating.launch_backward_sums(dout, s["y_m"], gate_m, dy_m, sums_m, modulated)
    dy_m = dy_m.view(M, D)
    if want["b2"]:
        grads["b2"] = _through_gate(gate_m, sums_m[:, -1], to["b2"])
    # y_m = g·W2ᵀ + b2, g = GELU(p)
    if static.fp8:
        dg = fp8.scaled_product(fp8.quantize_rows(dy_m), fp8.quantize_columns(w2t), dtype)
        dp, dp8, g, db1 = fp8.gelu_backward_rows(dg, s["p"], static.tanh, want["b1"])
    else:
        dg = torch.mm(dy_m, w2t.t())
        g = s["g"] if keep == "all" else torch.empty_like(dg)
        dp = torch.empty_like(dg)
        db1 = dg.new_empty(dg.shape[1], dtype=torch.float32) if want["b1"] else None
        activation.launch_backward_into(dg, s["p"], static.tanh, dp, None if keep == "all" else g, db1)
    del dg
    if db1 is not None:
        grads["b1"] = db1.to(to["b1"])
    if want["w2"]:
        # As gᵀ·dy, turned afterwards: a gradient has its parameter's layout.
        turned = _product(g.t(), dy_m, to["w2"])
        grads["w2"] = transpose_into(turned, into["w2"] if into else torch.empty_like(groups[W2][0]))
    del g, dy_m
    short = static.sequence is None and _short(static.attention, s["qkv"])
    want_dy_a_sums = want["proj_b"] or (short and want["qkv_b"])
    # p = h_m·W1ᵀ + b1, h_m = LN(r)·(1 + scale_m) + shift_m, r = x + gate_a·y_a
    dh_m = fp8.scaled_product(dp8, fp8.quantize_columns(w1), dtype) if static.fp8 else torch.mm(dp, w1)
    dh_m = dh_m.view(B, L, D)
    h_m = s["h_m"] if keep == "all" else torch.empty_like(dh_m)
    dr, dy_a, sums_a = fused.launch_backward(
        dout,
        dh_m,
        s["r"],
        s["y_a"],
        gate_a,
        scale_m,
        None,
        s["mean_m"],
        s["rstd_m"],
        torch.float32 if static.wide else x.dtype,
        torch.float32,
        [True, True, modulated, modulated],
        want_sum=want_dy_a_sums,
        shift=shift_m,
        modulated=None if keep == "all" else h_m,
    )
    dy_a = dy_a.view(M, D)
    dv_sums = None
    if want_dy_a_sums:
        dy_a_sums = _through_gate(gate_a, sums_a[:, -1], torch.float32)
        if want["proj_b"]:
            grads["proj_b"] = dy_a_sums.to(to["proj_b"])
        if short and want["qkv_b"]:  # Σ dv = Σ do = Σ dy_a·Wproj, for a softmax's rows sum to 1
            dv_sums = torch.mm(dy_a_sums[None], proj_w.float())[0]
    if want["w1"]:
        grads["w1"] = _product(dp.t(), h_m.view(M, D), to["w1"], into.get("w1"))
    del dp, h_m, dh_m
    # y_a = o·Wprojᵀ + bproj, o = attention(qkv)
    do = torch.mm(dy_a, proj_w)
    if want["proj_w"]:
        grads["proj_w"] = _product(dy_a.t(), s["o"].view(M, -1), to["proj_w"], into.get("proj_w"))
    del dy_a
    of_attention = saved[len(names) :]
    if static.gathers:
        assert static.sequence is not None
        dqkv = None
        dw, db = (
            (into[n] if n in into else torch.empty_like(w, dtype=to[n])) if want[n] else None
            for n, w in zip(("qkv_w", "qkv_b"), weights[2:4], strict=True)
        )
        given = do.view(B, L, -1), of_attention, qkv_w, static.heads, static.sequence, static.attend
        dh_a, dw, db = in_block.fastseq_backward(*given, dw, db)
        grads |= {n: g for n, g in (("qkv_w", dw), ("qkv_b", db)) if g is not None}
    else:
        dqkv, dqkv_b = _attention_backward(do, s, of_attention, static, short, want["qkv_b"], dv_sums)
        if want["qkv_b"]:
            grads["qkv_b"] = dqkv_b.to(to["qkv_b"])
        # qkv = h_a·Wqkvᵀ + bqkv, h_a = LN(x)·(1 + scale_a) + shift_a
        if static.fp8:
            dh_a = fp8.scaled_product(fp8.quantize_rows(dqkv), fp8.quantize_columns(qkv_w), dtype)
        else:
            dh_a = torch.mm(dqkv, qkv_w)
        dh_a = dh_a.view(B, L, D)
    del do
    again = keep != "all" and not static.gathers
    h_a = torch.empty_like(dh_a) if again else s.get("h_a")
    grads["x"], sums_x = norm.launch_backward(
        dh_a,
        x,
        scale_a,
        None,
        s["mean_a"],
        s["rstd_a"],
        torch.float32,
        True,
        modulated,
        dr=dr,
        shift=shift_a,
        out=h_a if again else None,
        dx=into.get("x"),
    )
    if want["qkv_w"] and dqkv is not None:
        assert h_a is not None
        grads["qkv_w"] = _product(dqkv.t(), h_a.view(M, D), to["qkv_w"], into.get("qkv_w"))
    if modulated:
        # (dshift_a, dscale_a), (dgate_a), (dshift_m, dscale_m), (dgate_m)
        dmodulation = torch.cat((sums_x, sums_a[:, :1], sums_a[:, 1:3], sums_m[:, :1]), dim=1).view(B, -1)
        if want["ada_b"]:
            grads["ada_b"] = dmodulation.sum(0).to(to["ada_b"])
        dmodulation = dmodulation.to(dtype)
        if want["ada_w"]:
            grads["ada_w"] = _product(dmodulation.t(), F.silu(c).to(dtype), to["ada_w"], into.get("ada_w"))
        if want["c"]:
            grads["c"] = torch.ops.aten.silu_backward(torch.mm(dmodulation, ada_w).to(c.dtype), c)
    for name, own in into.items():
        if grads[name] is not own:
            grads[name] = own.copy_(grads[name])
    return grads


def _through_gate(gate: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_B gate·Σ_L dr: the gradient of a bias before a gate."""
    return torch.linalg.vecdot(gate.float(), total, dim=0).to(dtype)


def _attention_backward(
    do: Tensor,
    s: dict[str, Tensor],
    saved: Sequence[Tensor],
    static: Static,
    short: bool,
    want_sums: bool,
    dv_sums: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dqkv [M, 3·H·K], its column sums in fp32). short: by our own kernel, which is given those of dv [H·K]."""
    if static.sequence is not None:
        B, L, _ = s["o"].shape
        dqkv = in_block.ulysses_backward(do.view(B, L, -1), saved, static.heads, static.sequence, static.attend)
        dqkv = dqkv.view(B * L, -1)
        return dqkv, dqkv.sum(0, dtype=torch.float32) if want_sums else dqkv.new_empty(0)
    qkv, o, attention = s["qkv"], s["o"], static.attention
    B, L, _, H, K = qkv.shape
    per_head = (B, L, H, K)
    if short:
        lse = saved[0].reshape(B, H, L)
        dqkv, sums = short_attention.attention_backward(
            do.view(per_head), qkv, o.view(per_head), lse, query_sums=want_sums
        )
        if want_sums:
            assert dv_sums is not None
            sums = torch.cat((sums, torch.zeros_like(sums), dv_sums))
    else:
        q, k, v = qkv.unbind(2)
        dq, dk, dv = two_pass.backward(do.view(per_head), q, k, v, o.view(per_head), saved, attention)
        M = B * L
        dqkv, sums = packing.pack_qkv(dq.reshape(M, -1), dk.reshape(M, -1), dv.reshape(M, -1), want_sums)
    return dqkv.view(B * L, -1), sums


def _for_parameters(grads: dict[str, Tensor], shapes: Sequence[Any], static: Static) -> list[Tensor | None]:
    """The gradients of all tensors of PARAMETERS, those of several cut along their rows."""
    found: list[Tensor | None] = []
    for name, group in zip(PARAMETERS, grouped(shapes, static.counts), strict=True):
        grad = grads.get(name)
        if grad is None or len(group) == 1:
            found += [grad] * len(group)
        else:
            found += grad.split([shape[0] for shape in group])
    return found


def _likes(x: Tensor, c: Tensor, groups: Groups, wants: Sequence[bool]) -> dict[str, Tensor]:
    """For each wanted gradient a tensor of its shape and dtype, on the device or not."""
    likes = {"x": x, "c": c}
    for name, group in zip(PARAMETERS, groups, strict=True):
        if len(group) == 1:
            likes[name] = group[0]
        elif group:  # the memory of a tensor that is never written is never taken
            likes[name] = group[0].new_empty((1,)).expand(sum(len(p) for p in group), *group[0].shape[1:])
    return {name: likes[name] for name, want in zip(_GRADIENTS, wants, strict=True) if want}


class _Block(torch.autograd.Function):
    """The eager path."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, static: Static, graphed: bool, *flat: Tensor) -> Tensor:
        groups = grouped(flat, static.counts)
        ctx.static, ctx.graphs = static, None
        with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
            ctx.flat = flat
            # Autograd sees to it that these are not changed before the backward; of the others there are copies.
            read = uncast(groups, static, x.shape[0] * x.shape[1])
            if graphed:
                ctx.graphs = graphs.block(x, c, flat, static)
            if ctx.graphs is not None:
                with contextlib.suppress(graphs.CaptureFailed):
                    out, ctx.kept, ctx.lease = ctx.graphs.run_forward(
                        x, c, lambda x, c, out: forward(x, c, groups, static, out=out)[1]
                    )
                    ctx.replay, ctx.since = ctx.lease.replay, None
                    ctx.save_for_backward(*read)
                    return out
                ctx.graphs = None
            out, saved = forward(x, c, groups, static)
            ctx.many = len(read)
            ctx.save_for_backward(*read, x, c, *saved)
            return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        static: Static = ctx.static
        checked = ctx.saved_tensors
        x, c, *saved = checked[ctx.many :] if ctx.graphs is None else ctx.kept
        flat = ctx.flat
        needs = ctx.needs_input_grad
        wants = [True, needs[1], *(any(group) for group in grouped(needs[4:], static.counts))]

        groups = grouped(flat, static.counts)

        def compute(dout: Tensor, into: dict[str, Tensor]) -> dict[str, Tensor]:
            return backward(dout, x, c, groups, saved, static, wants, into)

        with torch.autocast(x.device.type, enabled=False):
            if ctx.graphs is None:
                grads = compute(dout, {})
            else:
                likes = _likes(x, c, groups, wants)
                grads = ctx.graphs.run_backward(ctx.replay, ctx.since, dout, flat, likes, compute)
                ctx.lease, ctx.since = None, ctx.graphs.device.replays
        return (grads["x"], grads.get("c"), None, None, *_for_parameters(grads, [p.shape for p in flat], static))


def adaln_block(x: Tensor, c: Tensor, groups: Groups, static: Static, graphed: bool = False) -> Tensor:
    """The block's output [B, L, D] in the dtype of x; on GPUs, or in Triton's interpreter.

    Args:
        x: [B, L, D], in a dtype that it keeps when `static.dtype` is added. c: [B, C].
        groups: the parameters in the order of PARAMETERS, in any floating dtype: they are cast to `static.dtype`, and
            gradients come back in their own.
        graphed: whether to replay CUDA graphs where that is safe.
    """
    flat = [p for group in groups for p in group]
    if torch.compiler.is_compiling():
        assert static.sequence is None
        return _operator(x, c, flat, *static[:-1])[0]
    graphed = graphed and torch.is_grad_enabled() and x.numel() <= _GRAPHS_UP_TO
    out: Tensor = _Block.apply(x, c, static, graphed, *flat)
    return out


# For torch.compile the block is an operator that it does not look into: there is nothing left in it to fuse.


@torch.library.custom_op("opendit::adaln_block", mutates_args=())
def _operator(
    x: Tensor,
    c: Tensor,
    flat: list[Tensor],
    heads: int,
    eps_a: float,
    eps_m: float,
    tanh: bool,
    attention: str,
    keep: str,
    dtype: torch.dtype,
    counts: list[int],
    in_fp8: bool,
    wide: bool,
) -> list[Tensor]:
    static = Static(heads, eps_a, eps_m, tanh, attention, keep, dtype, tuple(counts), in_fp8, wide)
    with torch.cuda.device_of(x):
        out, saved = forward(x, c, grouped(flat, counts), static)
    return [out, *saved]


@_operator.register_fake
def _(x: Tensor, c: Tensor, flat: list[Tensor], *static: Any) -> list[Tensor]:
    given = Static(*static)
    out, saved = forward(x, c, grouped(flat, given.counts), given, _Fake)
    return [out, *saved]


@torch.library.custom_op("opendit::adaln_block_backward", mutates_args=())
def _operator_backward(
    dout: Tensor,
    x: Tensor,
    c: Tensor,
    flat: list[Tensor],
    saved: list[Tensor],
    heads: int,
    eps_a: float,
    eps_m: float,
    tanh: bool,
    attention: str,
    keep: str,
    dtype: torch.dtype,
    counts: list[int],
    in_fp8: bool,
    wide: bool,
    wants: list[bool],
) -> list[Tensor]:
    """The wanted gradients, in the order of (x, c, *PARAMETERS)."""
    static = Static(heads, eps_a, eps_m, tanh, attention, keep, dtype, tuple(counts), in_fp8, wide)
    with torch.cuda.device_of(x):
        grads = backward(dout, x, c, grouped(flat, counts), saved, static, wants)
    return [grads[name] for name in _GRADIENTS if name in grads]


@_operator_backward.register_fake
def _(dout: Tensor, x: Tensor, c: Tensor, flat: list[Tensor], saved: list[Tensor], *more: Any) -> list[Tensor]:
    counts, _, _, wants = more[-4:]
    return [like.new_empty(like.shape) for like in _likes(x, c, grouped(flat, counts), wants).values()]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, c, flat, *static = inputs
    ctx.static = static
    ctx.many = len(flat)
    ctx.save_for_backward(x, c, *flat, *output[1:])


def _gradients(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, c, *rest = ctx.saved_tensors
    flat, saved = rest[: ctx.many], rest[ctx.many :]
    static = Static(*ctx.static)
    counts = static.counts
    needs = ctx.needs_input_grad
    wants = [True, needs[1], *(any(group) for group in grouped(needs[2], counts))]
    found = iter(_operator_backward(grads[0], x, c, flat, saved, *ctx.static, wants))
    named = {name: next(found) for name, want in zip(_GRADIENTS, wants, strict=True) if want}
    return (
        named["x"],
        named.get("c"),
        _for_parameters(named, [p.shape for p in flat], static),
        *(None,) * len(ctx.static),
    )


_operator.register_autograd(_gradients, setup_context=_save)
