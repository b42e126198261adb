"""Charts from the JSON files, written beside them: `python benchmarks/charts.py`. Needs matplotlib.

training_speed.png    every configuration, relative to the best that torch.compile alone gives
ablation.png          the recipe, ingredient by ingredient
kernels.png           what share of a large copy's bandwidth each kernel reaches
timeline.png          which kernel runs when, while one attention layer is spread
loss_curves.png       training losses by the residual stream's dtype, mean and range over seeds
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import RESULTS
from benchmarks.records import Record, Row, baseline, left_out, load, newest, of_kernels, ratio, recipe

GREY, BLUE, LIGHT, ORANGE = "#8c8c8c", "#1f6feb", "#9cc3ff", "#e07b39"
SPEED_ROWS = {
    "eager": LIGHT,
    "torch.compile": GREY,
    "torch.compile bf16 weights": "#5a5a5a",
    "opendit": BLUE,
    "opendit compiled": ORANGE,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files, and of the charts")
    args = parser.parse_args()
    for path in draw_all(args.results):
        print(f"written {path}")


def draw_all(folder: Path) -> list[Path]:
    """Draws every chart that there is data for."""
    import matplotlib

    matplotlib.use("Agg")
    records = load(folder)
    written = []
    for name, draw in CHARTS.items():
        chosen = of_kernels(records)[1] if name == "kernels" else newest(records, name)
        if chosen and (figure := draw(chosen)) is not None:
            path = folder / f"{'training_speed' if name == 'train_step' else name}.png"
            # Without the date and version that matplotlib writes, equal data gives an equal file.
            figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
            written.append(path)
    return written


def named(record: Record) -> str:
    row = record.rows[0]
    return f"{row['model']}, {row['image_size']} px\nbatch {row['batch']}, {record.gpu.split()[-1]}"


def training_speed(records: list[Record]) -> Any:
    chosen = [r for r in records if baseline(r.rows) and recipe(r.rows)]
    names = [name for name in SPEED_ROWS if any(_row(r, name) for r in chosen)]
    if not chosen:
        return None
    figure, axes = _axes(2 + 1.6 * len(chosen), 4)
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for at, record in enumerate(chosen):
            if row := _row(record, name):
                x = at + (i - (len(names) - 1) / 2) * width
                height = ratio(record.rows, row) or 0.0
                axes.bar(x, height, width * 0.94, color=SPEED_ROWS[name])
                axes.text(x, height, f"{height:.2f}", ha="center", va="bottom", fontsize=7)
        axes.bar(0, 0, color=SPEED_ROWS[name], label=name)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xticks(range(len(chosen)), [named(r) for r in chosen], fontsize=8)
    axes.set_ylabel("training speed,\nbest torch.compile = 1")
    axes.legend(fontsize=7, ncols=len(names), frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _row(record: Record, name: str) -> Row | None:
    return next((r for r in record.rows if r["variant"] == name and "ms" in r), None)


def ablation(records: list[Record]) -> Any:
    figure, all_axes = _axes(9, 2.6 * len(records), len(records))
    for axes, record in zip(all_axes if len(records) > 1 else [all_axes], records, strict=True):
        no_rungs = left_out(record)
        rows = [r for r in record.rows if "ms" in r and r["variant"] not in no_rungs]
        names = [r["variant"] for r in rows]
        speeds = [r["images_per_s"] for r in rows]
        colours = [SPEED_ROWS.get(name, BLUE) for name in names]
        axes.barh(range(len(rows)), speeds, color=colours)
        for at, (row, speed) in enumerate(zip(rows, speeds, strict=True)):
            memory = f", {row['peak_gib']:.0f} GiB" if "peak_gib" in row else ""
            axes.text(speed, at, f" {speed:.0f}{memory}", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(named(record).replace("\n", ", "), fontsize=9)
        axes.set_xlabel("images/s", fontsize=8)
    figure.tight_layout()
    return figure


def kernels(records: list[Record]) -> Any:
    measured, chosen = of_kernels(records)
    rows = [r for r in measured if r["B_L_D"] == measured[0]["B_L_D"]]
    cases = list(dict.fromkeys((r["kernel"], r["direction"], r["residual"]) for r in rows))
    contenders = {"eager": LIGHT, "compile": GREY, "ours": BLUE}
    figure, axes = _axes(9, 0.34 * len(cases) + 1)
    for i, (name, colour) in enumerate(contenders.items()):
        found = {(r["kernel"], r["direction"], r["residual"]): r for r in rows if r["contender"] == name}
        at = [y for y, case in enumerate(cases) if case in found]
        shares = [100 * found[case]["share_of_copy"] for case in cases if case in found]
        if at:
            axes.barh(
                [y + (i - 1) * 0.27 for y in at],
                shares,
                0.26,
                color=colour,
                label="torch.compile" if name == "compile" else name,
            )
    axes.axvline(100, color="black", linewidth=0.6)
    axes.set_yticks(range(len(cases)), [", ".join(case) for case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"% of a large copy's bandwidth, {rows[0]['B_L_D']}, {chosen[-1].gpu}")
    axes.legend(fontsize=7, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def loss_curves(records: list[Record]) -> Any:
    record = records[-1]
    figure, axes = _axes(8, 4.5)
    for name, colour in zip(
        dict.fromkeys(r["variant"] for r in record.rows), (GREY, BLUE, ORANGE, LIGHT), strict=False
    ):
        curves = [r["curve"] for r in record.rows if r["variant"] == name and "curve" in r]
        if curves:
            steps = [record.data["smoothed_over"] * (i + 1) for i in range(len(curves[0]))]
            columns = list(zip(*curves, strict=True))
            axes.plot(steps, [statistics.mean(c) for c in columns], color=colour, label=f"{name} ({len(curves)} seeds)")
            axes.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_title(record.data["setting"], fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    return figure


def timeline(records: list[Record]) -> Any:
    rows = records[-1].rows
    colours = {"wire": ORANGE, "product": BLUE, "attention": LIGHT, "copy": GREY, "other": "#c9c9c9"}
    figure, all_axes = _axes(9, 1.1 * len(rows), len(rows))
    for axes, row in zip(all_axes if len(rows) > 1 else [all_axes], rows, strict=True):
        streams = list(dict.fromkeys(k["stream"] for k in row["kernels"]))
        for k in row["kernels"]:
            span = (k["start_us"], k["end_us"] - k["start_us"])
            axes.broken_barh([span], (streams.index(k["stream"]) - 0.4, 0.8), color=colours[k["kind"]])
        axes.set_yticks(range(len(streams)), [f"stream {s}" for s in streams], fontsize=6)
        axes.set_title(f"{row['method']}, {row['pass']}, {row['tokens']} tokens", fontsize=7, loc="left", pad=2)
        axes.tick_params(axis="x", labelsize=6)
        axes.invert_yaxis()
    for name, colour in colours.items():
        axes.barh(0, 0, color=colour, label=name)
    axes.set_xlabel("µs", fontsize=7)
    axes.legend(fontsize=6, frameon=False, ncols=len(colours), loc="upper center", bbox_to_anchor=(0.5, -0.5))
    figure.tight_layout()
    return figure


def _axes(width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, figsize=(width, height))
    for one in axes if rows > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


CHARTS: dict[str, Callable[[list[Record]], Any]] = {
    "train_step": training_speed,
    "ablation": ablation,
    "kernels": kernels,
    "loss_curves": loss_curves,
    "timeline": timeline,
}

if __name__ == "__main__":
    main()
