"""Every kernel against its specification: values and every gradient, on the GPU or in Triton's interpreter."""

import inspect
import random
from types import SimpleNamespace

import pytest
import torch

from opendit.kernels import backend as backends
from opendit.kernels import layernorm as layernorm_file
from opendit.kernels.spec import KernelSpec, discover
from tests.kernels.checking import TOLERANCE, Case, as_tuple, check, gradients, make_inputs, relative_error

pytest.importorskip("triton")

SPECS = discover()
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
FUSED = SPECS["gate_residual_layernorm_modulate"]
NORMS = ("layernorm_modulate", "rmsnorm_modulate")
# Elementwise, or of heads: as wide as may be.
NOT_BY_ROWS = ("gelu", "swiglu", "qk_norm_rope")


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request: pytest.FixtureRequest) -> KernelSpec:
    return request.param


def takes(spec: KernelSpec, argument: str) -> bool:
    return argument in inspect.signature(spec.fn).parameters


def test_discovery_finds_every_kernel() -> None:
    assert set(SPECS) == {
        *("layernorm", "layernorm_modulate", "gate_residual", "gelu", FUSED.name),
        *("rmsnorm_modulate", "gate_residual_rmsnorm_modulate", "swiglu", "qk_norm_rope"),
    }


# Rows past and short of a tile, one row, one element, widths on, just above and just below the two pieces' sizes.
SHAPES = [(2, 1, 1), (3, 1, 7), (2, 7, 100), (1, 257, 8), (7, 5, 2), (2, 17, 257), (3, 33, 1152), (2, 2, 8192)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_values_and_gradients(spec: KernelSpec, shape: tuple[int, int, int], device: torch.device) -> None:
    eps = {"eps": 1e-6 if shape[2] > 2 else 1.0} if takes(spec, "eps") else {}
    check(spec, Case(*shape, kwargs=eps), device)


@pytest.mark.parametrize(
    ("dtype", "mod_dtype"), [(F32, F16), (F32, BF16), (BF16, BF16), (F16, F16), (BF16, F32), (F16, BF16)]
)
def test_mixed_dtypes(spec: KernelSpec, dtype: torch.dtype, mod_dtype: torch.dtype, device: torch.device) -> None:
    check(spec, Case(2, 9, 100, dtype, mod_dtype), device)
    check(spec, Case(2, 9, 100, dtype, mod_dtype, spec.optional()), device)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "columns", "expanded"])
def test_layouts_of_inputs_and_gradients(spec: KernelSpec, layout: str, device: torch.device) -> None:
    check(spec, Case(3, 6, 24, layout=layout), device)


def test_gradients_without_strides(spec: KernelSpec, device: torch.device) -> None:
    inputs = make_inputs(spec, Case(2, 5, 12), device)
    exact = {k: t.detach().double().requires_grad_() for k, t in inputs.items()}
    sum(o.sum() for o in as_tuple(spec.fn(**inputs, backend="triton"))).backward()
    sum(o.sum() for o in as_tuple(spec.reference(**exact))).backward()
    for name, tensor in inputs.items():
        assert relative_error(tensor.grad, exact[name].grad) < 1e-5, name


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 0, 1)])
def test_empty(spec: KernelSpec, shape: tuple[int, int, int], device: torch.device) -> None:
    check(spec, Case(*shape), device)
    check(spec, Case(*shape, optional=spec.optional()), device)


@pytest.mark.parametrize("names", [("weight", "bias"), ("weight",), ("bias",)])
def test_affine(spec: KernelSpec, names: tuple[str, ...], device: torch.device) -> None:
    if not set(names) <= set(spec.optional()):
        pytest.skip("has no affine parameters")
    check(spec, Case(3, 5, 100, optional=names), device)


def test_only_needed_gradients(spec: KernelSpec, device: torch.device) -> None:
    names = list(spec.inputs)
    for needs in [[], *([name] for name in names), names[::2], names[1:]]:
        check(spec, Case(2, 5, 12, optional=spec.optional(), needs=needs), device)


@pytest.mark.parametrize("unused", [("residual",), ("modulated",)])
@pytest.mark.parametrize("norm", NORMS)
def test_one_output_unused(norm: str, unused: tuple[str, ...], device: torch.device) -> None:
    for needs in (None, ["x", "gate"], ["y"], ["shift"]):
        fused = SPECS[f"gate_residual_{norm}"]
        check(fused, Case(2, 5, 12, optional=("weight", "bias"), needs=needs), device, unused)


