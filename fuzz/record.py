"""Makes the recorded conversations that the tests of guestnet-wire's inspectors read.

Real clients (OpenSSL, aioquic) talk to real servers in memory; what the client sends is kept. A file of a
stream has all its bytes, a file of datagrams each behind its length (two bytes). Keys and random numbers
differ in each run. It needs aioquic and pyOpenSSL: `pip install aioquic pyOpenSSL`, then
`python fuzz/record.py`, and `python fuzz/seeds.py` for the seeds of the fuzzer.
"""

import contextlib
import datetime
import ssl
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

from aioquic.buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicProtocolVersion as Version
from aioquic.quic.packet import (
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL

DATA = Path(__file__).parent.parent / "crates/guestnet-wire/src/inspect/data"
NAME = "www.ok.example"
VERSIONS = (Version.VERSION_1, Version.VERSION_2)
CLIENT, SERVER = ("192.0.2.1", 1), ("192.0.2.2", 443)


def certificate() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now)
    return builder.not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256()), key


CERTIFICATE, KEY = certificate()


def write(name: str, data: bytes) -> None:
    DATA.mkdir(exist_ok=True)
    (DATA / f"{name}.bin").write_bytes(data)
    print(name, len(data))


# TLS


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.set_alpn_protocols(["h2", "http/1.1"])
    with tempfile.NamedTemporaryFile(suffix=".pem") as f:
        f.write(CERTIFICATE.public_bytes(serialization.Encoding.PEM))
        f.write(KEY.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ))  # fmt: skip
        f.flush()
        server.load_cert_chain(f.name)
    return client, server


def tls(client: ssl.SSLContext, server: ssl.SSLContext, session: Any = None) -> tuple[bytes, Any]:
    """What a client sends until it has asked for something, and its session."""
    a, b = ssl.MemoryBIO(), ssl.MemoryBIO()
    c = client.wrap_bio(a, b, server_hostname=NAME, session=session)
    s = server.wrap_bio(b2 := ssl.MemoryBIO(), a, server_side=True)
    sent, done = b"", False
    for _ in range(10):
        for side in (c, s):
            try:
                side.do_handshake()
                if side is c and not done:
                    c.write(b"GET / HTTP/1.1\r\n\r\n")
                    done = True
                if side is s:
                    s.write(b"x")
                else:
                    c.read(1)
            except ssl.SSLWantReadError:
                pass
            new = b.read()
            sent += new
            b2.write(new)
    return sent, c.session


def large_hello() -> bytes:
    """A ClientHello with a key share of ML-KEM, from a newer OpenSSL than Python's."""
    c = SSL.Connection(SSL.Context(SSL.TLS_CLIENT_METHOD), None)
    c.set_tlsext_host_name(NAME.encode())
    c.set_alpn_protos([b"h2", b"http/1.1"])
    c.set_connect_state()
    with contextlib.suppress(SSL.WantReadError):
        c.do_handshake()
    return c.bio_read(65536)


def streams() -> None:
    client, server = contexts()
    sent, _ = tls(client, server)
    write("tls13", sent)
    write("hello_517", sent[: 5 + struct.unpack("!H", sent[3:5])[0]])
    server.set_ecdh_curve("secp384r1")
    write("tls13_retry", tls(client, server)[0])
    client, server = contexts()
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    sent, session = tls(client, server)
    write("tls12", sent)
    write("tls12_resumed", tls(client, server, session)[0])
    write("hello_large", large_hello())


# QUIC


TICKETS: dict[bytes, Any] = {}


def quic(
    versions: tuple[int, ...] = (Version.VERSION_1,),
    server_versions: tuple[int, ...] = (Version.VERSION_1, Version.VERSION_2),
    retry: bool = False,
    large: bool = False,
    ticket: Any = None,
) -> tuple[list[bytes], Any]:
    """The datagrams of a client until it is connected and has asked for something, and the ticket it got.

    It begins with the last of its versions, and likes the first one best.
    """
    tickets: list[Any] = []
    alpn = ["h3"] + ["x" * 200] * (6 if large else 0)
    config = QuicConfiguration(
        is_client=True, server_name=NAME, alpn_protocols=alpn, verify_mode=ssl.CERT_NONE,
        original_version=versions[-1], supported_versions=list(versions), session_ticket=ticket,
    )  # fmt: skip
    client = QuicConnection(configuration=config, session_ticket_handler=tickets.append)
    there = QuicConfiguration(
        is_client=False, alpn_protocols=["h3"], supported_versions=list(server_versions)
    )
    there.certificate, there.private_key = CERTIFICATE, KEY
    server: QuicConnection | None = None
    sent: list[bytes] = []
    retried: bytes | None = None
    client.connect(SERVER, 0.0)
    client.send_stream_data(0, b"data, early if there is a ticket")
    for now in range(8):
        for datagram, _to in client.datagrams_to_send(now / 20):
            sent.append(datagram)
            header = pull_quic_header(Buffer(data=datagram), host_cid_length=8)
            here, peer = header.destination_cid, header.source_cid
            answer = None
            if server is None and header.version not in server_versions:
                answer = encode_quic_version_negotiation(here, peer, list(server_versions))
            elif server is None and retry and not header.token and retried is None:
                answer = encode_quic_retry(header.version, b"retry_id", peer, here, b"a token")
                retried = here
            if answer is not None:
                client.receive_datagram(answer, SERVER, now / 20)
            elif retried is None or here != retried:
                server = server or QuicConnection(
                    configuration=there, original_destination_connection_id=retried or here,
                    retry_source_connection_id=here if retried else None,
                    session_ticket_fetcher=TICKETS.get,
                    session_ticket_handler=lambda t: TICKETS.update({t.ticket: t}),
                )  # fmt: skip
                server.receive_datagram(datagram, CLIENT, now / 20)
        for datagram, _to in server.datagrams_to_send(now / 20) if server else ():
            client.receive_datagram(datagram, SERVER, now / 20)
    return sent, (tickets or [None])[-1]


def flows() -> None:
    def keep(name: str, **choices: Any) -> Any:
        sent, ticket = quic(**choices)
        print([f"{d[0]:02x}.{d[1:5].hex()}.{len(d)}" for d in sent])
        write(name, b"".join(struct.pack("!H", len(d)) + d for d in sent))
        return ticket

    ticket = keep("quic_1")
    assert ticket is not None
    keep("quic_early_data", ticket=ticket)
    keep("quic_2", versions=(Version.VERSION_2,))
    keep("quic_retry", retry=True)
    keep("quic_large_retry", retry=True, large=True)
    keep("quic_goes_on_in_2", versions=(Version.VERSION_2, Version.VERSION_1))
    keep("quic_again_in_1", versions=VERSIONS, server_versions=(Version.VERSION_1,))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        DATA = Path(sys.argv[1])
    streams()
    flows()
