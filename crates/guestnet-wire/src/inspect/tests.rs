use super::*;
use proptest::prelude::*;

/// A ClientHello message with these extensions.
fn hello_with(extensions: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend_from_slice(&[7; 32]);
    body.push(32);
    body.extend_from_slice(&[9; 32]);
    body.extend_from_slice(&[0, 4, 0x13, 1, 0x13, 2, 1, 0]);
    let all: Vec<u8> = extensions
        .iter()
        .flat_map(|(kind, data)| [&kind.to_be_bytes()[..], &(data.len() as u16).to_be_bytes(), data].concat())
        .collect();
    body.extend_from_slice(&(all.len() as u16).to_be_bytes());
    body.extend_from_slice(&all);
    let len = (body.len() as u32).to_be_bytes();
    [&[1, len[1], len[2], len[3]][..], &body].concat()
}

fn sni(name: &[u8]) -> (u16, Vec<u8>) {
    let len = name.len() as u16;
    (0, [&(len + 3).to_be_bytes()[..], &[0], &len.to_be_bytes(), name].concat())
}

/// The extension supported_versions with TLS 1.3 and 1.2.
fn tls13() -> (u16, Vec<u8>) {
    (43, vec![4, 3, 4, 3, 3])
}

fn record(kind: u8, data: &[u8]) -> Vec<u8> {
    [&[kind, 3, 1][..], &(data.len() as u16).to_be_bytes(), data].concat()
}

/// A message in records of so many bytes.
fn records(message: &[u8], size: usize) -> Vec<u8> {
    message.chunks(size).flat_map(|part| record(22, part)).collect()
}

fn hello(name: &[u8]) -> Vec<u8> {
    record(22, &hello_with(&[sni(name)]))
}

fn name_of(progress: Progress) -> Option<String> {
    match progress {
        Progress::Tls(h) => h.server_name.map(|n| String::from_utf8(n.into()).unwrap()),
        other => panic!("{other:?}"),
    }
}

/// An inspector that is given what it left.
#[derive(Default)]
struct Pieces {
    inspector: StreamInspector,
    left: Vec<u8>,
}

impl Pieces {
    fn feed(&mut self, bytes: &[u8]) -> Progress {
        self.left.extend_from_slice(bytes);
        let (taken, progress) = self.inspector.feed(&self.left);
        self.left.drain(..taken);
        assert!(self.left.is_empty() || !matches!(progress, Progress::More));
        progress
    }
}

fn whole(bytes: &[u8]) -> Progress {
    StreamInspector::new().feed(bytes).1
}

#[test]
fn the_server_name_is_read_in_any_pieces() {
    let large = hello_with(&[(51, vec![1; 1700]), sni(b"Ok.Example"), (21, vec![0; 900])]);
    for size in [1, 7, 100, 1024, 16384] {
        let stream = records(&large, size);
        assert_eq!(name_of(whole(&stream)).as_deref(), Some("ok.example"), "records of {size}");
        let mut byte_by_byte = StreamInspector::new();
        for (at, byte) in stream.iter().enumerate() {
            let progress = byte_by_byte.feed(&[*byte]).1;
            if at + 1 == stream.len() {
                assert_eq!(name_of(progress).as_deref(), Some("ok.example"));
            } else {
                assert_eq!(progress, Progress::More, "at {at}");
            }
        }
    }
}

