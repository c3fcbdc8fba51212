#!/usr/bin/env python3
"""Sums the branches that `llvm-cov export` says were met, on its standard input: a crate each, the core, and all.

A condition counts twice, once for each way it can go. What only tests are made of is left out: there an assertion that
never fails would count as a branch that nobody tried. Each branch of the core that was not met is named, with
`--missed` each one.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

# What judges bytes and rows, and what is remembered of it: the verifier, the apply, the ledger.
CORE = re.compile(
    r"proto/src/(dsse|keys|manifest|trust|follow|digest|chain|value|pack/\w+|replica/\w+)\.rs|hq-publisher/src/ledger/\w+\.rs"
)
TESTS = re.compile(r"tests?\.rs$|/tests/|/kit|/years\.rs$|/fake_s3\.rs$")


def code_lines(lines):
    """How many lines stand before the tests of a file, which stand last in it."""
    for n, line in enumerate(lines):
        if line.startswith("#[cfg(test)]") and any(re.match(r"mod \w+ \{", l) for l in lines[n + 1 : n + 4]):
            return n
    return len(lines)


def main():
    """Reads, sums, prints."""
    root = Path(__file__).resolve().parents[2]
    sums = defaultdict(lambda: [0, 0])
    missed = []
    for file in json.load(sys.stdin)["data"][0]["files"]:
        name = Path(file["filename"]).relative_to(root).as_posix()
        if TESTS.search(name):
            continue
        lines = Path(file["filename"]).read_text().split("\n")
        end = code_lines(lines)
        # A generic function is there once for each type that it is made for.
        met = defaultdict(lambda: [0, 0])
        for line, column, line_end, column_end, yes, no, *_ in file["branches"]:
            place = met[(line, column, line_end, column_end)]
            place[0] += yes
            place[1] += no
        groups = [name.split("/")[0], "all"] + (["core"] if CORE.fullmatch(name) else [])
        for (line, column, _, column_end), ways in sorted(met.items()):
            if line > end:
                continue
            for way, count in zip(("true", "false"), ways):
                for group in groups:
                    sums[group][0] += count > 0
                    sums[group][1] += 1
                if count == 0:
                    text = lines[line - 1][column - 1 :][:90]
                    missed.append(("core" in groups, f"{name}:{line}: never {way}: {text}"))
    for is_core, line in missed:
        if is_core or "--missed" in sys.argv:
            print(line)
    for group, (met, all_) in sorted(sums.items(), key=lambda g: (g[0] in ("core", "all"), g[0])):
        print(f"{group:14} {met:5} of {all_:5} branches: {100 * met / all_:.1f}%")


if __name__ == "__main__":
    main()
