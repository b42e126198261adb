# ruff: noqa: B023, PERF203, RUF059
"""Check and time packed attention over launch parameters: python tools_tune/attention_tune.py [--budget 150] [--dry].

Throwaway. Kernels are compiled by a pool of processes into one cache folder first; then everything is timed here.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

START = time.perf_counter()
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="triton-tune-"))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from opendit.kernels import packed_attention as pa  # noqa: E402
from opendit.kernels._attention import Backward, Launch, backward_launch  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"
MAIN = (256, 256, 16, 72)
SHAPES = [MAIN, (64, 1024, 16, 72), (1, 16384, 16, 72), (256, 256, 12, 64), (32, 1024, 16, 128), (4, 4096, 16, 72)]
CHECKS = [(4, 256, 16, 72), (2, 1024, 16, 72), (1, 333, 16, 72), (2, 100, 16, 128)]
if DRY:
    MAIN = (2, 64, 2, 72)
    SHAPES, CHECKS = [MAIN, (1, 64, 1, 64)], [(1, 33, 1, 72)]

# (queries, keys, warps, stages, register cap)
FORWARD = {
    72: [(64, 64, 4, 2, 0), (64, 64, 4, 2, 128), (64, 64, 4, 3, 0), (64, 32, 4, 2, 0), (64, 32, 4, 3, 0),
         (64, 128, 4, 2, 0), (64, 128, 4, 2, 168), (128, 64, 8, 2, 0), (128, 64, 8, 2, 128), (128, 64, 8, 3, 128),
         (128, 32, 8, 2, 0), (128, 32, 8, 3, 0), (128, 128, 8, 2, 0), (128, 64, 4, 2, 0), (128, 32, 4, 3, 0),
         (64, 64, 4, 1, 0)],
    64: [(64, 64, 4, 2, 0), (64, 64, 4, 3, 0), (64, 128, 4, 2, 0), (128, 64, 8, 2, 0), (128, 64, 4, 2, 0),
         (128, 64, 4, 3, 0), (128, 128, 8, 2, 0)],
    128: [(64, 64, 4, 2, 0), (128, 64, 8, 2, 0), (128, 64, 8, 3, 0), (128, 64, 8, 2, 128), (128, 128, 8, 2, 0),
          (128, 32, 8, 3, 0), (64, 64, 4, 3, 0)],
}  # fmt: skip
QUERIES = {
    72: [(64, 64, 4, 2, 0), (64, 64, 4, 2, 128), (64, 64, 4, 3, 0), (64, 32, 4, 2, 0), (64, 32, 4, 3, 0),
         (64, 128, 4, 2, 0), (128, 64, 8, 2, 0), (128, 32, 8, 2, 0), (128, 32, 8, 3, 0), (128, 32, 8, 2, 128),
         (64, 64, 4, 1, 0), (128, 128, 8, 2, 0)],
    64: [(64, 64, 4, 2, 0), (64, 64, 4, 3, 0), (64, 32, 4, 3, 0), (128, 64, 8, 2, 0), (128, 32, 8, 3, 0),
         (64, 128, 4, 2, 0)],
    128: [(64, 32, 4, 2, 0), (64, 64, 4, 2, 0), (64, 64, 4, 2, 168), (128, 64, 8, 2, 0), (128, 32, 8, 2, 0),
          (128, 32, 8, 3, 0)],
}  # fmt: skip
KEYS = {
    72: [(32, 64, 4, 2, 0), (32, 64, 4, 3, 0), (32, 64, 4, 3, 168), (64, 64, 4, 2, 0), (64, 64, 4, 2, 168),
         (64, 64, 4, 1, 0), (16, 64, 4, 3, 0), (32, 128, 8, 2, 0), (32, 128, 8, 3, 0), (64, 128, 8, 2, 0),
         (64, 128, 8, 1, 0), (64, 64, 8, 2, 0), (64, 64, 8, 2, 128), (128, 64, 8, 2, 0)],
    64: [(32, 64, 4, 2, 0), (32, 64, 4, 3, 0), (64, 64, 4, 2, 0), (32, 128, 8, 2, 0), (64, 128, 8, 2, 0),
         (64, 64, 4, 2, 168), (64, 64, 8, 2, 128)],
    128: [(32, 64, 4, 2, 0), (32, 128, 8, 2, 0), (64, 128, 8, 2, 0), (64, 64, 8, 2, 0), (64, 64, 4, 2, 0),
          (16, 64, 4, 2, 0)],
}  # fmt: skip
# ... and programs. Only short L: the scratch must stay in the L2 cache.
JOINT = [(64, 128, 8, 2, 0, 132), (64, 128, 8, 1, 0, 132), (64, 64, 8, 2, 0, 132), (64, 64, 4, 2, 0, 264),
         (64, 64, 4, 1, 0, 264), (64, 128, 8, 2, 0, 4096)]  # fmt: skip
ATOMIC = [(64, 128, 8, 2, 0), (64, 64, 4, 2, 0), (64, 64, 8, 2, 0)]
FORWARD_K, QUERIES_K, KEYS_K = "attention_forward", "attention_backward_queries", "attention_backward_keys"


class Recorder:
    """Stands in for ``direct``: runs only the kernels named (all if none) and keeps what was compiled."""

    def __init__(self, *only: str) -> None:
        self.only, self.compiled = only, {}

    def __call__(self, kernel):
        name = kernel.fn.__name__

        class Launcher:
            def __getitem__(_, grid):
                def run(*args, **kwargs):
                    if not self.only or name in self.only:
                        self.compiled[name] = kernel[grid](*args, **kwargs)

                return run

        return Launcher()

    def stats(self) -> str:
        return " ".join(
            f"{getattr(k, 'n_regs', '?')}r/{getattr(k, 'n_spills', '?')}sp/{k.metadata.shared // 1024}K"
            for n, k in self.compiled.items()
            if n.startswith("attention") and k is not None
        )


def tensors(shape, batch=None, dtype=torch.bfloat16):
    B, L, H, K = shape
    B = batch or B
    qkv = torch.randn(B, L, 3, H, K, dtype=dtype, device=DEVICE)
    dout = torch.randn(B, L, H, K, dtype=dtype, device=DEVICE)
    out, lse = qkv[:, :, 0].contiguous(), torch.full((B, H, L), 5.0, device=DEVICE)
    return qkv, dout, out, lse


def call(job, data):
    """(recorder, function) of one job ("forward" | "queries" | "keys" | "joint" | "atomic", shape, parameters)."""
    kind, shape, params = job
    scale = shape[3] ** -0.5
    qkv, dout, out, lse = data
    tile = Launch(*params[:5])
    if kind == "forward":
        record = Recorder()
        return record, lambda: pa.launch_forward(qkv, scale, record, tile)
    if kind in ("joint", "atomic"):
        record = Recorder()
        delta = Launch(64, 64, 4, 2)
        launch = Backward(kind, keys=tile, queries=delta, programs=params[5] if kind == "joint" else 132)
    else:
        record = Recorder(QUERIES_K if kind == "queries" else KEYS_K)
        launch = Backward("split", keys=tile, queries=tile)
    return record, lambda: pa.launch_backward(dout, qkv, out, lse, scale, True, record, launch)


def warm(job):
    """Compile one job in a worker, on one sample: the kernels depend on L's divisibility, H and K, not on B."""
    started = time.perf_counter()
    try:
        record, fn = call(job, tensors(job[1], batch=1))
        fn()
        if not DRY:
            torch.cuda.synchronize()
        return job, None, time.perf_counter() - started
    except Exception as error:
        return job, f"{type(error).__name__}: {str(error)[:120]}", time.perf_counter() - started