#[test]
fn names_are_compared_in_one_spelling() {
    assert_eq!(name_of(whole(&hello(b"OK.example."))).as_deref(), Some("ok.example"));
    assert_eq!(name_of(whole(&hello(b"xn--mnchen-3ya.example"))).as_deref(), Some("xn--mnchen-3ya.example"));
    for address in [&b"192.0.2.1"[..], b"2001:db8::1"] {
        assert_eq!(name_of(whole(&hello(address))), None, "an address is no name");
    }
    let longest = [&[b'a'; 63][..], &[b'b'; 63], &[b'c'; 63], &[b'd'; 61]].join(&b'.');
    assert_eq!(longest.len(), 253);
    assert_eq!(name_of(whole(&hello(&longest))).unwrap().len(), 253);
    let too_long = [&longest[..], b"d"].concat();
    assert!(matches!(whole(&hello(&too_long)), Progress::Malformed(_)));
    assert_eq!(name_of(whole(&record(22, &hello_with(&[(10, vec![0, 2, 0, 29])])))), None);
    for wrong in [&b""[..], b"a..b", b"a\0b", "münchen.example".as_bytes(), b"a b", &[b'a'; 300], b"a,b"] {
        assert!(matches!(whole(&hello(wrong)), Progress::Malformed(_)), "{wrong:?}");
    }
}

#[test]
fn a_hello_with_two_names_or_wrong_lengths_is_malformed() {
    let twice = hello_with(&[sni(b"ok.example"), sni(b"evil.example")]);
    let list: Vec<u8> =
        [sni(b"ok.example").1.get(2..).unwrap(), sni(b"evil.example").1.get(2..).unwrap()].concat();
    let two = hello_with(&[(0, [&(list.len() as u16).to_be_bytes()[..], &list].concat())]);
    let other_kind = hello_with(&[(0, vec![0, 4, 1, 0, 1, b'a'])]);
    for message in [twice, two, other_kind] {
        assert!(matches!(whole(&record(22, &message)), Progress::Malformed(_)));
    }
    let good = hello_with(&[sni(b"ok.example")]);
    for at in 4..good.len() {
        let mut cut = good[..at].to_vec();
        let len = (at as u32 - 4).to_be_bytes();
        cut[1..4].copy_from_slice(&len[1..]);
        // Without its extensions it is one of TLS 1.2 that shows no name.
        let progress = whole(&record(22, &cut));
        let bare = matches!(&progress, Progress::Tls(h) if h.server_name.is_none());
        assert!(bare || matches!(progress, Progress::Malformed(_)), "cut at {at}: {progress:?}");
    }
    let long = [&[1, 1, 0, 0][..], &[0; 100]].concat();
    assert!(matches!(whole(&record(22, &long)), Progress::Malformed(_)));
    assert!(matches!(whole(&[22, 3, 1, 0, 0]), Progress::Malformed(_)), "an empty record");
    assert!(matches!(whole(&record(22, &[2, 0, 0, 4])), Progress::Malformed(_)), "a ServerHello");
    assert!(matches!(whole(&record(23, &[1; 40])), Progress::Opaque(_)), "no TLS begins with it");
}

#[test]
fn extensions_that_matter_are_seen() {
    let h = hello_with(&[(0xfe0d, vec![0; 8]), (42, vec![])]);
    let Progress::Tls(h) = whole(&record(22, &h)) else { panic!() };
    assert!(h.ech && h.early_data);
    let many: Vec<(u16, Vec<u8>)> =
        (100..200).map(|k| (k, vec![1; 10])).chain([sni(b"ok.example")]).collect();
    assert_eq!(name_of(whole(&record(22, &hello_with(&many)))).as_deref(), Some("ok.example"));
}

#[test]
fn a_second_hello_is_read_and_encrypted_data_ends_it() {
    let ccs = record(20, &[1]);
    let first = record(22, &hello_with(&[sni(b"ok.example"), tls13()]));
    for (between, after) in [(vec![], vec![]), (ccs.clone(), vec![]), (vec![], ccs.clone())] {
        let mut s = Pieces::default();
        assert!(matches!(s.feed(&first), Progress::Tls(_)));
        assert_eq!(s.feed(&between), Progress::More);
        assert_eq!(name_of(s.feed(&hello(b"evil.example"))).as_deref(), Some("evil.example"));
        assert_eq!(s.feed(&after), Progress::More);
        assert_eq!(s.feed(&record(23, &[0; 40])), Progress::Opaque("encrypted"));
    }
    // Bytes behind a hello are not taken with it.
    let mut s = Pieces::default();
    assert!(matches!(s.feed(&[first, ccs.clone()].concat()), Progress::Tls(_)));
    assert_eq!(s.left, ccs);
    let second = hello(b"evil.example");
    assert_eq!(s.feed(&second[..40]), Progress::More);
    assert_eq!(s.inspector.pending(), 40, "what came before may pass");
    assert_eq!(name_of(s.feed(&second[40..])).as_deref(), Some("evil.example"));
}

