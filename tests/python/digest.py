#!/usr/bin/env python3
"""The state digest of a table, from a source file and docs/FORMAT.md alone.

digest.py [--key COLUMN,…] COLUMN:TYPE,… FILE.csv [DELTA.csv…]

COLUMN:TYPE,… are the source's columns in the contract's order. TYPE: text, integer, real, blob (hex), or cents
(a decimal, times 100, rounded). A ? behind it: an empty field is NULL. With --key a row replaces an earlier one of the same
key, and DELTA files with a column `op` (I, U: the whole row; D: the key) are applied in order."""
import argparse
import csv
import decimal
import hashlib
import json
import struct

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--key", default="")
parser.add_argument("columns")
parser.add_argument("files", nargs="+")
options = parser.parse_args()
columns = [c.split(":") for c in options.columns.split(",")]


def canonical(text, kind):
    if kind.endswith("?"):
        if text == "":
            return b"N"
        kind = kind[:-1]
    if kind == "integer":
        return b"I" + struct.pack(">q", int(text))
    if kind == "cents":
        return b"I" + struct.pack(">q", round(decimal.Decimal(text) * 100))
    if kind == "real":
        return b"R" + struct.pack(">d", float(text) + 0.0)
    data = bytes.fromhex(text) if kind == "blob" else text.encode()
    return (b"B" if kind == "blob" else b"T") + struct.pack(">I", len(data)) + data


rows = {}
for file in options.files:
    with open(file, encoding="utf-8-sig", newline="") as f:
        for number, row in enumerate(csv.DictReader(f)):
            key = tuple(row[k] for k in options.key.split(",")) if options.key else (file, number)
            if row.get("op") == "D":
                del rows[key]
            else:
                rows[key] = b"".join(canonical(row[name], kind) for name, kind in columns)
total = sum(int.from_bytes(hashlib.sha256(row).digest()[:16], "big") for row in rows.values())
print(json.dumps({"rows": len(rows), "digest": f"{total % 2**128:032x}"}))
