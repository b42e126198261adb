"""The tables of parts and of several processes: kernels, a spread layer, spread models, engines.

As in benchmarks/tables.py each is a function from all records, old before new, to Markdown; "" where there is no data.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from benchmarks.records import Record, Row, newest, of_kernels
from benchmarks.tables import NOTHING, Link, chart, markdown, number, sources


def kernels(records: Sequence[Record], link: Link) -> str:
    """Milliseconds, the share of a large copy's speed, and the speed against torch.compile of the plain formula."""
    measured, chosen = of_kernels(records)
    if not chosen:
        return ""
    shapes = list(dict.fromkeys(tuple(row["B_L_D"]) for row in measured))
    cases: dict[tuple[str, str, str], dict[tuple[int, ...], dict[str, Row]]] = {}
    for row in measured:
        case = cases.setdefault((row["kernel"], row["direction"], row["residual"]), {})
        case.setdefault(tuple(row["B_L_D"]), {})[row["contender"]] = row
    head = ["kernel", "pass", "residual", *(f"[{B}, {L}]" for B, L, _ in shapes)]
    rows = [[f"`{k}`", d, r, *(_kernel_cell(found[s]) for s in shapes)] for (k, d, r), found in cases.items()]
    copy = ", ".join(f"{record.data['copy_tb_per_s']:.2f}" for record in chosen) + " TB/s"
    return f"A large copy: {copy}.\n\n" + markdown(head, rows, 3) + "\n" + sources(chosen, link)


def _kernel_cell(found: dict[str, Row]) -> str:
    ours, compiled = found["ours"], found.get("compile")
    ratio = f"{compiled['ms']['median'] / ours['ms']['median']:.2f}×" if compiled else NOTHING
    return f"{ours['ms']['median']:.3f} / {ours['share_of_copy']:.0%} / {ratio}"


def _last(records: Sequence[Record], part: str, theme: str = "sequence_parallel") -> list[Record]:
    """The newest record with rows of a part of the sequence-parallel benchmark."""
    found = [r for r in records if r.theme == theme and any(row["part"] == part for row in r.rows)]
    return found[-1:]


def spread_layers(records: Sequence[Record], link: Link) -> str:
    """Milliseconds of one attention layer, and of these what is exposed communication."""
    return _layers(_last(records, "layer"), link)


def _layers(chosen: list[Record], link: Link) -> str:
    if not chosen:
        return ""
    rows = [row for row in chosen[0].rows if row["part"] == "layer"]
    tokens = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys(row["method"] for row in rows))
    body = []
    for what, said in (("forward", "forward"), ("both", "forward and backward")):
        for name in names:
            mine = {row["tokens"]: row for row in rows if row["method"] == name}
            body.append([said, name, *(_layer_cell(mine.get(n), what) for n in tokens)])
    refused = [f"{row['method']}, {row['tokens']} tokens: {row['refused']}" for row in rows if "refused" in row]
    body += [["refused", why, *([NOTHING] * len(tokens))] for why in refused]
    return markdown(["", "", *(f"{n} tokens" for n in tokens)], body, 2) + "\n" + sources(chosen, link)


def _layer_cell(row: Row | None, what: str) -> str:
    if row is None or what not in row:
        return NOTHING
    ms, exposed = row[what]["median"], row.get(f"exposed_{what}")
    digits = 3 if ms < 1 else 2 if ms < 10 else 1
    return f"{ms:.{digits}f}" + (f" ({exposed:.{max(digits, 2)}f})" if exposed is not None else "")


