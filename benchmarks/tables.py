"""The tables that benchmarks/fill_tables.py writes.

Each is a function from all records, old before new, to Markdown; "" where there is no data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.records import OLD_LABELS, Record, Row, baseline, left_out, newest, ratio, recipe

Link = Callable[[Record], str]
NOTHING = "–"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table, its first columns to the left and the others, numbers, to the right."""
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def number(value: float | None, digits: int = 0, unit: str = "") -> str:
    return NOTHING if value is None else f"{value:.{digits}f}{unit}"


def error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1e}".replace("e-0", "e-")


def named(record: Record) -> str:
    row = record.rows[0]
    return f"{row['model']}, {row['image_size']} px, batch {row['batch']}"


def sources(records: Sequence[Record], link: Link) -> str:
    """Where the figures come from."""
    parts = []
    for record in records:
        commit = str(record.data["commit"])[:12] + "+changes" * str(record.data["commit"]).endswith("+changes")
        versions = record.data["versions"]
        what = f"{record.gpu}, torch {versions['torch']}, triton {versions.get('triton', NOTHING)}"
        parts.append(f"[{record.path.stem}]({link(record)}): {what}, commit `{commit}`, {record.data['date']}")
    return "\n".join(["", "<sub>" + ";<br>".join(parts) + ".</sub>"]) if parts else ""


def chart(records: Sequence[Record], name: str, link: Link) -> str:
    """The picture that benchmarks/charts.py drew, if it did."""
    drawn = Record(records[0].path.with_name(f"{name}.png"), {})
    return f"\n\n![{name.replace('_', ' ')}]({link(drawn)})" if drawn.path.exists() else ""


def speed(records: Sequence[Record], link: Link) -> str:
    """DiT-XL/2 at 256 px, one row for each variant, three columns for each batch."""
    chosen = [r for r in newest(records, "train_step") if r.configuration[2:4] == ("DiT-XL/2", 256)]
    if not chosen:
        return ""
    head = ["", *itertools.chain(*([f"batch {r.rows[0]['batch']}: img/s", "ratio", "GiB"] for r in chosen))]
    labels = list(dict.fromkeys(r.label(row) for r in chosen for row in r.rows))
    rows = []
    for label in _ordered(labels):
        cells = [label]
        for record in chosen:
            row = next((row for row in record.rows if record.label(row) == label), None)
            cells += _speed_cells(record, row)
        rows.append(cells)
    return markdown(head, rows) + "\n" + sources(chosen, link)


def _ordered(labels: Sequence[str]) -> list[str]:
    """As benchmarks/train_step.py has them, whatever order a file was measured in."""
    known = list(dict.fromkeys([*OLD_LABELS.values()]))
    return sorted(labels, key=lambda label: known.index(label) if label in known else len(known))


def _speed_cells(record: Record, row: Row | None) -> list[str]:
    if row is None:
        return [NOTHING] * 3
    if "ms" not in row:
        return [_why_not(row), NOTHING, NOTHING]
    return [
        number(row["images_per_s"]),
        number(ratio(record.rows, row), 2, "×"),
        number(row.get("peak_gib"), 1),
    ]


def _why_not(row: Row) -> str:
    """In a cell's length; the file has the whole reason."""
    return "out of memory" if row["error"] == "out of memory" else "refused"


def configurations(records: Sequence[Record], link: Link) -> str:
    """Every model, size and batch in one line."""
    chosen = newest(records, "train_step")
    rows = []
    for record in chosen:
        best, ours = baseline(record.rows), recipe(record.rows)
        rows.append(
            [
                named(record),
                record.gpu,
                number(best and best["images_per_s"]),
                number(ours and ours["images_per_s"]),
                number(ours and ratio(record.rows, ours), 2, "×"),
                number(best and best.get("peak_gib"), 1),
                number(ours and ours.get("peak_gib"), 1),
            ]
        )
    head = ["", "GPU", "best `torch.compile`, img/s", "opendit, img/s", "ratio", "GiB", "opendit, GiB"]
    if not rows:
        return ""
    return markdown(head, rows, 2) + "\n" + sources(chosen, link) + chart(chosen, "training_speed", link)


def steps(records: Sequence[Record], link: Link) -> str:
    """All that was measured of a training step."""
    rows = []
    for record in newest(records, "train_step"):
        for row in record.rows:
            cold = record.data.get("cold")
            rows.append([named(record), record.label(row), *_step_cells(record, row), *_first(row, cold)])
    head = ["", "", "ms/step", "img/s", "ratio", "GiB", "reserved", "host ms", "first step, s"]
    return markdown(head, rows, 2) if rows else ""


def _step_cells(record: Record, row: Row) -> list[str]:
    if "ms" not in row:
        return [_why_not(row), *[NOTHING] * 5]
    return [
        number(row["ms"], 1),
        number(row["images_per_s"]),
        number(ratio(record.rows, row), 2, "×"),
        number(row.get("peak_gib"), 1),
        number(row.get("reserved_gib"), 1),
        number(row.get("host_ms"), 1),
    ]


def _first(row: Row, cold: bool | None) -> list[str]:
    return [number(row.get("first_step_s") if cold else None, 1)]


