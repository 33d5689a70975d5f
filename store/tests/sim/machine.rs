//! A machine whose state says everything about the order in which it was made.

use bytes::Bytes;
use minipod_store::machine::{Machine, Outcome, RestoreError};
use std::collections::BTreeMap;

/// A chain over all commands with their indexes, and where each operation was applied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    pub applied: u64,
    pub hash: u64,
    /// By operation: the index of its first application.
    pub operations: BTreeMap<u64, u64>,
    /// Operations that were applied twice, and other impossible things.
    pub wrong: Vec<String>,
}

fn mix(hash: u64, value: u64) -> u64 {
    (hash ^ value).wrapping_mul(0x0100_0000_01b3).rotate_left(23)
}

impl Machine for Chain {
    fn applied(&self) -> u64 {
        self.applied
    }

    fn apply(&mut self, index: u64, command: &[u8]) -> Outcome {
        if index <= self.applied {
            self.wrong.push(format!("index {index} was applied after {}", self.applied));
        }
        self.applied = index;
        if let Ok(operation) = command.get(..8).unwrap_or_default().try_into().map(u64::from_le_bytes) {
            self.hash = mix(mix(self.hash, index), operation);
            if let Some(before) = self.operations.insert(operation, index) {
                self.wrong.push(format!("operation {operation} was applied at {before} and again at {index}"));
            }
        }
        Outcome { revision: i64::try_from(index).expect("an index"), result: Ok(Bytes::new()) }
    }

    fn snapshot(&self) -> Box<dyn Iterator<Item = Bytes> + Send> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&self.applied.to_le_bytes());
        bytes.extend_from_slice(&self.hash.to_le_bytes());
        for (operation, index) in &self.operations {
            bytes.extend_from_slice(&operation.to_le_bytes());
            bytes.extend_from_slice(&index.to_le_bytes());
        }
        let chunks: Vec<_> = bytes.chunks(160).map(Bytes::copy_from_slice).collect();
        Box::new(chunks.into_iter())
    }

    fn restore(&mut self, chunks: &mut dyn Iterator<Item = std::io::Result<Bytes>>) -> Result<(), RestoreError> {
        let mut bytes = Vec::new();
        for chunk in chunks {
            bytes.extend_from_slice(&chunk.map_err(|source| RestoreError::Read { chunk: 0, source })?);
        }
        let numbers: Vec<u64> =
            bytes.chunks_exact(8).map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight"))).collect();
        let (head, rest) = numbers.split_at(2);
        *self = Self {
            applied: head[0],
            hash: head[1],
            operations: rest.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect(),
            wrong: std::mem::take(&mut self.wrong),
        };
        Ok(())
    }
}