/// A stream that has shown ok.example, with TLS 1.3 and 1.2 on offer, and has changed its cipher.
fn changed_cipher(more: &[(u16, Vec<u8>)]) -> Pieces {
    let mut s = Pieces::default();
    let hello = hello_with(&[&[sni(b"ok.example"), tls13()], more].concat());
    assert_eq!(name_of(s.feed(&record(22, &hello))).as_deref(), Some("ok.example"));
    assert_eq!(s.feed(&record(20, &[1])), Progress::More);
    s
}

#[test]
fn a_second_hello_behind_a_change_of_cipher_is_not_taken_for_encrypted() {
    let mut strange = hello_with(&[sni(b"evil.example")]);
    strange[4..6].copy_from_slice(&[0xff, 0xff]); // servers look at supported_versions instead
    let large = hello_with(&[sni(b"evil.example"), (21, vec![0; 60_000]), (51, vec![0; 5600])]);
    for size in [1, 3, 5, 64, 16384] {
        let last = changed_cipher(&[]).feed(&records(&strange, size));
        assert_eq!(name_of(last).as_deref(), Some("evil.example"), "records of {size}");
        let last = changed_cipher(&[]).feed(&records(&large, size.max(64)));
        assert_eq!(last, Progress::Malformed("a ClientHello that is too long"));
    }
    // With early data a server passes over encrypted records, perhaps within a message too.
    let (a, b) = strange.split_at(40);
    let mut s = changed_cipher(&[(42, vec![])]);
    assert_eq!(s.feed(&record(22, a)), Progress::More);
    let last = s.feed(&[record(23, &[0; 40]), record(22, b)].concat());
    assert!(matches!(last, Progress::Malformed(_)), "{last:?}");
}

#[test]
fn tls_1_2_goes_on_without_being_looked_at() {
    let mut s = Pieces::default();
    s.feed(&hello(b"ok.example"));
    assert_eq!(s.feed(&record(22, &[16, 0, 0, 2, 0, 0])), Progress::Opaque("encrypted"));
    // A resumed session: Finished is encrypted, whatever its first byte.
    for first in [0, 1, 16] {
        let mut s = changed_cipher(&[]);
        let mut finished = [0xa5; 32];
        finished[0] = first;
        assert_eq!(s.feed(&record(22, &finished)), Progress::Opaque("encrypted"), "{first}");
        let mut s = Pieces::default();
        s.feed(&[hello(b"ok.example"), record(20, &[1])].concat());
        assert_eq!(s.feed(&[]), Progress::More);
        assert_eq!(s.feed(&record(22, &finished)), Progress::Opaque("encrypted"), "no TLS 1.3");
    }
    // It begins like a ClientHello by chance: the data behind it shows that it was none.
    let mut s = changed_cipher(&[]);
    let chance = [&[1, 3, 0xa5][..], &[0xa5; 37]].concat();
    assert_eq!(s.feed(&record(22, &chance)), Progress::More);
    assert_eq!(s.feed(&record(23, &[0; 64])), Progress::Opaque("encrypted"));
}

#[test]
fn early_data_does_not_hide_a_second_hello() {
    let mut s = Pieces::default();
    s.feed(&record(22, &hello_with(&[sni(b"ok.example"), (42, vec![])])));
    assert_eq!(s.feed(&record(23, &[0; 1000])), Progress::More);
    assert_eq!(name_of(s.feed(&hello(b"evil.example"))).as_deref(), Some("evil.example"));
    assert_eq!(s.feed(&record(23, &[0; 10])), Progress::Opaque("encrypted"));
    // It is not watched for ever.
    let mut s = Pieces::default();
    s.feed(&record(22, &hello_with(&[sni(b"ok.example"), (42, vec![])])));
    let last = (0..10).map(|_| s.feed(&record(23, &[0; 16000]))).last();
    assert_eq!(last, Some(Progress::Opaque("encrypted")));
}