@pytest.mark.parametrize("norm", NORMS)
def test_fused_is_the_two_kernels_in_turn(norm: str, device: torch.device) -> None:
    for dtype in (F32, BF16):
        fused = SPECS[f"gate_residual_{norm}"]
        kw = make_inputs(fused, Case(2, 9, 100, dtype, BF16), device)
        residual, modulated = fused.fn(**kw, backend="triton")
        first = SPECS["gate_residual"].fn(kw["x"], kw["y"], kw["gate"], backend="triton")
        second = SPECS[norm].fn(residual, kw["shift"], kw["scale"], backend="triton")
        assert torch.equal(residual, first)
        if device.type == "cuda":  # other launches add up a row in another order
            assert relative_error(modulated, second.double()) <= TOLERANCE[modulated.dtype]
        else:
            assert torch.equal(modulated, second)


def test_output_dtypes(spec: KernelSpec, device: torch.device) -> None:
    for backend in ("triton", "reference"):
        for dtype, mod_dtype, promoted in [(F32, BF16, F32), (BF16, BF16, BF16), (BF16, F16, F32), (F16, F32, F32)]:
            inputs = make_inputs(spec, Case(2, 3, 8, dtype, mod_dtype), device)
            expected = promoted if "BD" in spec.inputs.values() else dtype
            assert {o.dtype for o in as_tuple(spec.fn(**inputs, backend=backend))} == {expected}
            if takes(spec, "out_dtype"):
                for asked in (BF16, torch.float64):
                    outputs = as_tuple(spec.fn(**inputs, backend=backend, out_dtype=asked))
                    assert outputs[-1].dtype == asked
                    assert all(o.is_contiguous() for o in outputs)


def test_a_residual_of_another_dtype_than_its_gate(device: torch.device) -> None:
    gating = SPECS["gate_residual"]
    for dtype, gate, asked in ((BF16, F32, BF16), (F32, BF16, F16), (F16, F32, F32)):
        check(gating, Case(2, 5, 12, dtype, gate, kwargs={"residual_dtype": asked}), device)
        kw = make_inputs(FUSED, Case(2, 5, 12, dtype, gate, FUSED.optional()), device)
        found = {}
        for backend in ("triton", "reference"):
            options = {"backend": backend, "residual_dtype": asked}
            outputs = FUSED.fn(**kw, **options)
            assert [o.dtype for o in outputs] == [asked, F32]
            in_turn = gating.fn(kw["x"], kw["y"], kw["gate"], **options)
            affine = {name: kw[name] for name in ("shift", "scale", "weight", "bias")}
            in_turn = in_turn, SPECS["layernorm_modulate"].fn(in_turn, **affine, out_dtype=F32, backend=backend)
            for one, two in zip(outputs, in_turn, strict=True):
                if backend == "triton" and device.type == "cuda":  # two launches need not sum in one order
                    assert relative_error(one, two.double()) <= TOLERANCE[asked]
                else:
                    assert torch.equal(one, two)
            ones = [torch.ones_like(o) for o in outputs]
            found[backend] = gradients(outputs, kw, ones)
            for name, expected in gradients(in_turn, kw, ones).items():
                torch.testing.assert_close(found[backend][name], expected, rtol=2e-2, atol=2e-2)
    for spec in (gating, FUSED):
        refused(spec, ValueError, "residual_dtype", "int32", residual_dtype=torch.int32)
        refused(spec, TypeError, "residual_dtype", "float16", residual_dtype="float16")


