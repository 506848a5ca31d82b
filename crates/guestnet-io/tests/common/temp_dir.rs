//! Theory of operation: a directory for the sockets and files of one test. Its name has the process and a number, so
//! tests that run side by side never share one. It is removed when the guard is dropped, which a failing test does
//! too.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that exists as long as the guard.
pub struct TempDir(PathBuf);

impl TempDir {
    /// Makes an empty directory with `name` in its name.
    ///
    /// # Panics
    /// When the system refuses to make it.
    #[must_use]
    pub fn new(name: &str) -> TempDir {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("gn-{name}-{}-{number}", std::process::id()));
        // An earlier process with the same number may have been killed before it could remove its own.
        let _left = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        TempDir(dir)
    }
}

impl Deref for TempDir {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _best_effort = std::fs::remove_dir_all(&self.0);
    }
}
