"""Ways to spoil files, checkpoints, zip archives and nested plain values; each draws from its generator alone."""

import io
import json
import random
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable

from functions.support.files import sha256

ENDS = 300  # bytes at either end of a file, where headers and directories are: half of all places are drawn there
LARGE = (0, 1, 0x7FFF, 0xFFFF, 10**6, 0x7FFFFFFF, 0xFFFFFFFF)


def place(data: bytes, rng: random.Random) -> int:
    """A position in the data, from 0 to its length."""
    if rng.random() < 0.5 or len(data) < 2 * ENDS:
        return rng.randint(0, len(data))
    offset = rng.randrange(ENDS)
    return offset if rng.random() < 0.5 else len(data) - offset


def length(data: bytes, rng: random.Random) -> int:
    """Of a block: mostly short."""
    return min(len(data), int(2 ** rng.uniform(0, 12)))


def flip(data: bytes, other: bytes, rng: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 50))):
        at = min(place(data, rng), len(data) - 1)
        spoilt[at] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def overwrite(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at, size = place(data, rng), length(data, rng)
    block = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    return data[:at] + block[: len(data) - at] + data[at + size :]


def truncate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: place(data, rng)]


def empty(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return b""


def insert(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at = place(data, rng)
    return data[:at] + rng.randbytes(length(data, rng)) + data[at:]


def delete(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at = place(data, rng)
    return data[:at] + data[at + length(data, rng) :]


def swap(data: bytes, other: bytes, rng: random.Random) -> bytes:
    size = length(data, rng)
    first, second = sorted(rng.randint(0, len(data) - size) for _ in range(2))
    if second < first + size:
        return delete(data, other, rng)
    middle = data[first + size : second]
    return data[:first] + data[second : second + size] + middle + data[first : first + size] + data[second + size :]


def splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at = place(data, rng)
    return data[:at] + other[at if rng.random() < 0.5 else place(other, rng) :]


DAMAGES = (flip, flip, flip, overwrite, overwrite, truncate, empty, insert, delete, swap, splice)


def damage(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """The data spoilt in one to three ways; `other` is a file of its kind for splicing."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(DAMAGES if data else DAMAGES[-1:])(data, other, rng)
    return data


def header_of(whole: bytes) -> bytes:
    return whole[8 : 8 + int.from_bytes(whole[:8], "little")]


def with_header(whole: bytes, header: dict | bytes) -> bytes:
    """A file with another header, and its right length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + len(header_of(whole)) :]


def with_contents(whole: bytes, contents: dict | str) -> bytes:
    """A file with other contents, and their right checksum."""
    header, text = json.loads(header_of(whole)), contents if isinstance(contents, str) else json.dumps(contents)
    header["__metadata__"] |= {"contents": text, "sha256": sha256(text)}
    return with_header(whole, header)


def contents_text(whole: bytes) -> str:
    return json.loads(header_of(whole))["__metadata__"]["contents"]


def rezip(data: bytes, change: Callable[[zipfile.ZipInfo, bytes], bytes], extra: Callable | None = None) -> bytes:
    """A zip written anew, checksums and all, each member's content (and its entry) as `change` would have it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(buffer, "w") as out:
        warnings.simplefilter("ignore")  # of names that are there already
        for info in archive.infolist():
            content = change(info, archive.read(info))
            out.writestr(info, content, info.compress_type)
        if extra:
            extra(out)
    return buffer.getvalue()


def zip_headers(data: bytes, rng: random.Random) -> bytes:
    """A zip with lies in its headers: sizes, offsets, methods, flags, checksums, names; in one header or in both."""
    spoilt = bytearray(data)
    end = data.rfind(b"PK\x05\x06")
    count, directory = struct.unpack_from("<H", data, end + 10)[0], struct.unpack_from("<I", data, end + 16)[0]
    if rng.random() < 0.15:
        struct.pack_into(*rng.choice((
            ("<H", spoilt, end + 10, rng.choice(LARGE[:4])), ("<I", spoilt, end + 12, rng.choice(LARGE)),
            ("<I", spoilt, end + 16, rng.choice(LARGE)), ("<H", spoilt, end + 20, rng.choice(LARGE[:4])),
        )))  # fmt: skip
        return bytes(spoilt)
    entry = directory
    for _ in range(rng.randrange(count)):
        name, extra, comment = struct.unpack_from("<HHH", data, entry + 28)
        entry += 46 + name + extra + comment
    local = struct.unpack_from("<I", data, entry + 42)[0]
    field, code, central_at, local_at = rng.choice((
        ("flags", "<H", 8, 6), ("method", "<H", 10, 8), ("crc", "<I", 16, 14), ("packed", "<I", 20, 18),
        ("size", "<I", 24, 22), ("name length", "<H", 28, 26), ("extra length", "<H", 30, 28),
        ("attributes", "<I", 38, None), ("offset", "<I", 42, None), ("name", None, 46, 30),
    ))  # fmt: skip
    if field == "name":
        size = struct.unpack_from("<H", data, entry + 28)[0]
        name = rng.choice((b"../", b"/etc/", b"C:\\", b"..\\", b"\x00", b"\xff\xfe", b"\x1b[2J"))[:size]
        for at in (entry + 46, local + 30):
            spoilt[at : at + len(name)] = name
        return bytes(spoilt)
    value = rng.choice((*LARGE, stat.S_IFLNK << 16, 8, 12, 14, 93, 99))
    value = min(value, 0xFFFF) if code == "<H" else value
    where = [(entry + central_at, True), (local + (local_at or 0), local_at is not None)]
    for at, exists in rng.choice((where, where[:1])):
        if exists:
            struct.pack_into(code, spoilt, at, value)
    return bytes(spoilt)


def hostile_value(rng: random.Random) -> object:
    """Something that no checkpoint, config or header should hold in most places."""
    deep = []
    for _ in range(rng.choice((200, rng.randint(900, 960)))):
        deep = [deep]
    return rng.choice((
        None, True, False, 0, 1, -1, 2, 7, 10**6, 10**9, 10**12, 2**63, -(2**70), 10**400, 0.5, -1.5, 1e308,
        float("nan"), float("inf"), "", "x", "../../x", "nan", "\x00\n\u202e\U0001f600", "y" * 10_000, [], {}, [0], [1],
        [1, 2, 4], [1] * 10_000, [10**9, 10**9], ["1"], [None], [[]], {"a": 1}, {"": {}}, deep,
    ))  # fmt: skip


def spoil_tree(tree: dict, rng: random.Random) -> None:
    """Change, remove, add or rename one thing in nested dicts and lists, in place, as often near the root as deep."""
    at = tree
    while rng.random() < 0.8:
        inner = [value for value in (at.values() if isinstance(at, dict) else at) if isinstance(value, (dict, list))]
        inner = [value for value in inner if value]
        if not inner:
            break
        at = rng.choice(inner)
    keys = list(at) if isinstance(at, dict) else list(range(len(at)))
    key = rng.choice(keys)
    action = rng.choice(("change", "change", "change", "remove", "add"))
    if action == "remove":
        del at[key]
    elif action == "add" and isinstance(at, dict):
        at[rng.choice(("extra", "", "5", "z" * 5000))] = hostile_value(rng)
    else:
        at[key] = hostile_value(rng)
