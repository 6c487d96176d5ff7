"""Damages files as disks, editors and strangers do: bytes of any file, values of JSON and TOML, lines, headers."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

# As they stand in a JSON text; NaN and Infinity are not JSON, but Python reads them.
_PLAIN = """
null true false 0 -1 1 0.5 -0.0 1e-320 1e308 4294967296 9223372036854775808 1e400 -1e400 NaN Infinity
"" "text" "1" [] [[]] {} {"a":1} [null] ["a","b"]
"\\ud800" "\\u0000" "\\u001b[31mred" "\\u202e" "../../up" "/etc/passwd" "{{1/0}}"
"""
_DEEP = ("[" * 5_000 + "]" * 5_000, '{"a":' * 5_000 + "1" + "}" * 5_000)
_VALUES = (*_PLAIN.split(), '" "', "1" + "0" * 400, f'"{"long " * 20_000}"', *_DEEP)
_PLAIN_TOML = """
nan inf -inf 1e400 -1 0 1e-320 "" "text" [] {} true {a=1} 9223372036854775808 1979-05-27 [[[1]]]
"\\u001b[31mred" "../../up" nothing
"""
_TOML_VALUES = _PLAIN_TOML.split()
_LINES = (b"\xff\xfe", b"\x00", "\u2028\u0085".encode(), b"\r", b"\n \n", b"\t", b"[" * 5_000, b"\xed\xa0\x80")
_MARK = b"\xef\xbb\xbf"
_OTHERS = (
    *(b"", b"null", b"[]", b"{}", b"\n"),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
    b"<!DOCTYPE html><html><body>404</body></html>",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n",
    *(b"GIF89a", b"PK\x03\x04" + bytes(30), b"GGUF", b"\x80\x02}q\x00."),
)


def bits(data: bytes, random: Random) -> bytes:
    """Flips a few bits."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 4, 32)) if data else 0):
        changed[_place(data, random)] ^= 1 << random.randrange(8)
    return bytes(changed)


def truncated(data: bytes, random: Random) -> bytes:
    return data[: random.choice((0, 1, len(data) - 1, _place(data, random)))] if data else data


def spliced(data: bytes, random: Random) -> bytes:
    """Puts a piece of the file, zeros or noise over another place, or in between."""
    at, start, size = _place(data, random), _place(data, random), random.choice((1, 7, 64, 4096))
    piece = random.choice((data[start : start + size], bytes(size), random.randbytes(size)))
    return data[:at] + piece + data[at + random.choice((0, len(piece))) :]


def with_mark(data: bytes, random: Random) -> bytes:
    """Begins with a byte order mark, or is in another encoding."""
    text = data.decode("utf-8", "replace")
    return random.choice((_MARK + data, text.encode("utf-16"), text.encode("utf-32"), text.encode("cp500", "replace")))


def other_kind(data: bytes, random: Random) -> bytes:
    """Is another file altogether."""
    return random.choice(_OTHERS)


def json_value(data: bytes, random: Random) -> bytes:
    """Changes one value of a JSON document, or its names; another mutation where it is none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return bits(data, random)
    spots = list(_spots(document))
    if not spots or random.random() < 0.03:
        return random.choice(_VALUES).encode()
    holder, key = random.choice(spots)
    how = random.random()
    raw = {}
    if how < 0.7:
        holder[key], raw = "@RAW@", {'"@RAW@"': random.choice(_VALUES)}
    elif how < 0.78:
        del holder[key]
    elif how < 0.86:
        other, place = random.choice(spots)
        holder[key] = json.loads(json.dumps(other.get(place) if isinstance(other, dict) else None))
    elif isinstance(holder, dict) and how < 0.93:
        holder["@NAME@"], raw = "@RAW@", {'"@NAME@"': json.dumps(key), '"@RAW@"': random.choice(_VALUES)}  # twice
    elif isinstance(holder, dict):
        holder[random.choice(("", "unknown", "\x1b[31m", str(key).upper(), "\ud800"))] = holder.pop(key)
    else:
        holder[:] = holder * random.choice((0, 2, 50))
    text = json.dumps(document)
    for name, value in raw.items():
        text = text.replace(name, value)
    return text.encode("utf-8", "surrogatepass")


def json_line(data: bytes, random: Random) -> bytes:
    """Changes a value in one line of JSON lines."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    lines[at] = json_value(lines[at], random) if lines[at] else random.choice(_VALUES).encode()
    return b"\n".join(lines)


def line(data: bytes, random: Random) -> bytes:
    """Removes, repeats, exchanges or breaks a line."""
    lines = data.split(b"\n")
    at, other = random.randrange(len(lines)), random.randrange(len(lines))
    match random.randrange(4):
        case 0:
            del lines[at]
        case 1:
            lines.insert(other, lines[at])
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case _:
            lines[at] += random.choice(_LINES)
    return b"\n".join(lines)


def toml_value(data: bytes, random: Random) -> bytes:
    """Changes one value of a TOML document."""
    lines = data.split(b"\n")
    places = [index for index, text in enumerate(lines) if re.match(rb"\s*[\w-]+\s*=", text)]
    if not places:
        return bits(data, random)
    at = random.choice(places)
    lines[at] = lines[at].split(b"=")[0] + b"= " + random.choice(_TOML_VALUES).encode()
    return b"\n".join(lines)


def safetensors_header(data: bytes, random: Random) -> bytes:
    """Changes one value of the header, whose length is right again, or the length itself."""
    if len(data) < 8:
        return data
    (length,) = struct.unpack_from("<Q", data)
    if random.random() < 0.15:
        return struct.pack("<Q", random.choice((0, 1, length - 1, length + 1, 2**40, 2**63, 2**64 - 1))) + data[8:]
    header = json_value(data[8 : 8 + length], random)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def gguf_header(data: bytes, random: Random) -> bytes:
    """Changes bytes of the metadata, such as a count or a length."""
    changed, at = bytearray(data), random.randrange(4, max(5, min(len(data) - 8, 12_000)))
    size = random.choice((1, 4, 8))
    changed[at : at + size] = random.choice(
        (bytes(size), b"\xff" * size, random.randbytes(size), b"\x7f" + bytes(size - 1))
    )
    return bytes(changed)


BINARY = (bits, bits, truncated, spliced, other_kind)
TEXT = (*BINARY, with_mark, line)
JSON = (json_value,) * 12 + TEXT
JSON_LINES = (json_line,) * 8 + TEXT
TOML = (toml_value,) * 8 + TEXT
SAFETENSORS = (safetensors_header,) * 5 + BINARY
GGUF = (gguf_header,) * 5 + BINARY


def _place(data: bytes, random: Random) -> int:
    """Returns a place in a file, more often near its begin or its end."""
    span = random.choice((64, 1024, len(data)))
    at = random.randrange(max(1, min(span, len(data))))
    return at if random.random() < 0.75 else max(0, len(data) - 1 - at)


def _spots(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every place of a document that holds a value: the object or list, and the name or index."""
    if isinstance(document, dict | list):
        for key, value in list(document.items() if isinstance(document, dict) else enumerate(document)):
            yield document, key
            yield from _spots(value)
