"""Writes the tables of README.md and docs/ from the JSON files, so that no figure is typed by hand.

    python benchmarks/fill_tables.py            # fill them
    python benchmarks/fill_tables.py --check    # exit 1 if a page says something else than the files give

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; tables.py and part_tables.py have a function for each
NAME.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import part_tables, tables
from benchmarks.common import RESULTS
from benchmarks.records import Record, load

TABLES = tables.TABLES | part_tables.TABLES

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/performance.md", "docs/kernels.md", "docs/fastseq.md", "docs/engines.md")
TABLE = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--pages", type=Path, nargs="+", default=[ROOT / page for page in PAGES])
    args = parser.parse_args()
    records = load(args.results)
    stale = False
    for page in args.pages:
        text = page.read_text()
        filled = fill(text, records, page.parent)
        if filled != text:
            stale = True
            print(f"{page} {'is out of date: run benchmarks/fill_tables.py' if args.check else 'filled'}")
            if not args.check:
                page.write_text(filled)
    return int(stale and args.check)


def fill(text: str, records: list[Record], folder: Path) -> str:
    """`text` with every table written anew; links lead from `folder`. An unknown name is a ValueError."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
        body = TABLES[name](records, lambda record: link(record, folder))
        return f"{match[1]}{body or 'Not measured.'}\n{match[3]}"

    return TABLE.sub(table, text)


def link(record: Record, folder: Path) -> str:
    return Path(os.path.relpath(record.path, folder)).as_posix()


if __name__ == "__main__":
    sys.exit(main())
