"""Pipes whose other end is slow, silent or gone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from io import RawIOBase

import pytest

from edgeprune.engine.pipes import Incoming, Late, Outgoing


@pytest.fixture
def pipe() -> Iterator[tuple[RawIOBase, RawIOBase]]:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", 0) as source, os.fdopen(writer, "wb", 0) as sink:
        yield source, sink


def soon(seconds: float = 0.05) -> float:
    return time.monotonic() + seconds


def test_lines_end_where_they_end_at_a_limit_or_with_the_pipe(pipe) -> None:
    source, sink = pipe
    incoming = Incoming(source)
    sink.write(b"one\n\ntwo and more\nth")
    assert [incoming.line(100, soon()) for _ in range(2)] == [b"one\n", b"\n"]
    assert [incoming.line(4, soon()) for _ in range(4)] == [b"two ", b"and ", b"more", b"\n"]
    with pytest.raises(Late):
        incoming.line(100, soon())
    sink.write(b"ree")
    sink.close()
    assert [incoming.line(100, soon()) for _ in range(2)] == [b"three", b""]


def test_bytes_come_as_they_are_and_no_more_than_asked_for(pipe) -> None:
    source, sink = pipe
    incoming = Incoming(source)
    sink.write(b"line\nbytes")
    assert incoming.line(100, soon()) == b"line\n"
    assert (incoming.some(3, soon()), incoming.some(100, soon())) == (b"byt", b"es")
    with pytest.raises(Late):
        incoming.some(1, soon())


def test_whoever_does_not_read_is_not_waited_for(pipe) -> None:
    source, sink = pipe
    outgoing = Outgoing(sink)
    outgoing.write(b"x" * 1000, soon())
    with pytest.raises(Late):
        outgoing.write(b"x" * 10**6, soon())
    assert source.read(1000) == b"x" * 1000
    source.close()
    with pytest.raises(BrokenPipeError):
        outgoing.write(b"x", soon())
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        outgoing.write(b"x", soon())