#[test]
fn a_hello_in_pieces_is_not_interrupted() {
    let message = hello_with(&[sni(b"ok.example")]);
    let (a, b) = message.split_at(50);
    for between in [record(20, &[1]), record(21, &[1, 0]), record(23, &[0; 9])] {
        let stream = [record(22, a), between, record(22, b)].concat();
        assert!(matches!(whole(&stream), Progress::Malformed(_)));
    }
    let behind = [message, vec![1, 0, 0]].concat();
    assert!(matches!(whole(&record(22, &behind)), Progress::Malformed(_)));
}

#[test]
fn other_protocols_are_opaque_as_soon_as_that_is_certain() {
    for (bytes, result) in [
        (&b"SSH-2.0-OpenSSH_9.9 x\r\n"[..], "no request line"),
        (b"EHLO client.example\r\n", "no request line"),
        (b"\0\0\0\x08\x04\xd2\x16\x2f", "no request line"),
        (b"PRI * HTTP/2.0\r\n", "HTTP/2 without TLS"),
        (b"*1\r\n$4\r\nPING\r\n", "no request line"),
        (b"GET /path\r\n", "no request line"),
        (b"GET key\r\n", "no request line"),
        (b"{\"json\": 1}", "no request line"),
        (b"\x16\x10", "not TLS"),
        (b"\x80\x2e\x01", "no request line"),
    ] {
        assert_eq!(whole(bytes), Progress::Opaque(result), "{bytes:?}");
    }
    for bytes in [&b"GET /"[..], b"\r\n", b"\x16", b"A", b"EHLO client"] {
        assert_eq!(whole(bytes), Progress::More);
    }
    assert_eq!(whole(b"\r\n\r\nGET / HTTP/1.1\r\n"), Progress::Http);
    // Some server takes each of these for HTTP, so the reader of heads has to refuse them.
    for line in [
        &b"GET / http/1.1\n"[..],
        b"GET / HTTP/1.1 \r\n",
        b"GET / HTTP/1.1\t\r\r\n",
        b"GET\t/\tHTTP/1.1\r\n",
        b" GET / HTTP/1.1\r\n",
        b"GET\xa0/\x1fHTTP/1.1\r\n",
        b"GET / HTTP/2.0\r\n",
        b"GET /\0 HTTP/1.1\r\n",
        b"\rGET / HTTP/1.1\r\n",
        &[&[b'A'; 300][..], b" / HTTP/1.1\r\n"].concat(),
    ] {
        assert_eq!(whole(line), Progress::Http, "{line:?}");
        let head = [line, b"Host: ok.example\r\n\r\n"].concat();
        let progress = HttpInspector::new().feed(&head).1;
        let is_fine = line.starts_with(b"AAA");
        assert_eq!(matches!(progress, HttpProgress::Malformed(_)), !is_fine, "{line:?}");
    }
    let versions = whole(&[22, 2, 0, 0, 5, 1, 0, 0, 1, 0]);
    assert_eq!(versions, Progress::Malformed("a TLS record with a wrong version or length"));
    let long = [&b"GET /"[..], &[b'a'; HELD_MAX]].concat();
    assert!(matches!(whole(&long), Progress::Malformed(_)));
}