def test_repeats_are_bit_identical(spec: KernelSpec, device: torch.device) -> None:
    runs = 1000 if device.type == "cuda" else 3
    B, L, D = (3, 1021, 1152) if device.type == "cuda" else (2, 70, 24)
    inputs = make_inputs(spec, Case(B, L, D, F32, BF16, spec.optional()), device)
    first = None
    for _ in range(runs):
        outputs = as_tuple(spec.fn(**inputs, backend="triton"))
        grads = gradients(outputs, inputs, [torch.ones_like(o) for o in outputs])
        results = [*outputs, *grads.values()]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_first_order_only(spec: KernelSpec, device: torch.device) -> None:
    inputs = make_inputs(spec, Case(2, 3, 8), device)
    output = as_tuple(spec.fn(**inputs, backend="triton"))[-1]
    of = inputs["x" if "x" in inputs else "k"]
    (grad,) = torch.autograd.grad(output.square().sum(), of, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_reference_passes_gradcheck(spec: KernelSpec) -> None:
    inputs = make_inputs(spec, Case(2, 3, 5, optional=spec.optional()), torch.device("cpu"))
    leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs.values()]
    torch.autograd.gradcheck(lambda *args: spec.fn(**dict(zip(inputs, args, strict=True))), leaves)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_under_autocast_and_checkpointing(spec: KernelSpec, checkpointed: bool, device: torch.device) -> None:
    """Neither changes a bit: a kernel's dtypes are its arguments', and recomputing repeats it."""
    inputs = make_inputs(spec, Case(2, 5, 24, F32, BF16), device)

    def run() -> list[torch.Tensor]:
        outputs = as_tuple(spec.fn(**inputs, backend="triton"))
        return [*outputs, *gradients(outputs, inputs, [torch.ones_like(o) for o in outputs]).values()]

    def run_inside() -> list[torch.Tensor]:
        if checkpointed:
            fn = lambda: spec.fn(**inputs, backend="triton")  # noqa: E731
            outputs = as_tuple(torch.utils.checkpoint.checkpoint(fn, use_reentrant=False))
        else:
            with torch.autocast(device.type, dtype=BF16):
                outputs = as_tuple(spec.fn(**inputs, backend="triton"))
        return [*outputs, *gradients(outputs, inputs, [torch.ones_like(o) for o in outputs]).values()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run_inside(), strict=True))


@pytest.mark.parametrize("affine", [False, True])
def test_compiles_as_one_graph(spec: KernelSpec, affine: bool, device: torch.device) -> None:
    inputs = make_inputs(spec, Case(2, 5, 24, optional=spec.optional() if affine else ()), device)
    torch.compiler.reset()
    compiler = "inductor" if device.type == "cuda" else "aot_eager"  # Inductor cannot take an interpreted kernel in
    compiled = torch.compile(lambda **kw: spec.fn(**kw, backend="triton"), fullgraph=True, backend=compiler)

    def run(fn) -> list[torch.Tensor]:
        outputs = as_tuple(fn(**inputs))
        return [*outputs, *gradients(outputs, inputs, [torch.ones_like(o) for o in outputs]).values()]

    for eager, traced in zip(run(lambda **kw: spec.fn(**kw, backend="triton")), run(compiled), strict=True):
        assert eager.dtype == traced.dtype
        assert relative_error(traced, eager.double()) < 1e-6


@pytest.mark.parametrize("unused", [0, 1])
def test_compiled_with_one_output_unused(unused: int, device: torch.device) -> None:
    inputs = make_inputs(FUSED, Case(2, 5, 24), device)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda **kw: FUSED.fn(**kw, backend="triton")[1 - unused], fullgraph=True, backend="aot_eager"
    )
    eager = FUSED.fn(**inputs, backend="triton")[1 - unused]
    ones = torch.ones_like(eager)
    expected = gradients((eager,), inputs, [ones])
    found = gradients((compiled(**inputs),), inputs, [ones])
    for name, grad in expected.items():
        zero = torch.zeros_like(inputs[name])
        assert (
            relative_error(zero if found[name] is None else found[name], (zero if grad is None else grad).double())
            < 1e-6
        )


def random_case(spec: KernelSpec, seed: int) -> Case:
    """A small random shape: every program of the interpreter costs milliseconds."""
    pick = random.Random(seed)
    D = pick.choice([pick.randint(3, 40), pick.randint(41, 300), pick.choice([384, 768, 1000, 1152, 1536])])
    dtype, mod_dtype = pick.choice([(F32, F32), (F32, F32), (F32, F16), (F16, F16)])
    return Case(
        B=pick.choice([1, 2, 2, 3, 3, 5]),
        L=pick.choice([1, 2, pick.randint(3, 16), pick.randint(3, 16), pick.randint(17, 40)]),
        D=D,
        dtype=dtype,
        mod_dtype=mod_dtype,
        optional=pick.choice([(), spec.optional()]),
        layout=pick.choice(["dense", "dense", "transposed", "sliced", "columns"]),
        seed=seed,
    )


def fuzz(spec: KernelSpec, seeds: range, device: torch.device) -> None:
    for seed in seeds:
        check(spec, random_case(spec, seed), device)


