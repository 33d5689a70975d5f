//! A set of dense ids as words of 64 bits.

/// A growable set of small numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bits {
    words: Vec<u64>,
}

impl Bits {
    /// Whether `id` is in the set.
    pub fn contains(&self, id: u32) -> bool {
        self.words.get(id as usize / 64).is_some_and(|word| word >> (id % 64) & 1 == 1)
    }

    /// Puts `id` in or takes it out.
    pub fn set(&mut self, id: u32, member: bool) {
        let index = id as usize / 64;
        if index >= self.words.len() {
            if !member {
                return;
            }
            self.words.resize(index + 1, 0);
        }
        if let Some(word) = self.words.get_mut(index) {
            let bit = 1 << (id % 64);
            *word = if member { *word | bit } else { *word & !bit };
        }
    }

    /// The 64 members from `64 * index` on; 0 beyond the end.
    pub fn word(&self, index: usize) -> u64 {
        self.words.get(index).copied().unwrap_or(0)
    }

    /// All words that may be other than 0.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Number of members.
    pub fn len(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The members, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.words.iter().enumerate().flat_map(|(index, word)| Members { word: *word, base: index as u32 * 64 })
    }
}

/// The members of one word, ascending.
pub struct Members {
    /// What is left.
    pub word: u64,
    /// The id of bit 0.
    pub base: u32,
}

impl Iterator for Members {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.word == 0 {
            return None;
        }
        let bit = self.word.trailing_zeros();
        self.word &= self.word - 1;
        Some(self.base + bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_come_and_go() {
        let mut bits = Bits::default();
        for id in [0, 63, 64, 200] {
            bits.set(id, true);
        }
        bits.set(63, false);
        bits.set(9999, false);
        assert_eq!(bits.iter().collect::<Vec<_>>(), [0, 64, 200]);
        assert_eq!((bits.len(), bits.words().len()), (3, 4));
        assert!(bits.contains(64) && !bits.contains(63) && !bits.contains(100_000));
    }
}
