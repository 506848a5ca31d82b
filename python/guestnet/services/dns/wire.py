"""DNS messages as bytes (RFC 1035 section 4, EDNS by RFC 6891), as much as serving and forwarding need.

What is forwarded stays bytes: of an answer only its shape is checked, and where its TTLs are. So any type of
record passes, also those that nobody has thought of yet. Reading never raises anything but `Malformed`, and
looks at each byte a bounded number of times: names in questions are not compressed, others are skipped.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

HEADER = struct.Struct("!HHHHHH")
_RECORD = struct.Struct("!HHIH")
_UNSIGNED = struct.Struct("!I")

QR, AA, TC, RD, RA, AD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
DO = 0x8000
"""In the flags of EDNS: the asker wants DNSSEC records."""
UDP_PLAIN = 512
"""Bytes of an answer that anyone takes."""
UDP_LARGEST = 1232
"""Bytes of an answer over UDP that no link splits."""
NAME_LONGEST, LABEL_LONGEST = 255, 63
QUERY_RECORDS = 16
"""Records that come with a question at most: OPT, a signature, and a few that nobody knows yet."""
IN = 1


class Type(IntEnum):
    """Types of records that the server itself knows."""

    A = 1
    NS = 2
    CNAME = 5
    SOA = 6
    PTR = 12
    HINFO = 13
    MX = 15
    TXT = 16
    AAAA = 28
    SRV = 33
    OPT = 41
    ANY = 255


class Rcode(IntEnum):
    """What became of a question."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16


class Malformed(Exception):
    """Not a DNS message, or not one that can be understood in one way only."""


@dataclass(frozen=True)
class Edns:
    """What the other side says of itself."""

    size: int
    version: int
    flags: int
    rcode_high: int = 0
    options: bytes = b""


@dataclass(frozen=True)
class Query:
    """A question. `name` is as it was asked, `key` in lower case; both as labels, with the final zero."""

    id: int
    flags: int
    name: bytes
    type: int
    rclass: int
    edns: Edns | None

    @property
    def key(self) -> bytes:
        """The name without its case. Lengths of labels are no letters, so all bytes can be lowered alike."""
        return self.name.lower()

    @property
    def question(self) -> bytes:
        """The bytes of the question section."""
        return self.name + struct.pack("!HH", self.type, self.rclass)

    @property
    def wants_dnssec(self) -> bool:
        """The DO bit."""
        return self.edns is not None and bool(self.edns.flags & DO)

    def largest(self, tcp: bool) -> int:
        """Bytes of an answer that the asker takes."""
        if tcp:
            return 0xFFFF
        return UDP_PLAIN if self.edns is None else max(UDP_PLAIN, min(self.edns.size, UDP_LARGEST))


def opcode(flags: int) -> int:
    """The kind of query; 0 is an ordinary one."""
    return flags >> 11 & 15


def read_name(data: bytes, at: int) -> int:
    """Where an uncompressed name ends."""
    start = at
    while True:
        if at >= len(data):
            raise Malformed("name is cut off")
        length = data[at]
        at += 1 + length
        if length == 0:
            break
        if length > LABEL_LONGEST:
            raise Malformed("compressed name, or a label of an unknown kind")
    if at - start > NAME_LONGEST:
        raise Malformed("name is too long")
    return at


def skip_name(data: bytes, at: int) -> int:
    """Where a name ends that may be compressed. It is not followed, so it cannot loop."""
    start = at
    while True:
        if at >= len(data) or at - start > NAME_LONGEST:
            raise Malformed("name is cut off")
        length = data[at]
        if length & 0xC0 == 0xC0:
            if at + 2 > len(data):
                raise Malformed("name is cut off")
            return at + 2
        if length & 0xC0:
            raise Malformed("label of an unknown kind")
        at += 1 + length
        if length == 0:
            return at


@dataclass(frozen=True)
class Record:
    """Where a record of a message is, and what it is."""

    start: int
    type: int
    rclass: int
    ttl: int
    ttl_at: int
    data_at: int
    end: int


def read_record(data: bytes, at: int) -> Record:
    """The record that begins here."""
    start, at = at, skip_name(data, at)
    if at + _RECORD.size > len(data):
        raise Malformed("record is cut off")
    type_, rclass, ttl, length = _RECORD.unpack_from(data, at)
    end = at + _RECORD.size + length
    if end > len(data):
        raise Malformed("record is cut off")
    return Record(start, type_, rclass, ttl, at + 4, at + _RECORD.size, end)


def _edns(data: bytes, record: Record) -> Edns:
    if data[record.start] != 0:
        raise Malformed("OPT with a name")
    options = data[record.data_at : record.end]
    return Edns(record.rclass, record.ttl >> 16 & 0xFF, record.ttl & 0xFFFF, record.ttl >> 24, options)


