//! A log in words, for people who look for what happened.

use super::format::{Identity, Record};
use super::{WalError, recover, segment_name};
use crate::disk::{Disk, read_all};
use std::path::Path;

/// A record and where it was found.
#[derive(Debug)]
pub struct Dumped {
    /// The segment's file name.
    pub segment: String,
    /// The record's number in its segment, from 0.
    pub number: usize,
    /// The record.
    pub record: Record,
}

/// Gives every record of the log in `dir` to `show`, and returns whose log it is. Changes nothing.
///
/// # Errors
/// When the disk fails or the log is damaged; the records before the damage have been shown then.
pub fn dump(disk: &dyn Disk, dir: &Path, show: &mut dyn FnMut(Dumped)) -> Result<Option<Identity>, WalError> {
    for sequence in recover::segments(disk, dir)? {
        let segment = segment_name(sequence);
        let path = dir.join(&segment);
        let bytes = read_all(&*disk.open(&path)?, &path)?;
        for (number, record) in recover::scan_for_dump(&path, &bytes)?.into_iter().enumerate() {
            show(Dumped { segment: segment.clone(), number, record });
        }
    }
    recover::identity(disk, dir)
}