/// What OpenSSL's client sends until it has asked for something (`fuzz/record.py`), in pieces of any size.
#[test]
fn real_clients_show_their_name_and_then_what_is_encrypted() {
    macro_rules! data {
        ($name:literal) => {
            &include_bytes!(concat!("data/", $name, ".bin"))[..]
        };
    }
    for (stream, hellos, rest) in [
        (data!("hello_517"), 1, None),
        (data!("hello_large"), 1, None),
        (data!("tls13"), 1, Some("encrypted")),
        (data!("tls13_retry"), 2, Some("encrypted")),
        (data!("tls12"), 1, Some("encrypted")),
        (data!("tls12_resumed"), 1, Some("encrypted")),
    ] {
        for size in [1, 5, 300, 2000] {
            let (mut s, mut names, mut last) = (Pieces::default(), Vec::new(), Progress::More);
            for piece in stream.chunks(size) {
                last = s.feed(piece);
                while let Progress::Tls(hello) = last {
                    names.push(hello.server_name);
                    last = s.feed(&[]);
                }
                if last != Progress::More {
                    break;
                }
            }
            assert_eq!(names, vec![Some(b"www.ok.example"[..].into()); hellos]);
            assert_eq!(last, rest.map_or(Progress::More, Progress::Opaque), "pieces of {size}");
        }
    }
    assert_eq!((data!("hello_517").len(), data!("hello_large").len()), (517, 1571));
}

fn head(text: &str) -> HttpProgress {
    let (taken, progress) = HttpInspector::new().feed(text.as_bytes());
    if matches!(progress, HttpProgress::Head(_)) {
        assert_eq!(taken, text.len());
    }
    progress
}

fn host(text: &str) -> Option<String> {
    match head(text) {
        HttpProgress::Head(h) => h.host.map(|n| String::from_utf8(n.into()).unwrap()),
        other => panic!("{other:?} for {text:?}"),
    }
}

#[test]
fn the_host_of_a_request_is_read() {
    for (text, name) in [
        ("GET / HTTP/1.1\r\nHost: OK.Example:8080\r\n\r\n", Some("ok.example")),
        ("\r\nGET / HTTP/1.1\r\nAccept: */*\r\nhost:ok.example.\t\r\n\r\n", Some("ok.example")),
        ("GET http://ok.example/x HTTP/1.1\r\nHost: ok.example\r\n\r\n", Some("ok.example")),
        ("GET /?u=http://evil.example/ HTTP/1.1\r\nHost: ok.example\r\n\r\n", Some("ok.example")),
        ("OPTIONS * HTTP/1.1\r\nHost: ok.example\r\n\r\n", Some("ok.example")),
        ("GET / HTTP/1.1\nHost: ok.example\n\n", Some("ok.example")),
        ("GET / HTTP/1.1\r\nHost: [2001:DB8::1]:80\r\n\r\n", Some("2001:db8::1")),
        ("GET / HTTP/1.1\r\nHost:\r\n\r\n", None),
        ("GET / HTTP/1.0\r\n\r\n", None),
    ] {
        assert_eq!(host(text).as_deref(), name, "{text:?}");
    }
}

#[test]
fn shapes_that_servers_read_in_different_ways_are_malformed() {
    for text in [
        "GET / HTTP/1.1\r\nHost: ok.example\r\nHost: evil.example\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: ok.example\r\nhost: ok.example\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: ok.example\r\n evil.example\r\n\r\n",
        "GET / HTTP/1.1\r\nHost : ok.example\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: ok.example, evil.example\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: user@ok.example\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: ok.example\0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: ok.example\rX: y\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: ok.example:80x\r\n\r\n",
        "GET / HTTP/1.1\r\nX\r\nHost: ok.example\r\n\r\n",
        "GET http://evil.example/ HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "GET http://evil.example HTTP/1.1\r\nHost:\r\n\r\n",
        "GET ftp://evil.example/ HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "GET http:// HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "GET ht+tp://evil.example/ HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "GET http:/evil.example/ HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "GET http:evil.example/ HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "GET evil.example/ HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "GET evil.example:80 HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "GET http://ok.example\\@evil.example/ HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "GET / HTTP/1.1\nHost: ok.example\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: ok.example\r\nX: y\nContent-Length: 9\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: ok.example\r\n\n",
        "CONNECT ok.example:443 HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "connect ok.example:443 HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\n",
        "GET / HTTP/3.0\r\nHost: ok.example\r\n\r\n",
        "GET /  HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "GET / x HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.b\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.b\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.b\r\nContent-Length: +1\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.b\r\nContent-Length: 1, 1\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.b\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.b\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    ] {
        assert!(matches!(head(text), HttpProgress::Malformed(_)), "{text:?} is {:?}", head(text));
    }
    let long = format!("GET / HTTP/1.1\r\nHost: a.b\r\nX: {}\r\n\r\n", "a".repeat(HELD_MAX));
    assert!(matches!(head(&long), HttpProgress::Malformed(_)));
}