def test_fuzz(spec: KernelSpec, device: torch.device) -> None:
    # Every new width is compiled on a GPU, which takes seconds; the interpreter has no compiler to wait for.
    # RMSNorm's kernels are LayerNorm's without a mean, and those of heads have tests of their own.
    few = "rmsnorm" in spec.name or spec.name in ("swiglu", "qk_norm_rope")
    cases = 8 if few else 60
    fuzz(spec, range(cases if device.type == "cpu" else 12), device)


@pytest.mark.slow
def test_fuzz_more(spec: KernelSpec, device: torch.device) -> None:
    fuzz(spec, range(60, 360), device)


def test_auto_is_the_reference_on_cpu(spec: KernelSpec) -> None:
    inputs = make_inputs(spec, Case(2, 3, 8), torch.device("cpu"))
    automatic, reference = as_tuple(spec.fn(**inputs)), as_tuple(spec.reference(**inputs))
    assert all(torch.equal(a, b) for a, b in zip(automatic, reference, strict=True))


# -- half precision on the GPU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [CUDA], indirect=True)
@pytest.mark.parametrize("dtypes", [(F32, BF16), (BF16, BF16), (F16, F16)], ids=str)
@pytest.mark.parametrize("shape", [(4, 256, 1152), (2, 1000, 768), (3, 77, 1000)], ids=str)
def test_no_less_accurate_than_unaccelerated(
    spec: KernelSpec, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int], device: torch.device
) -> None:
    """Outputs and gradients err at most 1.2 times as much as the upstream formula does in the same precision."""
    inputs = make_inputs(spec, Case(*shape, *dtypes), device)
    exact_inputs = {k: t.detach().double().requires_grad_() for k, t in inputs.items()}
    exact = as_tuple(spec.reference(**exact_inputs))
    ours = as_tuple(spec.fn(**inputs, backend="triton"))
    if dtypes[0] is dtypes[1]:
        theirs = as_tuple(spec.upstream(**inputs))
    else:
        with torch.autocast("cuda", dtype=dtypes[1]):
            theirs = as_tuple(spec.upstream(**inputs))
    incoming = [torch.randn_like(o) for o in ours]
    results = [
        (
            *outputs,
            *gradients(outputs, leaves, [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=True)]).values(),
        )
        for outputs, leaves in ((ours, inputs), (theirs, inputs), (exact, exact_inputs))
    ]
    names = [*spec.outputs, *(f"d_{name}" for name in inputs)]
    for name, own, other, truth in zip(names, *results, strict=True):
        budget = 1.2 * relative_error(other, truth.detach()) + 1e-6
        assert relative_error(own, truth.detach()) <= budget, name