def bench(fn) -> float:
    if DRY:
        fn()
        return 1.0
    from triton.testing import do_bench

    return do_bench(fn, warmup=4, rep=25, return_mode="median")


def error(got, want) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def check(shape, results) -> None:
    qkv, dout, _, _ = tensors(shape)
    wide = qkv.double().requires_grad_()
    want = pa.packed_attention_reference(wide)
    (want_grad,) = torch.autograd.grad(want, wide, dout.double())
    want = want.detach()
    leaf = qkv.detach().requires_grad_()
    theirs = F.scaled_dot_product_attention(*leaf.transpose(1, 3).unbind(2)).transpose(1, 2)
    (their_grad,) = torch.autograd.grad(theirs, leaf, dout)
    out, lse = pa.forward(qkv)
    row = {"out": error(out, want) / error(theirs.detach(), want)}
    for variant in ("split", "joint", "atomic"):
        try:
            launch = backward_launch(shape[1], shape[3], 2, variant)
            run = lambda launch=launch: pa.backward(dout, qkv, out, lse, bias_sums=True, launch=launch)  # noqa: E731
            dqkv, sums = run()
            for i, name in enumerate(("dq", "dk", "dv")):
                exact = want_grad[:, :, i]
                row[f"{variant} {name}"] = error(dqkv[:, :, i], exact) / error(their_grad[:, :, i], exact)
            exact = want_grad.sum((0, 1)).flatten()
            row[f"{variant} sums"] = error(sums, exact) / error(their_grad.double().sum((0, 1)).flatten(), exact)
            again = [run() for _ in range(5)]
            row[f"{variant} repeats"] = float(all(torch.equal(a, dqkv) and torch.equal(s, sums) for a, s in again))
        except Exception as problem:
            row[variant] = f"{type(problem).__name__}: {str(problem)[:150]}"
    results["checks"][str(shape)] = row
    print(f"check {shape} (error / SDPA's error, repeats 1 = identical):", flush=True)
    print(
        "   " + "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items()), flush=True
    )


