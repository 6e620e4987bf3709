//! Which entries are wanted, and which pages of a manifest can hold them.

use crate::glob::Glob;
use crate::manifest::Manifest;

/// Chosen paths with all that lies below them.
#[derive(Debug, Clone)]
pub(crate) struct Selection {
    globs: Vec<Glob>,
}

impl Selection {
    /// `patterns` as in [`super::RestoreOptions::select`].
    pub(crate) fn new(patterns: &[String]) -> Self {
        Self { globs: patterns.iter().map(|pattern| Glob::select(pattern)).collect() }
    }

    /// Whether everything is chosen.
    pub(crate) fn is_all(&self) -> bool {
        self.globs.is_empty()
    }

    /// Whether the path is chosen.
    pub(crate) fn takes(&self, path: &[u8]) -> bool {
        self.is_all() || self.globs.iter().any(|glob| glob.covers(path))
    }

    /// The pages that can hold chosen entries or directories above them, in order.
    pub(crate) fn pages(&self, manifest: &Manifest) -> Vec<usize> {
        if self.is_all() {
            return (0..manifest.pages().len()).collect();
        }
        let mut wanted = vec![false; manifest.pages().len()];
        for glob in &self.globs {
            let prefix = glob.literal_prefix();
            wanted[manifest.range_of(prefix)].fill(true);
            // The directories above, for their attributes.
            let above = (0..prefix.len()).filter(|at| prefix[*at] == b'/').map(|at| &prefix[..at]).chain([&b""[..]]);
            for path in above {
                let start = if path.is_empty() { 0 } else { manifest.range_of(path).start };
                if let Some(page) = wanted.get_mut(start) {
                    *page = true;
                }
            }
        }
        (0..wanted.len()).filter(|page| wanted[*page]).collect()
    }
}