def spread_models(records: Sequence[Record], link: Link) -> str:
    """Of each model, in training and in sampling, the newest record: multiples stay with what they are multiples of."""
    newest_of: dict[tuple[str, int, int], dict[str, Record]] = {}
    for record in records:
        for row in record.rows if record.theme == "sequence_parallel" else ():
            if row["part"] == "model":
                job = newest_of.setdefault((row["model"], row["frames"], row["tokens"]), {})
                job |= {what: record for what in ("train", "sample") if what in row}
    body = []
    for (model, frames, tokens), job in sorted(newest_of.items()):
        cells: dict[str, dict[str, str]] = {}
        for what, record in job.items():
            for row in record.rows:
                mine = row["part"] == "model" and (row["model"], row["frames"], row["tokens"]) == (
                    model,
                    frames,
                    tokens,
                )
                if mine and (what in row or "refused" in row):
                    cells.setdefault(row["variant"], {})[what] = _model_cell(row, what)
        said = f"{frames} × {tokens}" if frames else str(tokens)
        body += [[model, said, v, *(found.get(w, NOTHING) for w in ("train", "sample"))] for v, found in cells.items()]
    used = [r for r in records if any(r is one for job in newest_of.values() for one in job.values())]
    head = ["", "tokens", "", "training: samples/s, × one, GiB (activations)", "forward: samples/s, × one, GiB"]
    return markdown(head, body, 3) + "\n" + sources(used, link) if body else ""


def _model_cell(row: Row, what: str) -> str:
    if "refused" in row or "failed" in row[what]:
        return row.get("refused") or row[what]["failed"]
    found = row[what]
    times = f"{found['times_one']:.2f}" if found["times_one"] else NOTHING
    activations = f" ({found['activations_gib']:.1f})" if what == "train" and "activations_gib" in found else ""
    return f"{found['samples_per_s']:.2f}, {times}, {found['gib']:.1f}{activations}"


def peers_layers(records: Sequence[Record], link: Link) -> str:
    """The layer of `spread_layers` beside others' exchange."""
    return _layers(_last(records, "layer", "peers"), link)


def peers_models(records: Sequence[Record], link: Link) -> str:
    """Milliseconds of a forward over two GPUs, of the same blocks."""
    chosen = _last(records, "model", "peers")
    rows = [row for record in chosen for row in record.rows if row["part"] == "model"]
    if not rows:
        return ""
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    body = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = {row["tokens"]: row for row in rows if row["variant"] == name}
        body.append([name, *(_peer_cell(mine.get(n)) for n in tokens)])
    said = ", ".join(f"{name} {version}" for name, version in chosen[0].data["peers"].items() if name == "diffusers")
    table = markdown([f"{rows[0]['model']}, {said}", *(f"{n} tokens: ms, × one" for n in tokens)], body)
    return table + "\n" + sources(chosen, link)


def _peer_cell(row: Row | None) -> str:
    if row is None or "ms" not in row:
        return row.get("refused", NOTHING) if row else NOTHING
    return f"{row['ms']['median']:.2f}, {row['times_one']:.2f}"


def timeline(records: Sequence[Record], link: Link) -> str:
    chosen = newest(records, "timeline")[-1:]
    rows = []
    for row in chosen[0].rows if chosen else []:
        share = f"{row['hidden_us'] / row['wire_us']:.0%}" if row["wire_us"] else NOTHING
        rows.append([row["method"], row["pass"], number(row["whole_us"]), number(row["wire_us"]), share])
    if not rows:
        return ""
    head = [f"{chosen[0].rows[0]['tokens']} tokens", "", "µs", "of these a transfer is under way", "of that hidden"]
    return markdown(head, rows, 2) + chart(chosen, "timeline", link) + "\n" + sources(chosen, link)


def spread_curve(records: Sequence[Record], link: Link) -> str:
    chosen = _last(records, "curve")
    rows = []
    for row in chosen[0].rows if chosen else []:
        if row["part"] == "curve":
            last = statistics.fmean(row["losses"][-row["smoothed_over"] :])
            rows.append([row["variant"], f"{last:.5f}", f"{row['apart']:.1e}"])
    if not rows:
        return ""
    first = chosen[0].rows[0]
    head = [f"{first['model']}, {first['tokens']} tokens, {len(first['losses'])} steps", "last losses", "largest apart"]
    return markdown(head, rows) + "\n" + sources(chosen, link)