@pytest.mark.parametrize("device", [CUDA], indirect=True)
def test_more_than_2_to_the_31_elements(spec: KernelSpec, device: torch.device) -> None:
    """Sample by sample, a tensor whose offsets pass 2**31 gives what its slices give."""
    B, L, D = 3, 932_068, 1152 - 384  # 3 · 932068 · 768 = 2147484672
    assert B * L * D > 2**31
    inputs = make_inputs(spec, Case(B, L, D, BF16, BF16), device)

    def run(kw: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        leaves = {k: t.detach().requires_grad_() for k, t in kw.items()}
        outputs = as_tuple(spec.fn(**leaves, backend="triton"))
        grads = gradients(outputs, leaves, [o.detach() for o in outputs])
        return [o.detach() for o in outputs] + [g for g in grads.values() if g.ndim == 3]

    whole = run(inputs)
    for b in range(B):
        part = run({k: t[b : b + 1] for k, t in inputs.items()})
        for a, e in zip(whole, part, strict=True):
            assert torch.equal(a[b : b + 1], e)


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(spec: KernelSpec, error: type[Exception], *words: str, **change: object) -> None:
    inputs: dict = {**make_inputs(spec, Case(2, 3, 8, optional=spec.optional()), torch.device("cpu")), **change}
    with pytest.raises(error) as caught:
        spec.fn(**inputs)
    for word in (spec.name, *words):
        assert word in str(caught.value), str(caught.value)


def test_eps_may_be_any_real_number() -> None:
    np = pytest.importorskip("numpy")
    x = torch.randn(2, 3, 8)
    for eps in (np.float32(1e-2), np.float64(1e-2), 1):
        expected = layernorm_file.layernorm(x, eps=float(eps))
        assert torch.equal(layernorm_file.layernorm(x, eps=eps), expected)


def test_bad_arguments(spec: KernelSpec) -> None:
    for name, kind in spec.inputs.items():
        refused(spec, TypeError, name, "list", **{name: [1.0]})
        if not kind.endswith("?"):
            refused(spec, TypeError, name, "NoneType", **{name: None})
        wrong = torch.zeros(5, 3)
        if not (spec.name == "layernorm" and name == "x"):
            refused(spec, ValueError, name, "(5, 3)", **{name: wrong})
        right = torch.zeros(spec.shape(name, 2, 3, 8))
        refused(spec, TypeError, name, "int64", **{name: right.long()})
        if name != "x":
            refused(spec, ValueError, name, "meta", "cpu", **{name: right.to("meta")})
    refused(spec, ValueError, "backend", "'fast'", "'triton'", backend="fast")
    if takes(spec, "eps"):
        for eps in (0.0, -1.0, float("nan")):
            refused(spec, ValueError, "eps", str(eps), eps=eps)
        refused(spec, TypeError, "eps", "str", eps="1e-6")
        refused(spec, ValueError, "out_dtype", "int32", out_dtype=torch.int32)
        refused(spec, TypeError, "out_dtype", "float16", out_dtype="float16")
    if spec.name != "layernorm":
        refused(spec, ValueError, "apex", "layernorm", backend="apex")


def test_rows_too_wide_for_triton(spec: KernelSpec, device: torch.device) -> None:
    if spec.name in NOT_BY_ROWS:
        pytest.skip("holds no row as a whole")
    inputs = make_inputs(spec, Case(1, 2, 8193), device)
    with pytest.raises(ValueError, match=r"8192.*reference"):
        spec.fn(**inputs, backend="triton")
    spec.fn(**inputs)


def test_float64_is_for_the_reference(spec: KernelSpec, device: torch.device) -> None:
    inputs = make_inputs(spec, Case(1, 2, 8, torch.float64, torch.float64), device)
    with pytest.raises(ValueError, match=r"float64.*reference"):
        spec.fn(**inputs, backend="triton")
    assert as_tuple(spec.fn(**inputs))[0].dtype is torch.float64


def test_why_a_backend_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(backends, "INTERPRETING", False)
    assert backends.unavailable("auto", cpu, "layernorm") is None
    assert backends.unavailable("reference", cpu, "layernorm") is None
    assert backends.unavailable("triton", cuda, "layernorm") is None
    assert "TRITON_INTERPRET" in (backends.unavailable("triton", cpu, "layernorm") or "")
    assert "CUDA" in (backends.unavailable("apex", cpu, "layernorm") or "")
    monkeypatch.setattr(backends, "apex_layer_norm", lambda: None)
    assert "github.com/NVIDIA/apex" in (backends.unavailable("apex", cuda, "layernorm") or "")
    monkeypatch.setattr(backends, "TRITON_INSTALLED", False)
    assert "pip install" in (backends.unavailable("triton", cuda, "layernorm") or "")
    with pytest.raises(ValueError, match="backend"):
        backends.unavailable("fast", cpu, "layernorm")


def test_triton_needs_a_gpu_unless_interpreting(spec: KernelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "INTERPRETING", False)
    refused(spec, ValueError, "triton", "cpu", "TRITON_INTERPRET=1", backend="triton")


def test_apex_gets_whole_affines_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for apex, which is seldom installed: what reaches it, and what comes back."""
    affine = torch.nn.functional.layer_norm

    def fused_layer_norm_affine(x, weight, bias, shape, eps):
        assert weight.dtype is bias.dtype is x.dtype
        return affine(x, shape, weight, bias, eps)

    stand_in = SimpleNamespace(
        fused_layer_norm_affine=fused_layer_norm_affine,
        fused_layer_norm=lambda x, shape, eps: affine(x, shape, eps=eps),
    )
    monkeypatch.setattr(layernorm_file, "apex_layer_norm", lambda: stand_in)
    monkeypatch.setattr(backends, "unavailable", lambda *_: None)
    for names in ((), ("weight",), ("bias",), ("weight", "bias")):
        check(SPECS["layernorm"], Case(2, 3, 12, optional=names), torch.device("cpu"), backend="apex")
        check(SPECS["layernorm"], Case(2, 3, 12, BF16, F32, optional=names), torch.device("cpu"), backend="apex")