def baseline(shape) -> dict[str, float]:
    """cuDNN: forward, backward, backward with its gradients packed."""
    qkv, dout, _, _ = tensors(shape)
    q, k, v = (t.transpose(1, 2).detach().requires_grad_() for t in qkv.unbind(2))
    dout = dout.transpose(1, 2)
    with sdpa_kernel([SDPBackend.MATH] if DRY else [SDPBackend.CUDNN_ATTENTION]):
        out = F.scaled_dot_product_attention(q, k, v)
        grad = lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)  # noqa: E731
        pack = lambda: torch.stack([g.transpose(1, 2) for g in grad()], 2)  # noqa: E731
        with torch.no_grad():
            forward = bench(lambda: F.scaled_dot_product_attention(q, k, v))
        return {"forward": forward, "backward": bench(grad), "backward+pack": bench(pack)}


def jobs_for(shape):
    K, few = shape[3], shape != MAIN
    jobs = [("forward", shape, p) for p in FORWARD[K]]
    jobs += [("queries", shape, p) for p in QUERIES[K]]
    jobs += [("keys", shape, p) for p in KEYS[K]]
    if shape[1] <= 512:
        jobs += [("joint", shape, p) for p in (JOINT[:3] if few else JOINT)]
    if shape[1] >= 1024:
        jobs += [("atomic", shape, p) for p in ATOMIC]
    if DRY:
        seen = {}
        jobs = [j for j in jobs if seen.setdefault(j[0], j) is j]
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, default=150.0, help="seconds in all")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--workers", type=int, default=14)
    args = parser.parse_args()
    elapsed = lambda: time.perf_counter() - START  # noqa: E731
    results = {"checks": {}, "shapes": {}}
    folder = os.environ.get("OUT", tempfile.gettempdir())

    def save() -> None:
        with open(os.path.join(folder, "attention_tune.json"), "w") as file:
            json.dump(results, file, indent=1)

    if not DRY:
        print(torch.cuda.get_device_name(), torch.__version__, flush=True)
        unique = {}  # L only enters through divisibility, and joint's number of key blocks
        for shape in SHAPES:
            for job in jobs_for(shape):
                unique.setdefault((job[0], shape[2:], shape[1] if job[0] == "joint" else 0, job[2][:5]), job)
        todo = sorted(unique.values(), key=lambda j: (j[0] != "joint", j[1] != MAIN, j[2]))
        workers = min(args.workers, os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(warm, job) for job in todo]):
                try:
                    job, problem, took = future.result()
                except Exception as broken:
                    print("  worker died:", str(broken)[:150], flush=True)
                    continue
                if problem or took > 20:
                    print(f"  {job[0]} {job[1]} {job[2]}: {problem or ''} {took:.0f} s", flush=True)
        print(f"{len(todo)} launches compiled at {elapsed():.0f} s", flush=True)

    for shape in CHECKS:
        try:
            check(shape, results)
        except Exception as problem:
            print("check", shape, type(problem).__name__, str(problem)[:300], flush=True)
    print(f"checked at {elapsed():.0f} s", flush=True)
    save()

    for shape in SHAPES:
        if elapsed() > args.budget * 0.93:
            print("out of time before", shape, flush=True)
            continue
        try:
            base = baseline(shape)
        except Exception as problem:
            base = {"error": str(problem)[:150]}
        print(f"\n{shape} cuDNN:", {k: round(v, 3) if isinstance(v, float) else v for k, v in base.items()}, flush=True)
        found: dict[str, list] = {}
        data = list(tensors(shape))
        data[2], data[3] = pa.forward(data[0])  # a real lse: garbage ones overflow and slow nothing, but look odd
        for job in jobs_for(shape):
            if elapsed() > args.budget * 0.97:
                break
            try:
                record, fn = call(job, data)
                fn()
                found.setdefault(job[0], []).append((bench(fn), job[2], record.stats()))
            except Exception as problem:
                print(f"  {job[0]} {job[2]}: {type(problem).__name__}: {str(problem)[:100]}", flush=True)
        for kind, rows in found.items():
            rows.sort(key=lambda row: row[0])
            for ms, params, stats in rows[: 16 if shape == MAIN else 5]:
                print(f"  {kind:8} {ms:8.3f} ms  {','.join(map(str, params)):20} {stats}", flush=True)
        whole = {}
        if "queries" in found and "keys" in found:
            launch = Backward("split", keys=Launch(*found["keys"][0][1]), queries=Launch(*found["queries"][0][1]))
            qkv, dout, out, lse = data
            for sums in (False, True):
                whole[f"split, sums={sums}"] = bench(
                    lambda s=sums, la=launch: pa.launch_backward(dout, qkv, out, lse, shape[3] ** -0.5, s, launch=la)
                )
            print("  best split backward in whole:", {k: round(v, 3) for k, v in whole.items()}, flush=True)
        results["shapes"][str(shape)] = {"cudnn": base, "whole": whole, **found}
        save()
    print(f"done at {elapsed():.0f} s", flush=True)


if __name__ == "__main__":
    main()