def _engine_rows(records: Sequence[Record]) -> tuple[list[Row], list[Record]]:
    """Of each configuration the newest record, together with those of the same code and day; of a variant the last."""
    rows, used = [], []
    for last in newest(records, "engines"):
        run = [r for r in records if (r.theme, *_run(r)) == ("engines", *_run(last))]
        rows += list({row["variant"]: row for record in run for row in record.rows}.values())
        used += run
    return rows, used


def _run(record: Record) -> tuple[object, ...]:
    return record.configuration, record.data["commit"], record.data["date"]


def engines(records: Sequence[Record], link: Link) -> str:
    found, used = _engine_rows(records)
    rows = [
        [
            _engine_case(row),
            row["variant"],
            row.get("error") or number(row["ms"], 1),
            number(row.get("images_per_s")),
            number(row.get("peak_gib"), 1),
            *(number(row.get(f"{what}_gib"), 2) for what in ("states", "states_on_host", "ema")),
        ]
        for row in found
    ]
    memory = ["peak GiB", "of these parameters and moments", "these on the host", "averages"]
    head = ["", "", "ms/step", "img/s, all", *memory]
    return markdown(head, rows, 2) + "\n" + sources(used, link) if rows else ""


def _engine_case(row: Row) -> str:
    cap = f", at most {row['cap_gib']:g} GiB" if row.get("cap_gib") else ""
    gpus = "1 GPU" if row["processes"] == 1 else f"{row['processes']} GPUs"
    return f"{row['model']}, {row['image_size']} px, {gpus}, {row['batch']} each{cap}"


def updates(records: Sequence[Record], link: Link) -> str:
    """What checking gradients and averaging add to `optimizer.step()`, beside the plugin without them."""
    found, used = _engine_rows(records)
    used = [record for record in used if any("update_ms" in row for row in record.rows)]
    timed = {(_engine_case(row), row["variant"]): row for row in found if "update_ms" in row and "error" not in row}
    rows = []
    for (case, name), row in timed.items():
        words = name.split()
        alone = timed.get((case, " ".join(w for w in words if w not in ("skipping", "ema", "saving"))))
        if {"skipping", "ema"} & set(words) and alone is not None:
            more = row["update_ms"] - alone["update_ms"]
            cells = [number(r["update_ms"], 2) for r in (alone, row)]
            rows.append([case, name, *cells, number(100 * more / row["ms"], 2, " %")])
    head = ["", "", "`optimizer.step()` of the plugin alone, ms", "with it, ms", "of a step"]
    return markdown(head, rows, 2) + "\n" + sources(used, link) if rows else ""


def saves(records: Sequence[Record], link: Link) -> str:
    found, used = _engine_rows(records)
    used = [record for record in used if any("save" in row for row in record.rows)]
    rows = []
    for row in (row for row in found if "save" in row):
        save = row["save"]
        stalls = [number(seconds, 2) for seconds in save["stall_s"]]
        after = [number(save["written_s"], 1), number(row["ms"], 1), number(save["ms_meanwhile"], 1)]
        rows.append([_engine_case(row), row["variant"], number(save["gib"], 1), *stalls, *after])
    head = [
        "",
        "",
        "GiB",
        "first save holds up, s",
        "the next, s",
        "written after, s",
        "ms/step",
        "while it is written",
    ]
    return markdown(head, rows, 2) + "\n" + sources(used, link) if rows else ""


TABLES: dict[str, Callable[[Sequence[Record], Link], str]] = {
    "kernels": kernels,
    "spread-layers": spread_layers,
    "spread-models": spread_models,
    "spread-curve": spread_curve,
    "spread-timeline": timeline,
    "peers-layers": peers_layers,
    "peers-models": peers_models,
    "engines": engines,
    "engine-updates": updates,
    "engine-saves": saves,
}
