//! HTTP/1 under rules about names: every request of a connection is judged, and a refusal says why.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod inspection_support;
#[path = "common/net.rs"]
mod net;

use guestnet_core::effects::Close;
use guestnet_core::policy::spec::Action;
use inspection_support::*;
use net::*;

fn forbidden(told: &Told) -> &str {
    let text = std::str::from_utf8(&told.bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{head}");
    body
}

#[test]
fn a_request_for_an_allowed_host_passes_and_another_gets_403() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_HTTP);
    c.send(&mut n, &get("OK.example")[..20]);
    assert!(c.at_server(&mut n).is_empty());
    c.send(&mut n, &get("OK.example")[20..]);
    assert_eq!(c.at_server(&mut n), get("OK.example"));

    let mut c = Client::open(&mut n, 4001, OK_HTTP);
    c.send(&mut n, &get("evil.example"));
    let told = c.read(&mut n);
    assert_eq!(
        forbidden(&told),
        "{\"error\":\"denied\",\"rule\":\"default\",\"reason\":\"policy\",\"destination\":\"203.0.113.7:80\",\
         \"name\":\"evil.example\"}"
    );
    assert!(told.fin && c.at_server(&mut n).is_empty());
    assert_eq!(n.fx.sock(c.sock).closed, Some(Close::Reset));
}

#[test]
fn every_request_of_a_connection_is_judged() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_HTTP);
    let post = b"POST / HTTP/1.1\r\nHost: ok.example\r\nContent-Length: 29\r\n\r\nGET / HTTP/1.1\r\nHost: x.y\r\n\r\n";
    c.send(&mut n, &[&post[..], &get("also.example")].concat());
    let passed = c.at_server(&mut n);
    assert_eq!(passed, [&post[..], &get("also.example")].concat());
    c.server_says(&mut n, b"HTTP/1.1 200 OK\r\n\r\n");
    assert_eq!(c.read(&mut n).bytes, b"HTTP/1.1 200 OK\r\n\r\n");
    // An idle connection waits as long as it likes.
    n.pass_ms(60_000);
    c.send(&mut n, &get("evil.example"));
    assert_eq!(c.at_server(&mut n), passed);
    assert!(n.fx.sock(c.sock).shut);
    assert_eq!(denials(&n)[0].shown.as_deref(), Some("evil.example"));
    n.fx.sock(c.sock).eof = true;
    n.core.tcp_ready(n.now, c.flow, true, true, &mut n.fx);
    c.end_batch(&mut n);
    let told = c.read(&mut n);
    assert!(forbidden(&told).contains("\"name\":\"evil.example\"") && told.fin);
    assert_eq!(n.fx.sock(c.sock).closed, Some(Close::Graceful));
}

#[test]
fn a_pipelined_request_with_another_host_is_refused_behind_the_answer_to_the_first() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_HTTP);
    c.send(&mut n, &[get("ok.example"), get("evil.example"), get("ok.example")].concat());
    assert_eq!(c.at_server(&mut n), get("ok.example"));
    c.server_says(&mut n, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi");
    n.fx.sock(c.sock).eof = true;
    n.core.tcp_ready(n.now, c.flow, true, true, &mut n.fx);
    c.end_batch(&mut n);
    let told = c.read(&mut n);
    let text = String::from_utf8(told.bytes.clone()).unwrap();
    let (answer, rest) = text.split_at(text.find("hi").unwrap() + 2);
    assert!(answer.starts_with("HTTP/1.1 200 OK") && rest.starts_with("HTTP/1.1 403 "), "{text}");
    assert!(told.fin);
}

#[test]
fn many_requests_in_one_batch_are_all_judged() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_HTTP);
    let many = get("ok.example").repeat(300);
    c.send(&mut n, &many);
    assert_eq!(c.at_server(&mut n).len(), many.len());
    c.send(&mut n, &[get("ok.example").repeat(100), get("evil.example")].concat());
    assert_eq!(c.at_server(&mut n).len(), many.len() / 3 * 4);
}

#[test]
fn requests_that_servers_read_in_different_ways_are_refused() {
    for head in [
        "GET / HTTP/1.1\r\nHost: ok.example\r\nHost: evil.example\r\n\r\n",
        "GET http://evil.example/ HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "CONNECT evil.example:443 HTTP/1.1\r\nHost: ok.example\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: ok.example\r\n folded\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: ok.example\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
    ] {
        for mut n in [strict(), lenient()] {
            let mut c = Client::open(&mut n, 4000, OK_HTTP);
            c.send(&mut n, head.as_bytes());
            let told = c.read(&mut n);
            assert!(forbidden(&told).contains("\"error\":\"denied\""), "{head:?}");
            assert!(c.at_server(&mut n).is_empty());
        }
    }
}

#[test]
fn a_request_that_stops_in_the_middle_is_refused() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_HTTP);
    c.send(&mut n, &get("ok.example"));
    c.send(&mut n, b"GET / HT");
    n.pass_ms(10_100);
    assert_eq!(c.at_server(&mut n), get("ok.example"));
    assert_eq!(denials(&n).len(), 1);
    let mut c = Client::open(&mut n, 4001, OK_HTTP);
    c.send(&mut n, b"GET / HTTP/1.1\r\nHost: o");
    n.pass_ms(10_100);
    assert!(!forbidden(&c.read(&mut n)).is_empty());
}

#[test]
fn a_body_passes_as_it_comes() {
    let mut n = strict();
    let mut c = Client::open(&mut n, 4000, OK_HTTP);
    let head = b"POST / HTTP/1.1\r\nHost: ok.example\r\nContent-Length: 1000000\r\n\r\n";
    c.send(&mut n, head);
    for _ in 0..500 {
        c.send(&mut n, &[7; 1400]);
        c.read(&mut n);
    }
    assert_eq!(c.at_server(&mut n).len(), head.len() + 700_000);
    n.pass_ms(60_000);
    assert_eq!(flows_of(&n, A), 1);
}

#[test]
fn behind_a_101_the_stream_is_opaque_and_behind_another_answer_it_is_not() {
    let ask = b"GET /ws HTTP/1.1\r\nHost: ok.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
    for (answer, opaque) in
        [("HTTP/1.1 101 Switching Protocols\r\n\r\n", true), ("HTTP/1.1 200 OK\r\n\r\n", false)]
    {
        let mut n = strict();
        let mut c = Client::open(&mut n, 4000, OK_HTTP);
        c.send(&mut n, ask);
        assert_eq!(c.at_server(&mut n), ask);
        c.send(&mut n, &get("evil.example"));
        assert_eq!(c.at_server(&mut n), ask, "it waits for the answer");
        c.server_says(&mut n, answer.as_bytes());
        c.end_batch(&mut n);
        let got = c.at_server(&mut n);
        assert_eq!(got.len() > ask.len(), opaque);
        assert_eq!(c.read(&mut n).bytes, answer.as_bytes());
        assert_eq!(denials(&n).len(), usize::from(!opaque));
    }
}

#[test]
fn the_words_of_a_refusal_are_those_of_its_rule() {
    let mut n = Net::new();
    set(&mut n, Action::Allow, vec![deny("bad.example")]);
    let mut c = Client::open(&mut n, 4000, OK_HTTP);
    c.send(&mut n, &get("bad.example"));
    let body = forbidden(&c.read(&mut n)).to_string();
    assert!(body.contains("\"rule\":\"no bad.example\",\"reason\":\"policy\""), "{body}");
    assert_eq!(denials(&n)[0].rule.as_deref(), Some("no bad.example"));
}