#[test]
fn an_upgrade_is_one_to_another_protocol_than_http() {
    let upgrade = |protocol: &str, connection: &str| {
        let text =
            format!("GET / HTTP/1.1\r\nHost: a.b\r\nUpgrade: {protocol}\r\nConnection: {connection}\r\n\r\n");
        matches!(head(&text), HttpProgress::Head(h) if h.upgrade)
    };
    assert!(upgrade("websocket", "keep-alive, Upgrade"));
    assert!(!upgrade("websocket", "keep-alive"));
    assert!(!upgrade("h2c", "Upgrade, HTTP2-Settings"));
    assert!(!upgrade("websocket, HTTP/2.0", "Upgrade"));
    assert!(!upgrade("h2c\r\nUpgrade: websocket", "Upgrade"), "the server may choose any");
    assert!(!upgrade("websocket\r\nUpgrade: H2C-14", "Upgrade"));
}

#[test]
fn only_the_first_request_of_a_connection_upgrades() {
    let text = b"GET / HTTP/1.1\r\nHost: a.b\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n";
    let mut http = HttpInspector::new();
    let upgrades: Vec<bool> =
        (0..3).map(|_| matches!(http.feed(text).1, HttpProgress::Head(h) if h.upgrade)).collect();
    assert_eq!(upgrades, [true, false, false]);
}

/// A connection of three requests, and where the head of each ends.
fn connection() -> (Vec<u8>, Vec<(usize, &'static str)>) {
    let mut bytes = Vec::new();
    let mut ends = Vec::new();
    for (head, body, name) in [
        (
            "POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 31\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: x.y\r\n\r\n__",
            "a.example",
        ),
        (
            "POST / HTTP/1.1\r\nHost: b.example\r\nTransfer-Encoding: chunked\r\n\r\n",
            "5;x=\"y\"\r\nGET /\r\nB\r\n\r\nHost: x\r\n\r\n0\r\nTrailer: x\r\n\r\n",
            "b.example",
        ),
        ("\r\nGET / HTTP/1.1\r\nHost: c.example\r\n\r\n", "", "c.example"),
    ] {
        bytes.extend_from_slice(head.as_bytes());
        ends.push((bytes.len(), name));
        bytes.extend_from_slice(body.as_bytes());
    }
    (bytes, ends)
}

proptest! {
    /// Every head is found in any pieces, bodies are passed over, and what is pending is what has begun.
    #[test]
    fn every_head_of_a_connection_is_found(cuts in proptest::collection::vec(1usize..60, 1..40)) {
        let (bytes, ends) = connection();
        let (mut http, mut seen, mut at) = (HttpInspector::new(), Vec::new(), 0);
        let mut cuts = cuts.into_iter().cycle();
        while at < bytes.len() {
            let mut piece = &bytes[at..(at + cuts.next().unwrap()).min(bytes.len())];
            while !piece.is_empty() {
                let (n, progress) = http.feed(piece);
                at += n;
                piece = &piece[n..];
                match progress {
                    HttpProgress::Head(h) => {
                        prop_assert_eq!(http.pending(), 0);
                        seen.push((at, String::from_utf8(h.host.unwrap().into()).unwrap()));
                    }
                    HttpProgress::More => prop_assert!(piece.is_empty()),
                    HttpProgress::Malformed(why) => prop_assert!(false, "{} at {}", why, at),
                }
            }
        }
        let ends: Vec<(usize, String)> = ends.into_iter().map(|(at, name)| (at, name.to_string())).collect();
        prop_assert_eq!(seen, ends);
    }

    /// Any bytes, in any pieces, give what they give in one.
    #[test]
    fn pieces_do_not_matter(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..300),
        start in 0usize..6,
        cut in 0usize..400,
    ) {
        let starts: [&[u8]; 6] = [b"", b"\x16\x03\x01\x00\x40\x01\x00\x00", b"GET / HTTP/1.1\r\nHost: ", b"\r\n", b"POST /", b"\x16\x03"];
        bytes = [starts[start], &bytes].concat();
        let (a, b) = bytes.split_at(cut.min(bytes.len()));
        let mut parts = StreamInspector::new();
        let (n, first) = parts.feed(a);
        prop_assert!(parts.pending() <= n);
        let last = if matches!(first, Progress::More) { parts.feed(b).1 } else { first };
        let one = whole(&bytes);
        prop_assert_eq!(&last, &one);
        prop_assert!(parts.memory() <= 2 * HELD_MAX);
        let mut http = HttpInspector::new();
        let _any = http.feed(&bytes);
    }
}

