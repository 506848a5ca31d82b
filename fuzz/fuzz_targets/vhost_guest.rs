//! Theory of operation: the memory, the queues and the front-end of a vhost-user guest, all of it the fuzzer's.
//! What must hold is asserted inside; a queue of eight cannot bring more than it has.
#![no_main]

use guestnet_io::fuzzing::vhost_guest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (got, sent) = vhost_guest(data);
    assert!(got <= 2 * 16 && sent <= 8);
});
