"""What the benchmarks share: what they ran on, how they time, and the record they leave."""

import datetime
import getpass
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """The GPU's short name in lower case, such as "h200", or "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name().lower().split()
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "tesla"))


def hardware() -> dict[str, Any]:
    """The machine, as a result file names it."""
    found: dict[str, Any] = {"cpu": platform.machine(), "python": platform.python_version()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = _output(query).splitlines()[:1]
    return found


def versions(*packages: str) -> dict[str, str]:
    """Versions of torch, CUDA, triton and the packages named, where installed."""
    found = {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    return found | {package: installed.get(package, "not installed") for package in ("triton", *packages)}


def commit() -> str:
    """The checked-out commit, with "+changes" where the measured code differs from it.

    Where there are files and no git history, the environment variable BENCHMARK_COMMIT may name it.
    """
    head = _output(["git", "rev-parse", "--verify", "--quiet", "HEAD"])
    changed = _output(["git", "status", "--porcelain", "--", "opendit", "benchmarks/*.py"])
    return head + ("+changes" if changed else "") if head else os.environ.get("BENCHMARK_COMMIT", "unknown")


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    except OSError:
        return ""
    return done.stdout.strip()


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and count of the samples."""
    ordered = sorted(samples)
    quartiles = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else [ordered[0]] * 3
    return {"median": quartiles[1], "q1": quartiles[0], "q3": quartiles[2], "samples": len(ordered)}


def time_graph(
    calls: Sequence[Callable[[], Any]], repeats: int = 20, stream: torch.cuda.Stream | None = None
) -> list[float]:
    """Milliseconds of one call, ``repeats`` samples: all calls captured in one CUDA graph, whose replays are timed.

    A graph leaves out the host's work, which a long queue hides in training and which would drown a short kernel. The
    calls should use different tensors, so that the cache does not serve one call with the last one's data; what they
    return is kept, for the same reason. ``stream``: the side stream to capture on, which for a backward must be the one
    its forward ran on. Without CUDA the calls are timed by the clock.
    """
    if not torch.cuda.is_available():
        return [_clock(calls) for _ in range(min(repeats, 3))]
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    # Other threads, such as NCCL's watchdog, may ask the device how things stand meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        kept += [call() for call in calls]
    samples = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / len(calls))
    return samples[2:]


def _clock(calls: Sequence[Callable[[], Any]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e3 / len(calls)


def time_events(call: Callable[[], Any], repeats: int = 20, warmup: int = 3) -> list[float]:
    """Milliseconds of ``call`` between two device events, host work included where the device waits for it."""
    for _ in range(warmup):
        call()
    if not torch.cuda.is_available():
        return [_clock([call]) for _ in range(repeats)]
    samples = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return samples


def time_steps(step: Callable[[], Any], samples: int, steps_per_sample: int) -> list[float]:
    """Milliseconds of a step, ``samples`` means over ``steps_per_sample`` steps each.

    As in training, all steps follow one another without a wait: the host may run ahead of the device, and one step
    before the first sample lets it.
    """
    step()
    if not torch.cuda.is_available():
        return [_clock([step] * steps_per_sample) for _ in range(samples)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
    events[0].record()
    for event in events[1:]:
        for _ in range(steps_per_sample):
            step()
        event.record()
    events[-1].synchronize()
    return [a.elapsed_time(b) / steps_per_sample for a, b in itertools.pairwise(events)]


def host_ms(step: Callable[[], Any], repeats: int = 3) -> list[float]:
    """Milliseconds until ``step`` returns, started on an idle device: what the host needs to launch it.

    A step of more launches than the device's queue holds (about a thousand) includes waiting for the device.
    """
    samples = []
    for _ in range(repeats):
        synchronize()
        samples.append(_clock([step]))
    synchronize()
    return samples


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def agreed(value: float) -> float:
    """The largest of all processes'; every process calls it."""
    import torch.distributed as dist

    largest = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def empty_caches() -> None:
    """Has this process compile into new folders, so that it finds nothing that an earlier one compiled."""
    folder = tempfile.mkdtemp(prefix="compiled_")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
    os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"


def caches_are_empty() -> bool:
    """Whether nothing is there that Inductor or Triton compiled before."""
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
    triton = os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache")
    return not any(path.is_dir() and any(path.iterdir()) for path in (Path(inductor), Path(triton)))


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large device-to-device copy: what a kernel can hope for."""
    source = torch.randn(1 << (30 if torch.cuda.is_available() else 20), device=_device()).bfloat16()
    target = torch.empty_like(source)
    # Not in a graph: there a copy is the copy engine's, which is slower than an eager copy's kernel.
    ms = statistics.median(time_events(lambda: target.copy_(source)))
    return 2 * source.nbytes / ms * 1e3


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def write_results(theme: str, results: Any, folder: Path = RESULTS, path: Path | None = None, **facts: Any) -> Path:
    """Write ``<theme>_<gpu>_<date>.json``: the results, and all that is needed to judge and repeat them.

    path: a file that an earlier call made, to write again. A new file never takes the place of an older one.
    """
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    record = {
        "theme": theme,
        "date": date,
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(),
        "versions": versions(),
        **facts,
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    stem, number = f"{theme}_{device_name()}_{date}", 1
    while path is None:
        candidate = folder / (f"{stem}.json" if number == 1 else f"{stem}_{number}.json")
        path, number = None if candidate.exists() else candidate, number + 1
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
