//! Theory of operation: what captures call the ports. The control side writes a name before or after the port
//! has its first frame; captures read it when they describe the port as an interface, which is once per port
//! and capture. So a lock is enough, and no command is needed. Bounded by the number of ports.

use guestnet_core::types::PortId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes kept of a name.
const LONGEST: usize = 255;

/// Names of ports, shared by the control side and all workers of a Network.
#[derive(Debug, Clone, Default)]
pub struct PortNames(Arc<Mutex<HashMap<PortId, String>>>);

impl PortNames {
    fn lock(&self) -> MutexGuard<'_, HashMap<PortId, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names a port; `None` forgets its name. A capture that has described the port keeps the old name.
    pub fn set(&self, port: PortId, name: Option<&str>) {
        let mut names = self.lock();
        match name {
            Some(name) => {
                let end =
                    (0..=name.len().min(LONGEST)).rev().find(|i| name.is_char_boundary(*i)).unwrap_or(0);
                names.insert(port, name.get(..end).unwrap_or("").to_owned());
            }
            None => drop(names.remove(&port)),
        }
    }

    /// The name of a port.
    #[must_use]
    pub fn get(&self, port: PortId) -> Option<String> {
        self.lock().get(&port).cloned()
    }
}
