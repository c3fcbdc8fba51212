#!/usr/bin/env python3
"""A reader of Tillcast's objects, written from docs/FORMAT.md alone: it verifies, applies and proves.

read_pack.py BASE STORE OUT.db ROOT_KEY_HEX…

BASE is a bucket's directory or URL. Each of the store's streams is built in OUT.db (a new file) from its last full
and the deltas after it. Whatever is not as signed, listed or promised ends it with an error."""
import base64
import datetime
import gzip
import hashlib
import io
import json
import sqlite3
import struct
import sys
import urllib.request

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def fetch(base, name):
    url = f"{base.rstrip('/')}/{name}"
    with urllib.request.urlopen(url) if "://" in base else open(url, "rb") as f:
        return f.read()


def has_signed(key, signature, message):
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(base64.b64decode(signature), message)
        return True
    except InvalidSignature:
        return False


def open_envelope(data, kind, keys, threshold=1):
    """DSSE: the payload, once at least `threshold` distinct keys have signed it."""
    envelope = json.loads(data)
    kind = f"application/vnd.tillcast.{kind}+json"
    assert envelope["payloadType"] == kind, envelope["payloadType"]
    payload = base64.b64decode(envelope["payload"])
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    good = {k for k in keys for s in envelope["signatures"] if has_signed(k, s["sig"], message)}
    assert len(good) >= threshold, f"{len(good)} of {threshold} needed signatures are good"
    return json.loads(payload)


def walk_trust(base, roots):
    """From the pinned root keys, a file at a time, to the version that trust.json claims."""
    newest = json.loads(base64.b64decode(json.loads(fetch(base, "trust.json"))["payload"]))["version"]
    threshold, trust = 1, {"epoch": 0}
    for n in range(1, newest + 1):
        data, before = fetch(base, f"trust/{n:010}.json"), trust
        trust = open_envelope(data, "trust", roots, threshold)
        roots, threshold = trust["root"]["keys"], trust["root"]["threshold"]
        open_envelope(data, "trust", roots, threshold)
        assert trust["format"] == 1 and trust["version"] == n and trust["epoch"] >= before["epoch"]
    return trust


def not_expired(thing):  # all times are UTC, so that their texts can be compared
    return datetime.datetime.now(datetime.timezone.utc).isoformat() < thing["expires_at"]


def read_manifest(base, store, trust):
    keys = [p["key"] for p in trust["publishers"] if not_expired(p)]
    manifest = open_envelope(fetch(base, f"stores/{store}/manifest.json"), "manifest", keys)
    assert manifest["format"] == 1 and manifest["store"] == store and manifest["epoch"] == trust["epoch"]
    assert not_expired(manifest), f"expired at {manifest['expires_at']}"
    return manifest


def canonical(value):
    if value is None:
        return b"N"
    if isinstance(value, int):
        return b"I" + struct.pack(">q", value)
    if isinstance(value, float):
        return b"R" + struct.pack(">d", value)
    tag, data = (b"T", value.encode()) if isinstance(value, str) else (b"B", value)
    return tag + struct.pack(">I", len(data)) + data


def state_digest(db, table, columns):
    rows = db.execute(f"SELECT {', '.join(columns)} FROM {table}")
    hashes = (hashlib.sha256(b"".join(map(canonical, row))).digest()[:16] for row in rows)
    return f"{sum(int.from_bytes(h, 'big') for h in hashes) % 2**128:032x}"


def run_ddl(db, text):
    statement = ""
    for part in text.split(";"):
        statement += part + ";"
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""


def statement_of(section, keys):
    names = section["columns"]
    where = " AND ".join(f"{c} = ?" for c in names[:keys])
    if section["op"] == "delete":
        return f"DELETE FROM {section['table']} WHERE {where}"
    if section["op"] == "update":
        return f"UPDATE {section['table']} SET {', '.join(f'{c} = ?' for c in names[keys:])} WHERE {where}"
    return f"INSERT INTO {section['table']} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"


def apply_pack(db, data, instance, entry):
    """Applies one pack inside the caller's transaction; gives the digests of all tables after it."""
    assert len(data) == entry["bytes"] and hashlib.sha256(data).hexdigest() == entry["sha256"], "not the listed pack"
    lines = map(json.loads, gzip.GzipFile(fileobj=io.BytesIO(data)))
    header = next(lines)
    assert header["format"] == 1 and f"{header['stream']}@{header['audience']}" == instance
    assert (header["version"], header["kind"], header["base"]) == (entry["version"], entry["kind"], entry.get("base"))
    full = entry["kind"] == "full"
    for ddl in [header["schema"]["ddl"]] if full else header["schema"].get("migrate", []):
        run_ddl(db, ddl)
    types = {t["table"]: {c["name"]: c["type"] for c in t["columns"]} for t in header["tables"]}
    keys = {t["table"]: len(t["key"]) for t in header["tables"]}
    counts, trailer = {"delete": 0, "update": 0, "insert": 0}, None
    for line in lines:
        assert trailer is None, "lines after the trailer"
        if isinstance(line, list):
            row = [base64.b64decode(v) if t == "blob" and v is not None else v for v, t in zip(line, of, strict=True)]
            if op == "update":  # the key stands first in the row, last in the statement
                row = row[key:] + row[:key]
            assert db.execute(sql, row).rowcount == 1, f"{op} of {line} in {table} met no row"
            counts[op] += 1
        elif "rows" in line:
            trailer = line
        else:
            table, op, key = line["table"], line["op"], keys[line["table"]]
            sql, of = statement_of(line, key), [types[table][c] for c in line["columns"]]
    assert trailer and trailer["rows"] == counts, "truncated, or the trailer counts other rows"
    digests = {table: state_digest(db, table, list(columns)) for table, columns in types.items()}
    assert digests == trailer["digests"], f"the rows give {digests}, the trailer says {trailer['digests']}"
    return digests


def build_stream(db, base, stream, entry):
    instance = f"{stream}@{entry['audience']}"
    start = max(i for i, p in enumerate(entry["packs"]) if p["kind"] == "full")
    version = 0
    db.execute("BEGIN")
    for pack in entry["packs"][start:]:
        assert pack["kind"] == "full" or pack["base"] == version, f"{instance}: no delta from {version}"
        data = fetch(base, f"packs/{instance}/{pack['version']:010}.{pack['kind']}.pack")
        digests, version = apply_pack(db, data, instance, pack), pack["version"]
    assert version == entry["version"] and digests == entry["digests"], f"{instance} is not as the manifest promises"
    db.execute("COMMIT")
    return {"version": version, "digests": digests}


def main(base, store, out, *roots):
    manifest = read_manifest(base, store, walk_trust(base, roots))
    db = sqlite3.connect(out, isolation_level=None)
    listed = manifest["streams"].items()
    streams = {f"{name}@{entry['audience']}": build_stream(db, base, name, entry) for name, entry in listed}
    print(json.dumps({"serial": manifest["serial"], "streams": streams}))


if __name__ == "__main__":
    main(*sys.argv[1:])
