//! Which nodes have at least so much of a resource: cumulative bitmaps at log-linear levels.
//!
//! Row `l` has a node's bit set where the node's free amount reaches level `l`. A query takes the row of the request's level
//! (rounded down) and so never misses a node; what it finds is verified exactly afterwards. An update flips the rows
//! between the old level and the new one, which are none or one for most placements.

use super::bits::Bits;

/// Steps per power of two.
const STEPS: u32 = 4;
// A node's level fits a byte, whatever the range of rows.
const _: () = assert!(62 * STEPS <= 255);

/// The bitmaps of one resource.
#[derive(Debug, Clone)]
pub struct Levels {
    /// Power of two of the first row: what is below is not told apart.
    lowest: u32,
    rows: Vec<Bits>,
    /// Per node, how many rows have its bit set.
    reached: Vec<u8>,
}

impl Levels {
    /// Rows from 2^`lowest` up to 2^(`lowest` + `octaves`).
    pub fn new(lowest: u32, octaves: u32) -> Levels {
        Levels { lowest, rows: vec![Bits::default(); (octaves * STEPS) as usize], reached: Vec::new() }
    }

    /// How many levels `amount` reaches.
    fn level(&self, amount: i64) -> usize {
        if amount < 1 << self.lowest {
            return 0;
        }
        let octave = 63 - amount.leading_zeros();
        // The two bits below the leading one are the step within the octave.
        let step = if octave >= 2 { (amount >> (octave - 2)) as u32 & 3 } else { 0 };
        (((octave - self.lowest) * STEPS + step) as usize + 1).min(self.rows.len())
    }

    /// Records what `node` has free now.
    pub fn update(&mut self, node: u32, free: i64) {
        if node as usize >= self.reached.len() {
            self.reached.resize(node as usize + 1, 0);
        }
        let new = self.level(free);
        let Some(reached) = self.reached.get_mut(node as usize) else { return };
        let old = usize::from(*reached);
        if old == new {
            return;
        }
        *reached = new as u8;
        for row in self.rows.iter_mut().take(old.max(new)).skip(old.min(new)) {
            row.set(node, new > old);
        }
    }

    /// A superset of the nodes with at least `amount`; `None` when every node may have it.
    pub fn at_least(&self, amount: i64) -> Option<&Bits> {
        self.level(amount).checked_sub(1).and_then(|row| self.rows.get(row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_false_negatives_and_few_false_positives() {
        let mut levels = Levels::new(4, 14);
        let free: Vec<i64> = (0..2000).map(|n| n * 37 % 5000 - 100).collect();
        for (node, amount) in free.iter().enumerate() {
            levels.update(node as u32, 100_000);
            levels.update(node as u32, *amount);
        }
        for request in [1, 15, 16, 17, 100, 1000, 4000, 4899, 1 << 40] {
            let found = levels.at_least(request);
            for (node, amount) in free.iter().enumerate() {
                let hit = found.is_none_or(|bits| bits.contains(node as u32));
                assert!(hit || *amount < request, "free {amount} is not found for {request}");
                assert!(!hit || request < 32 || *amount >= request * 3 / 4, "free {amount} is found for {request}");
            }
        }
    }
}