def ablation(records: Sequence[Record], link: Link) -> str:
    chosen = newest(records, "ablation")
    rows = []
    for record in chosen:
        before: Row | None = None
        no_rungs = left_out(record)
        for row in record.rows:
            if row["variant"] in no_rungs:
                continue
            is_rung = row.get("booster") is not None
            gain = before["ms"] / row["ms"] if is_rung and before and "ms" in row else None
            ms, images, against, peak, reserved, host = _step_cells(record, row)
            cells = [ms, images, number(gain, 2, "×"), against, peak, reserved, host]
            rows.append([named(record), record.label(row), *cells])
            before = row if is_rung and "ms" in row else before
    head = ["", "", "ms/step", "img/s", "by this", "ratio", "GiB", "reserved", "host ms"]
    if not rows:
        return ""
    return markdown(head, rows, 2) + "\n" + sources(chosen, link) + chart(chosen, "ablation", link)


def parity(records: Sequence[Record], link: Link) -> str:
    """Errors against fp32 of every configuration, from the newest run that checked it."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for record in [*newest(records, "ablation"), *newest(records, "train_step")]:
        for row in record.rows:
            errors = row.get("parity")
            model = (row["model"], row["image_size"])
            if not errors:
                continue
            for name, key in (
                ("bf16 autocast, unaccelerated", "autocast"),
                ("bf16 weights, unaccelerated", "bf16_weights"),
            ):
                found.setdefault((*model, name), _error_cells(errors[key], ""))
            refused = "" if "ms" in row else " (refused)"
            found[(*model, record.label(row))] = _error_cells(errors["ours"], refused)
    rows = [[f"{model}, {size} px", label, *cells] for (model, size, label), cells in found.items()]
    head = ["", "", "all gradients", "losses", "worst gradient", "which"]
    return markdown(head, rows, 2) if rows else ""


def _error_cells(errors: dict[str, Any], refused: str) -> list[str]:
    return [
        error(errors["gradients"]) + refused,
        error(errors["losses"]),
        error(errors["worst_gradient"]),
        f"`{errors['worst_name']}`",
    ]


def largest_batch(records: Sequence[Record], link: Link) -> str:
    chosen = newest(records, "largest_batch")
    rows = []
    for record in chosen:
        for row in record.rows:
            where = f"{row['model']}, {row['image_size']} px, {number(row['limit_gib'])} GiB"
            batch = str(row["batch"]) if row.get("batch") else NOTHING
            rows.append([where, row["variant"], batch, number(row.get("images_per_s")), number(row.get("peak_gib"), 1)])
    head = ["", "", "largest batch", "img/s there", "GiB"]
    return markdown(head, rows, 2) + "\n" + sources(chosen, link) if rows else ""


def loss_curves(records: Sequence[Record], link: Link) -> str:
    chosen = newest(records, "loss_curves")[-1:]
    rows = [
        [
            f"{v['variant']} − {v['baseline']}",
            f"{v['difference']:+.2e}",
            f"{v['spread']:.2e}",
            v["verdict"],
        ]
        for record in chosen
        for v in record.data["verdicts"]
    ]
    if not rows:
        return ""
    setting = f"{chosen[0].data['setting']}\n\n"
    head = ["", "difference of final losses", "spread between seeds", "verdict"]
    return setting + markdown(head, rows) + "\n" + sources(chosen, link) + chart(chosen, "loss_curves", link)


def sampling(records: Sequence[Record], link: Link) -> str:
    """A denoising step with guidance, every variant of every size."""
    chosen = newest(records, "sampling")
    rows = []
    for record in chosen:
        for row in record.rows:
            cells = (
                [NOTHING] * 5
                if "ms" not in row
                else [
                    number(row["ms"], 2),
                    number(ratio(record.rows, row), 2, "×"),
                    number(row.get("peak_gib"), 1),
                    number(row.get("host_ms"), 1),
                    error(row["output_error"]),
                ]
            )
            if "ms" not in row:
                cells[0] = _why_not(row)
            rows.append([f"{row['image_size']} px × {row['batch']}", record.label(row), *cells])
    head = ["", "", "ms/step", "ratio", "GiB", "host ms", "off fp32"]
    return markdown(head, rows, 2) + "\n" + sources(chosen, link) if rows else ""


def step_cache(records: Sequence[Record], link: Link) -> str:
    """The step cache on trained models, samples that it was not calibrated on."""
    chosen = newest(records, "step_cache")
    rows = []
    for record in chosen:
        plain, cached = record.rows
        rows.append(
            [
                f"{record.data['checkpoint']}, {record.data['sampler']}, {record.data['steps']} steps",
                number(plain["ms"], 2),
                number(cached["ms"], 2),
                number(cached["times_uncached"], 2, "×"),
                number(cached["psnr"], 1),
                number(cached["worst_psnr"], 1),
            ]
        )
    head = ["", "ms/step", "cached", "faster", "PSNR, dB", "worst sample"]
    return markdown(head, rows) + "\n" + sources(chosen, link) if rows else ""


TABLES: dict[str, Callable[[Sequence[Record], Link], str]] = {
    "speed": speed,
    "configurations": configurations,
    "steps": steps,
    "ablation": ablation,
    "parity": parity,
    "largest-batch": largest_batch,
    "loss-curves": loss_curves,
    "sampling": sampling,
    "step-cache": step_cache,
}
