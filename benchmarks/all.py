"""Everything in benchmarks/, in turn, then the charts and the pages' tables: `python benchmarks/all.py`.

    python benchmarks/all.py --only train_step loss_curves
    python benchmarks/all.py --smoke        # every script's smallest run, on the CPU; nothing is written

What fails leaves the others alone; the exit status is 1 then. On one H200 all of it takes about half an hour.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RUNS: tuple[tuple[str, ...], ...] = (
    ("kernels",),
    ("attention",),
    ("train_step", "--ablate", "--cold"),
    ("train_step", "--image-size", "512", "--batch", "64", "--variants", "torch.compile", "opendit"),
    ("train_step", "--model", "DiT-B/2", "--batch", "256", "--variants", "torch.compile", "opendit"),
    ("largest_batch", "--stand-in", "eager"),
    ("loss_curves",),
    ("sampling",),
    ("video",),
    ("sequence_parallel",),
)
AFTERWARDS = (("charts",), ("fill_tables",))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(name for name, *_ in RUNS))
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--smoke", action="store_true", help="on the CPU; nothing is written")
    args = parser.parse_args()
    runs = [run for run in RUNS if run[0] in args.only]
    if args.smoke:
        runs = [(name, "--smoke") for name in args.only]
    failed = []
    for name, *options in [*runs, *(() if args.smoke else AFTERWARDS)]:
        print(f"\n== {' '.join([name, *options])}", flush=True)
        start = time.perf_counter()
        status = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options], check=False).returncode
        print(f"== {name}: {'failed' if status else 'done'} after {time.perf_counter() - start:.0f} s", flush=True)
        failed += [name] if status else []
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
