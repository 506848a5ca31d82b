//! The keys of a client's Initial packets (RFC 9001 5.2; RFC 9369 3.3 for version 2), and what they open.

use super::packet::{Initial, VERSION_1, VERSION_2};
use aes::Aes128;
use aes::cipher::{BlockCipherEncrypt, KeyInit};
use aes_gcm::Aes128Gcm;
use aes_gcm::aead::{Aead, Payload};
use hkdf::Hkdf;
use sha2::Sha256;

const SALT_1: [u8; 20] = [
    0x38, 0x76, 0x2c, 0xf7, 0xf5, 0x59, 0x34, 0xb3, 0x4d, 0x17, 0x9a, 0xe6, 0xa4, 0xc8, 0x0c, 0xad, 0xcc,
    0xbb, 0x7f, 0x0a,
];
const SALT_2: [u8; 20] = [
    0x0d, 0xed, 0xe3, 0xde, 0xf7, 0x00, 0xa6, 0xdb, 0x81, 0x93, 0x81, 0xbe, 0x6e, 0x26, 0x9d, 0xcb, 0xf9,
    0xbd, 0x2e, 0xd9,
];

/// The keys that follow from a version and the connection id of the client's first packet.
#[derive(Clone)]
pub(super) struct Keys {
    pub version: u32,
    pub connection_id: Vec<u8>,
    packet: Aes128Gcm,
    iv: [u8; 12],
    header: Aes128,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("version", &self.version).finish_non_exhaustive()
    }
}

/// `HKDF-Expand-Label` of TLS 1.3 without a context (RFC 8446 7.1).
fn expand(secret: &Hkdf<Sha256>, label: &str, out: &mut [u8]) -> Option<()> {
    let length = u16::try_from(out.len()).ok()?.to_be_bytes();
    let label_length = u8::try_from(label.len() + 6).ok()?;
    let info = [&length[..], &[label_length], b"tls13 ", label.as_bytes(), &[0]].concat();
    secret.expand(&info, out).ok()
}

impl Keys {
    /// `None` for a version that is not known.
    pub fn new(version: u32, connection_id: &[u8]) -> Option<Keys> {
        let (salt, prefix) = match version {
            VERSION_1 => (SALT_1, "quic"),
            VERSION_2 => (SALT_2, "quicv2"),
            _ => return None,
        };
        let initial = Hkdf::<Sha256>::new(Some(&salt), connection_id);
        let mut secret = [0; 32];
        expand(&initial, "client in", &mut secret)?;
        let secret = Hkdf::<Sha256>::from_prk(&secret).ok()?;
        let (mut key, mut iv, mut header) = ([0; 16], [0; 12], [0; 16]);
        expand(&secret, &format!("{prefix} key"), &mut key)?;
        expand(&secret, &format!("{prefix} iv"), &mut iv)?;
        expand(&secret, &format!("{prefix} hp"), &mut header)?;
        Some(Keys {
            version,
            connection_id: connection_id.to_vec(),
            packet: Aes128Gcm::new(&key.into()),
            iv,
            header: Aes128::new(&header.into()),
        })
    }

    /// The frames of a packet and its number; `None` when it was made with other keys. `largest` is the largest number that
    /// was seen under them.
    ///
    /// A packet has the last bytes of its number only. Which number the server reads depends on those that it has seen
    /// (RFC 9000 17.1), so both are tried: that behind `largest`, and the bytes as they are.
    pub fn open(&self, p: &Initial<'_>, largest: Option<u64>) -> Option<(Vec<u8>, u64)> {
        let sample: [u8; 16] = p.bytes.get(p.number + 4..p.number + 20)?.try_into().ok()?;
        let mut mask = sample.into();
        self.header.encrypt_block(&mut mask);
        let mut head = p.bytes.get(..p.number + 4)?.to_vec();
        *head.first_mut()? ^= mask.first()? & 0x0f;
        let length = usize::from(head.first()? & 3) + 1;
        for (byte, mask) in head.get_mut(p.number..p.number + length)?.iter_mut().zip(mask.iter().skip(1)) {
            *byte ^= mask;
        }
        head.truncate(p.number + length);
        let short = head.get(p.number..)?.iter().fold(0, |n, byte| n << 8 | u64::from(*byte));
        let msg = p.bytes.get(p.number + length..)?;
        let behind = largest.map(|l| nearest(l, short, 8 * length)).filter(|n| *n != short);
        [Some(short), behind].into_iter().flatten().find_map(|number| {
            let mut nonce = self.iv;
            for (n, byte) in nonce.iter_mut().rev().zip(number.to_le_bytes()) {
                *n ^= byte;
            }
            if cfg!(fuzzing) {
                return Some((msg.to_vec(), number)); // a fuzzer cannot guess what is authentic
            }
            let frames = self.packet.decrypt(&nonce.into(), Payload { msg, aad: &head }).ok()?;
            Some((frames, number))
        })
    }

    /// A packet as a client makes it, of which `head` ends before the length. For tests.
    #[cfg(test)]
    pub fn seal(&self, head: &[u8], number: u64, number_bytes: usize, frames: &[u8]) -> Vec<u8> {
        let length = u16::try_from(number_bytes + frames.len() + 16).unwrap() | 0x4000;
        let mut out = [head, &length.to_be_bytes(), &number.to_be_bytes()[8 - number_bytes..]].concat();
        let at = out.len() - number_bytes;
        out[0] = out[0] & 0xfc | (number_bytes - 1) as u8;
        let mut nonce = self.iv;
        for (n, byte) in nonce.iter_mut().rev().zip(number.to_le_bytes()) {
            *n ^= byte;
        }
        let sealed = self.packet.encrypt(&nonce.into(), Payload { msg: frames, aad: &out }).unwrap();
        out.extend(sealed);
        let sample: [u8; 16] = out[at + 4..at + 20].try_into().unwrap();
        let mut mask = sample.into();
        self.header.encrypt_block(&mut mask);
        out[0] ^= mask[0] & 0x0f;
        for n in 0..number_bytes {
            out[at + n] ^= mask[1 + n];
        }
        out
    }
}

/// The number with these last bits that is nearest to the one behind `largest` (RFC 9000 A.3).
fn nearest(largest: u64, short: u64, bits: usize) -> u64 {
    let (expected, window) = (largest.saturating_add(1), 1u64 << bits);
    let number = expected & !(window - 1) | short;
    if number.saturating_add(window / 2) <= expected {
        number.saturating_add(window)
    } else if number > expected.saturating_add(window / 2) {
        number.checked_sub(window).unwrap_or(number)
    } else {
        number
    }
}

#[test]
fn the_number_of_rfc_9000_a_3_is_decoded() {
    assert_eq!(nearest(0xa82f_30ea, 0x9b32, 16), 0xa82f_9b32);
    assert_eq!(nearest(255, 0, 8), 256);
    assert_eq!(nearest(256, 255, 8), 255);
    assert_eq!(nearest(0, 255, 8), 255);
}