def read_query(data: bytes) -> Query:
    """Reads a query of the ordinary kind."""
    id_, flags, questions, answers, authorities, additionals = HEADER.unpack_from(data)
    if questions != 1:
        raise Malformed("not one question")
    if answers + authorities + additionals > QUERY_RECORDS:
        raise Malformed("more records than belong to a question")
    at = read_name(data, HEADER.size)
    name = data[HEADER.size : at]
    if at + 4 > len(data):
        raise Malformed("question is cut off")
    type_, rclass = struct.unpack_from("!HH", data, at)
    at += 4
    edns = None
    for number in range(answers + authorities + additionals):
        record = read_record(data, at)
        at = record.end
        if record.type == Type.OPT:
            if edns is not None or number < answers + authorities:
                raise Malformed("more than one OPT, or one in the wrong place")
            edns = _edns(data, record)
    return Query(id_, flags, name, type_, rclass, edns)


@dataclass(frozen=True)
class Answer:
    """The shape of a response to `question`; `records` counts those of the sections, without OPT."""

    id: int
    flags: int
    question: bytes
    answers: int
    authorities: int
    additionals: int
    records: tuple[Record, ...]
    edns: Edns | None

    @property
    def rcode(self) -> int:
        """With the bits that EDNS adds."""
        return self.flags & 15 | (0 if self.edns is None else self.edns.rcode_high << 4)


def read_answer(data: bytes) -> Answer:
    """Reads the shape of a response with one question. What follows an OPT record is not taken."""
    if len(data) < HEADER.size:
        raise Malformed("header is cut off")
    id_, flags, questions, answers, authorities, additionals = HEADER.unpack_from(data)
    if questions != 1 or not flags & QR:
        raise Malformed("not a response to one question")
    at = read_name(data, HEADER.size) + 4
    if at > len(data):
        raise Malformed("question is cut off")
    question = data[HEADER.size : at]
    records = []
    edns = None
    for number in range(answers + authorities + additionals):
        record = read_record(data, at)
        at = record.end
        if record.type == Type.OPT:
            if number < answers + authorities:
                raise Malformed("OPT in the wrong place")
            edns = _edns(data, record)
            additionals = number - answers - authorities
            break
        records.append(record)
    return Answer(id_, flags, question, answers, authorities, additionals, tuple(records), edns)


def body_end(answer: Answer) -> int:
    """Where the records of an answer end: its OPT begins there, or nothing."""
    return answer.records[-1].end if answer.records else HEADER.size + len(answer.question)


def opt(query: Query, rcode: int, options: bytes = b"") -> bytes:
    """The OPT record of an answer; nothing when the query had none."""
    if query.edns is None:
        return b""
    ttl = rcode >> 4 << 24 | query.edns.flags & DO
    return b"\0" + _RECORD.pack(Type.OPT, UDP_LARGEST, ttl, len(options)) + options


def explanation(code: int, text: str) -> bytes:
    """An extended error (RFC 8914), for the people who look at answers with dig."""
    said = text.encode("ascii")
    return struct.pack("!HHH", 15, 2 + len(said), code) + said


def respond(
    query: Query,
    rcode: int,
    sections: tuple[list[bytes], list[bytes], list[bytes]] = ([], [], []),
    *,
    flags: int = 0,
    tcp: bool = True,
    options: bytes = b"",
) -> bytes:
    """An answer of the server's own. What does not fit is left out with TC set (RFC 2181 section 9)."""
    last = opt(query, rcode, options)
    body = b"".join(b"".join(section) for section in sections)
    said = QR | RA | flags | query.flags & (RD | CD) | rcode & 15
    counts = [len(section) for section in sections]
    if HEADER.size + len(query.question) + len(body) + len(last) > query.largest(tcp):
        body, counts, said = b"", [0, 0, 0], said | TC
    counts[2] += 1 if last else 0
    return HEADER.pack(query.id, said, 1, *counts) + query.question + body + last


def record(name: bytes, type_: int, ttl: int, rdata: bytes) -> bytes:
    """A record; `name` as labels, or as a pointer."""
    return name + _RECORD.pack(type_, IN, ttl, len(rdata)) + rdata


def refuse(data: bytes, rcode: int) -> bytes | None:
    """The answer to what was not understood: only its header (RFC 1035 section 4.1.1)."""
    if len(data) < HEADER.size:
        return None
    id_, flags = struct.unpack_from("!HH", data)
    return HEADER.pack(id_, QR | flags & 0x7800 | flags & RD | rcode, 0, 0, 0, 0)


def to_labels(name: str) -> bytes:
    """A name of letters as labels. Raises `Malformed`."""
    labels = name.rstrip(".").split(".") if name.rstrip(".") else []
    try:
        encoded = [label.encode("ascii") for label in labels]
    except UnicodeEncodeError:
        raise Malformed("not ASCII") from None
    if any(not 0 < len(label) <= LABEL_LONGEST for label in encoded):
        raise Malformed("an empty label, or one over 63 characters")
    out = b"".join(bytes((len(label),)) + label for label in encoded) + b"\0"
    if len(out) > NAME_LONGEST:
        raise Malformed("over 253 characters")
    return out


def labels_of(name: bytes) -> list[bytes]:
    """The labels of a name that was read, without the last empty one."""
    labels = []
    at = 0
    while name[at]:
        labels.append(name[at + 1 : at + 1 + name[at]])
        at += 1 + name[at]
    return labels


def parents(name: bytes) -> list[bytes]:
    """The name, its parent, and so on up to the last label."""
    found = []
    at = 0
    while name[at]:
        found.append(name[at:])
        at += 1 + name[at]
    return found
