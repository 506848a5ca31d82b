//! Theory of operation: finds the rules that may match. Prefixes are in a trie, names in hash tables, and what is left in
//! a list. Each has ascending lists of rules; [`Lists`] merges those of one decision.

use crate::policy::spec::{Destination, Name, NamePattern, bits_of};
use prefix_trie::PrefixMap;
use std::collections::HashMap;
use std::net::IpAddr;
use std::slice;

/// Lists that one decision merges at most; further ones are of suffixes of names with very many labels.
const LISTS_MAX: usize = 320;

/// Rules by what they are about. Every list is in ascending order.
#[derive(Default)]
pub(super) struct Index {
    nets4: PrefixMap<(u32, u8), Vec<u32>>,
    nets6: PrefixMap<(u128, u8), Vec<u32>>,
    exact: HashMap<Name, Vec<u32>>,
    below: HashMap<Name, Vec<u32>>,
    /// Rules about any destination or a group.
    pub general: Vec<u32>,
}

impl Index {
    /// Adds a rule; its number is above those before.
    pub fn add(&mut self, number: u32, destination: &Destination) {
        match destination {
            Destination::Net(net) => {
                let (bits, length, v6) = net.parts();
                let list = if v6 {
                    self.nets6.entry((bits, length)).or_default()
                } else {
                    let bits = u32::try_from(bits).unwrap_or(u32::MAX);
                    self.nets4.entry((bits, length)).or_default()
                };
                list.push(number);
            }
            Destination::Name(pattern) => {
                let (exact, below): (&[Name], &[Name]) = match pattern {
                    NamePattern::Exact(n) => (slice::from_ref(n), &[]),
                    NamePattern::Below(n) => (&[], slice::from_ref(n)),
                    NamePattern::AtOrBelow(n) => (slice::from_ref(n), slice::from_ref(n)),
                    NamePattern::AnyOf(names) => (names, names),
                };
                for n in exact {
                    self.exact.entry(n.clone()).or_default().push(number);
                }
                for n in below {
                    self.below.entry(n.clone()).or_default().push(number);
                }
            }
            Destination::Any | Destination::Group(_) | Destination::Endpoints(_) => self.general.push(number),
        }
    }

    /// Adds the lists of every prefix that covers an address.
    pub fn of_address<'a>(&'a self, ip: IpAddr, lists: &mut Lists<'a>) {
        let (bits, width) = bits_of(ip);
        if width == 32 {
            let bits = u32::try_from(bits).unwrap_or(u32::MAX);
            self.nets4.cover(&(bits, 32)).for_each(|(_, list)| lists.add(list));
        } else {
            self.nets6.cover(&(bits, 128)).for_each(|(_, list)| lists.add(list));
        }
    }

    /// Adds the lists of a name and of its suffixes.
    pub fn of_name<'a>(&'a self, name: &[u8], lists: &mut Lists<'a>) {
        if self.exact.is_empty() && self.below.is_empty() {
            return;
        }
        if let Some(list) = self.exact.get(name) {
            lists.add(list);
        }
        let mut rest = name;
        while let Some(dot) = rest.iter().position(|b| *b == b'.') {
            rest = rest.get(dot + 1..).unwrap_or(&[]);
            if let Some(list) = self.below.get(rest) {
                lists.add(list);
            }
        }
    }
}

/// Lists of rules in ascending order, merged.
pub(super) struct Lists<'a> {
    heads: Vec<&'a [u32]>,
    last: Option<u32>,
}

impl<'a> Lists<'a> {
    pub fn new() -> Lists<'a> {
        Lists { heads: Vec::with_capacity(8), last: None }
    }

    pub fn add(&mut self, list: &'a [u32]) {
        if !list.is_empty() && self.heads.len() < LISTS_MAX {
            self.heads.push(list);
        }
    }
}

impl Iterator for Lists<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        loop {
            let least = self.heads.iter_mut().min_by_key(|l| l.first().copied().unwrap_or(u32::MAX))?;
            let (first, rest) = least.split_first()?;
            *least = rest;
            // The same rule can be in several lists.
            if self.last != Some(*first) {
                self.last = Some(*first);
                return Some(*first);
            }
        }
    }
}
