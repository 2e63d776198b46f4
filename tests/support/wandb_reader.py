"""Reads a `.wandb` file without wandb's helper process, so that tests see what is really on the disk.

The file is LevelDB's log format: after a 7-byte head (`:W&B`, magic, version) come blocks of 32 KiB. A record is cut
into fragments that fit their block; each has a head of CRC32, length and type (whole, first, middle, last). A record is
a protobuf message. A file of a killed process ends anywhere: reading stops there.
"""

import json
import struct
import time
import zlib
from pathlib import Path

BLOCK, HEAD = 32768, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def fragments(data):
    """(type, payload) of every intact fragment."""
    ident, magic, version = struct.unpack_from("<4sHB", data)
    assert (ident, magic, version) == (b":W&B", 0xBEE1, 0), "not a .wandb file of a version we know"
    at = HEAD.size
    while True:
        room = BLOCK - at % BLOCK
        if room < HEAD.size:
            at += room
            continue
        if at + HEAD.size > len(data):
            return
        checksum, length, kind = HEAD.unpack_from(data, at)
        payload = data[at + HEAD.size : at + HEAD.size + length]
        if len(payload) < length or zlib.crc32(payload, zlib.crc32(bytes([kind]))) != checksum:
            return
        yield kind, payload
        at += HEAD.size + length


def records(path):
    from wandb.proto import wandb_internal_pb2

    parts = []
    for kind, payload in fragments(Path(path).read_bytes()):
        parts = [payload] if kind in (WHOLE, FIRST) else [*parts, payload]
        if kind in (WHOLE, LAST):
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))


def ended(path, seconds=5):
    """All records of a run that has finished; the helper answers a moment before its last block is on the disk."""
    end = time.monotonic() + seconds
    while True:
        whole = list(records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in whole) or time.monotonic() > end:
            return whole
        time.sleep(0.05)


def history(path):
    """The logged rows, in order, as dicts."""
    return [
        {item.key or ".".join(item.nested_key): _value(item) for item in record.history.item}
        for record in ended(path)
        if record.WhichOneof("record_type") == "history"
    ]


def summary(path):
    """The summary values that were set; later ones win."""
    return {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for record in records(path)
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }


def run(path):
    """(the run record, its config)"""
    opened = next(record.run for record in records(path) if record.WhichOneof("record_type") == "run")
    return opened, {item.key: json.loads(item.value_json) for item in opened.config.update}


def _value(item):
    which = item.WhichOneof("value")  # a typed value since 0.31; text in JSON before, and for all but scalars
    if which in (None, "value_json"):
        return json.loads(item.value_json) if item.value_json else None
    if which == "json":
        return json.loads(item.json)
    return None if which == "none" else getattr(item, which)
