//! Theory of operation: the MAC table of the switch. Each MAC belongs to one port. The hash is keyed, so guests cannot
//! choose MACs that collide. The switch bounds how many MACs a port may have.

use crate::util::siphash::SipKey;
use guestnet_wire::ether::Mac;
use hashbrown::HashTable;

/// The port of each MAC.
pub struct Macs {
    table: HashTable<(Mac, u32)>,
    key: SipKey,
}

fn word(mac: Mac) -> u64 {
    let m = mac.0;
    u64::from_be_bytes([0, 0, m[0], m[1], m[2], m[3], m[4], m[5]])
}

impl Macs {
    /// An empty table.
    #[must_use]
    pub fn new(key: SipKey) -> Macs {
        Macs { table: HashTable::new(), key }
    }

    /// Slot of the port that has the MAC.
    #[inline]
    #[must_use]
    pub fn get(&self, mac: Mac) -> Option<u32> {
        self.table.find(self.key.hash(&[word(mac)]), |e| e.0 == mac).map(|e| e.1)
    }

    /// Sets the port of a MAC.
    pub fn set(&mut self, mac: Mac, slot: u32) {
        self.remove(mac);
        let key = self.key;
        self.table.insert_unique(key.hash(&[word(mac)]), (mac, slot), |e| key.hash(&[word(e.0)]));
    }

    /// Removes a MAC.
    pub fn remove(&mut self, mac: Mac) {
        if let Ok(e) = self.table.find_entry(self.key.hash(&[word(mac)]), |e| e.0 == mac) {
            e.remove();
        }
    }

    /// Removes all MACs of a port.
    pub fn remove_port(&mut self, slot: u32) {
        self.table.retain(|e| e.1 != slot);
    }
}
