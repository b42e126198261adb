"""Writes docs/results/README.md and its charts from the JSON files there, so that no figure is typed by hand.

    python benchmarks/accuracy/page.py            # write them (charts need matplotlib)
    python benchmarks/accuracy/page.py --check    # exit 1 if the page says something else than the files give

Of several files of one kind the newest counts. Pictures and GIFs are those that the runs left beside them.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.records import Record, load

FOLDER = Path(__file__).parents[2] / "docs" / "results"
HEAD = """# Results: as accurate, and sooner

Written by `python benchmarks/accuracy/page.py` from the JSON files in this folder; a test compares the two. What is not
measured says so. The runs are small, on small real data, for the minutes that they name; the scripts, their commands
and what they need: [benchmarks/accuracy](../../benchmarks/accuracy/README.md).
"""
NAMES = {
    "published": "as published (fp32 + TF32, eager)",
    "eager": "eager, bf16 autocast",
    "compile": "`torch.compile`, bf16 autocast",
    "opendit": "opendit",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is out of date")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    newest = {record.theme: record for record in load(args.folder)}
    path = args.folder / "README.md"
    if args.check:
        # Charts count as drawn: they are made of the same files.
        stale = not path.is_file() or path.read_text() != page(newest, args.folder)
        if stale:
            print(f"{path} is out of date: run benchmarks/accuracy/page.py")
        return int(stale)
    for theme, draw in CHARTS.items():
        if theme in newest:
            draw(newest[theme], args.folder / f"{theme.removeprefix('accuracy_')}.png")
    path.write_text(page(newest, args.folder))
    print(f"written {path}")
    return 0


def page(newest: dict[str, Record], folder: Path) -> str:
    parts = [HEAD]
    for theme, (title, about, body) in SECTIONS.items():
        record = newest.get(theme)
        lines = [f"## {title}", "", *textwrap.wrap(about, 120, break_on_hyphens=False), ""]
        if record is None:
            lines.append("Not run yet.")
        else:
            lines += [*body(record, folder), "", _source(record)]
        parts.append("\n".join([*lines, ""]))
    return "\n".join(parts)


def cifar(record: Record, folder: Path) -> list[str]:
    rows = [row for row in record.rows if row.get("points")]
    real = record.data.get("real")
    table = [
        ["", "images/s", "start-up", "steps", "training", "distance", "recognised", "guided: distance, recognised"]
    ]
    for row in rows:
        last, guided = row["points"][-1], row["final"][str(row["grid_cfg_scale"])]
        table.append(
            [
                NAMES[row["variant"]], f"{row['images_per_s']:.0f}", f"{row['start_up_s']:.1f} s", str(row["steps"]),
                f"{row['seconds']:.0f} s", f"{last['distance']:.2f}", f"{last['accuracy']:.1%}",
                f"{guided['distance']:.2f}, {guided['accuracy']:.1%} (scale {row['grid_cfg_scale']:g})",
            ]
        )  # fmt: skip
    if real:
        table.append(["real test images", "", "", "", "", f"{real['distance']:.2f}", f"{real['accuracy']:.1%}", ""])
    lines = [f"{record.data['setting']}; seed {record.data['seed']}.", "", *markdown(table), ""]
    by_name = {row["variant"]: row for row in rows}
    ours = by_name.get("opendit")
    for name in ("published", "compile"):
        if ours and name in by_name:
            goal = by_name[name]["points"][-1]
            found = seconds_to(ours["points"], goal["distance"])
            how = (
                f"after {found:.1f} s, {found / goal['seconds']:.0%} of its time"
                if found
                else "not reached in the time"
            )
            lines.append(
                f"- The last distance of {NAMES[name]}, {goal['distance']:.2f} after {goal['seconds']:.0f} s: {how}."
            )
    lines += [_picture(folder, "cifar.png", "distance against time and against steps")]
    grids = [(row["variant"], f"cifar_{row['variant']}.png") for row in rows]
    lines += [_picture(folder, file, f"samples: {name}; a class a row, not chosen") for name, file in grids]
    return [line for line in lines if line is not None]


def alignment(record: Record, folder: Path) -> list[str]:
    table = [["run", "against", "steps", "first step", "smoothed, mean", "smoothed, at most", "any step, at most"]]
    for found in record.data["comparisons"]:
        each = [found[key] for key in ("first_step", "mean_smoothed", "max_smoothed", "max_step")]
        table.append([f"`{found['run']}`", f"`{found['baseline']}`", str(found["steps"]), *(f"{v:.1e}" for v in each)])
    data = record.data
    lines = [
        f"{data['setting']}. Upstream: {data['upstream']}, its layers {data['layers']}. Differences are relative to "
        f"the loss, smoothed over {data['window']} steps. Runs shared the device, for {data['budget_s']:g} s at most.",
        "",
        *markdown(table),
        *(f"\n`{row['run']}` did not run: {row['error']}" for row in record.rows if "error" in row),
        _picture(folder, "alignment.png", "losses, and their differences"),
    ]
    return [line for line in lines if line is not None]


def text_to_image(record: Record, folder: Path) -> list[str]:
    (row,) = record.rows
    near, group = row["nearest"], row["group"]
    table = [
        ["captions", "nearest real image is the caption's", "among five", "group recognised"],
        ["trained on", f"{near['first']:.1%}", f"{near['of_five']:.1%}", f"{group['drawn_trained']:.1%}"],
        ["held out", "", "", f"{group['drawn_held_out']:.1%}"],
        ["real images, held out", "", "", f"{group['real_held_out']:.1%}"],
        ["chance", f"{near['chance']:.1%}", f"{5 * near['chance']:.1%}", f"{group['largest_group']:.1%}"],
    ]
    counts = row["captions"]
    lines = [
        f"{record.data['setting']}; seed {record.data['seed']}; {row['steps']} steps in {row['seconds']:.0f} s "
        f"({row['images_per_s']:.0f} images/s); {counts['trained']} captions trained on, {counts['held_out']} not.",
        "",
        *markdown(table),
        _picture(folder, "text_to_image.png", "samples"),
        "",
        *(f"- {name.replace('_', ' ')}: {', '.join(row['shown'][name])}" for name in row["shown"]),
    ]
    return [line for line in lines if line is not None]


def text_to_video(record: Record, folder: Path) -> list[str]:
    (row,) = record.rows
    table = [["", "motion", "colour", "shape", "all three"]]
    for name, label in (
        ("drawn_trained", "captions trained on"),
        ("drawn_held_out", "captions held out"),
        ("real_held_out", "real clips, held out"),
    ):
        if row[name]:
            table.append([label, *(f"{row[name][q]:.1%}" for q in ("motion", "colour", "shape", "all"))])
    lines = [
        f"{record.data['setting']}; seed {record.data['seed']}; {row['steps']} steps in {row['seconds']:.0f} s "
        f"({row['clips_per_s']:.0f} clips/s); {row['per_caption']} clips drawn for each caption.",
        "",
        *markdown(table),
        "",
        f"Held out: {'; '.join(row['captions']['held_out'])}.",
        _picture(folder, "text_to_video.gif", "a clip for each caption, those held out last"),
    ]
    return [line for line in lines if line is not None]


def seconds_to(points: Sequence[dict[str, Any]], distance: float) -> float | None:
    """When the distance was reached, between snapshots by a straight line; at the first of them, at the latest then."""
    before: dict[str, Any] | None = None
    for point in points:
        if point["distance"] <= distance:
            if before is None:
                return float(point["seconds"])
            share = (before["distance"] - distance) / (before["distance"] - point["distance"])
            return float(before["seconds"] + share * (point["seconds"] - before["seconds"]))
        before = point
    return None


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + " --- |" + " ---: |" * (len(rows[0]) - 1), *body]


def _picture(folder: Path, name: str, what: str) -> str | None:
    is_chart = name.removesuffix(".png") in {theme.removeprefix("accuracy_") for theme in CHARTS}
    return f"\n![{what}]({name})" if is_chart or (folder / name).is_file() else None


def _source(record: Record) -> str:
    data = record.data
    gpu = data["hardware"].get("gpu", "CPU")
    return (
        f"<sub>[{record.path.name}]({record.path.name}): `{data['command']}`; {gpu}, torch "
        f"{data['versions']['torch']}, commit `{data['commit'][:12]}`, {data['date']}.</sub>"
    )


def draw_cifar(record: Record, path: Path) -> None:
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for row in record.rows:
        for one, key in zip(axes, ("seconds", "steps"), strict=True):
            points = row.get("points", [])
            distances = [p["distance"] for p in points]
            one.plot([p[key] for p in points], distances, marker="o", markersize=3, label=row["variant"])
            one.set_xlabel("seconds of training" if key == "seconds" else key)
    axes[0].set(ylabel="feature distance", yscale="log")
    axes[0].legend(frameon=False)
    _save(figure, path)


def draw_alignment(record: Record, path: Path) -> None:
    plt = _pyplot()
    rows = [row for row in record.rows if "curve" in row]
    precisions = list(dict.fromkeys(row["run"].partition(":")[0] for row in rows))
    figure, axes = plt.subplots(
        2, len(precisions), figsize=(4.5 * len(precisions), 6), squeeze=False, layout="constrained"
    )
    for column, precision in enumerate(precisions):
        for row in rows:
            if row["run"].startswith(precision):
                losses, every = row["curve"]["losses"], row["curve"]["every"]
                style = "--" if row["run"].endswith("opendit") else "-"
                steps = [every * (i + 1) for i in range(len(losses))]
                axes[0][column].plot(steps, losses, style, linewidth=1, label=row["run"])
        for found in record.data["comparisons"]:
            if found["run"].startswith(precision):
                values, every = found["difference"]["losses"], found["difference"]["every"]
                axes[1][column].plot([every * (i + 1) for i in range(len(values))], values, label=found["run"])
        axes[0][column].set(yscale="log", title=precision)
        axes[1][column].set_xlabel("step")
        axes[1][column].set_yscale("symlog", linthresh=1e-8)
        for one in axes[:, column]:
            one.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("loss")
    axes[1][0].set_ylabel("difference to plain, of the loss")
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    # Without the date and version that matplotlib writes, equal data gives an equal file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(f"written {path}")


CHARTS: dict[str, Callable[[Record, Path], None]] = {
    "accuracy_cifar": draw_cifar,
    "accuracy_alignment": draw_alignment,
}
SECTIONS: dict[str, tuple[str, str, Callable[[Record, Path], list[str]]]] = {
    "accuracy_cifar": (
        "Class-conditional images: CIFAR-10 against the clock",
        "The same script as published, compiled, and accelerated: equal weights, batches, noise and label drops at "
        "equal steps ([cifar.py](../../benchmarks/accuracy/cifar.py)). Distance: Fréchet, between the 64 features of a "
        "ResNet-56 for CIFAR-10, to the training images; it is not FID. Recognised: the share that the ResNet takes "
        "for the class asked for.",
        cifar,
    ),
    "accuracy_alignment": (
        "Loss alignment with facebookresearch/DiT",
        "Upstream's own model and diffusion, unmodified, against the same with opendit's lines added "
        "([alignment.py](../../benchmarks/accuracy/alignment.py)). `again` is upstream's code a second time: what a "
        "GPU's own order of additions makes of equal runs.",
        alignment,
    ),
    "accuracy_text_to_image": (
        "Text to image",
        "An accelerated DiT on captioned emoji, and whether what it draws is what the caption says "
        "([text_to_image.py](../../benchmarks/accuracy/text_to_image.py)).",
        text_to_image,
    ),
    "accuracy_text_to_video": (
        "Text to video",
        "An accelerated VDiT on captioned clips of moving shapes, judged by a classifier of real ones "
        "([text_to_video.py](../../benchmarks/accuracy/text_to_video.py)).",
        text_to_video,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