/// Everything that an inspector says of a stream in these pieces.
fn all(pieces: &[&[u8]]) -> Vec<Progress> {
    let (mut s, mut said) = (StreamInspector::new(), Vec::new());
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() {
            let (taken, progress) = s.feed(rest);
            assert!(s.memory() <= 2 * HELD_MAX && s.pending() <= 7 * HELD_MAX);
            rest = &rest[taken..];
            if progress == Progress::More {
                assert!(rest.is_empty());
                continue;
            }
            let goes_on = matches!(progress, Progress::Tls(_));
            said.push(progress);
            if !goes_on {
                return said;
            }
        }
    }
    said
}

/// All heads of a connection in these pieces, where they end, and what is wrong.
fn heads(pieces: &[&[u8]]) -> Vec<(usize, HttpProgress)> {
    let (mut http, mut said, mut at) = (HttpInspector::new(), Vec::new(), 0);
    for piece in pieces {
        let mut rest = *piece;
        while !rest.is_empty() {
            let (taken, progress) = http.feed(rest);
            rest = &rest[taken..];
            at += taken;
            match progress {
                HttpProgress::More => assert!(rest.is_empty() && http.pending() <= HELD_MAX),
                HttpProgress::Head(_) => said.push((at, progress)),
                HttpProgress::Malformed(_) => {
                    said.push((0, progress));
                    return said;
                }
            }
        }
    }
    said
}

proptest! {
    /// A recording or a connection with a few bytes changed says the same in any pieces.
    #[test]
    fn damaged_conversations_say_the_same_in_any_pieces(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        cuts in proptest::collection::vec(1usize..400, 1..20),
        which in 0usize..3,
    ) {
        let mut bytes = match which {
            0 => include_bytes!("data/tls13_retry.bin").to_vec(),
            1 => include_bytes!("data/tls12_resumed.bin").to_vec(),
            _ => connection().0,
        };
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let (mut pieces, mut rest) = (Vec::new(), &bytes[..]);
        for cut in cuts {
            let (piece, more) = rest.split_at(cut.min(rest.len()));
            pieces.push(piece);
            rest = more;
        }
        pieces.push(rest);
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        let whole = all(&[&bytes]);
        prop_assert_eq!(&whole, &all(&pieces));
        prop_assert_eq!(&whole, &all(&single));
        let whole = heads(&[&bytes]);
        prop_assert_eq!(&whole, &heads(&pieces));
        prop_assert_eq!(&whole, &heads(&single));
    }
}

#[test]
fn last_words_are_well_formed() {
    assert_eq!(alert_access_denied().len(), 7);
    let text = String::from_utf8(forbidden_response("{\"error\":\"denied\"}")).unwrap();
    assert!(text.starts_with("HTTP/1.1 403 ") && text.ends_with("\r\n\r\n{\"error\":\"denied\"}"));
    assert!(text.contains("Content-Length: 18\r\n"));
}
