//! When a node runs short: thresholds as the kubelet's flags write them.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use minipod_proto::quantity::Quantity;

/// What is watched. Images lie on the file system of the node's data: `imagefs` and `nodefs` measure the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Signal {
    /// Memory that could be had without swapping.
    MemoryAvailable,
    /// Bytes free on the data directory's file system.
    NodefsAvailable,
    /// Files that can still be made there.
    NodefsInodesFree,
    /// Bytes free where the images are.
    ImagefsAvailable,
    /// Files that can still be made there.
    ImagefsInodesFree,
    /// Processes and threads that can still be started.
    PidAvailable,
}

impl Signal {
    /// All of them; memory is looked after first.
    pub const ALL: [Self; 6] = [
        Self::MemoryAvailable,
        Self::NodefsAvailable,
        Self::NodefsInodesFree,
        Self::ImagefsAvailable,
        Self::ImagefsInodesFree,
        Self::PidAvailable,
    ];

    /// As flags name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MemoryAvailable => "memory.available",
            Self::NodefsAvailable => "nodefs.available",
            Self::NodefsInodesFree => "nodefs.inodesFree",
            Self::ImagefsAvailable => "imagefs.available",
            Self::ImagefsInodesFree => "imagefs.inodesFree",
            Self::PidAvailable => "pid.available",
        }
    }

    /// The resource that is short, as events name it.
    #[must_use]
    pub fn resource(self) -> &'static str {
        match self {
            Self::MemoryAvailable => "memory",
            Self::NodefsAvailable | Self::ImagefsAvailable => "ephemeral-storage",
            Self::NodefsInodesFree | Self::ImagefsInodesFree => "inodes",
            Self::PidAvailable => "pids",
        }
    }

    /// Whether it is about the disk.
    #[must_use]
    pub fn is_disk(self) -> bool {
        !matches!(self, Self::MemoryAvailable | Self::PidAvailable)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|signal| signal.as_str() == text);
        found.ok_or_else(|| format!("{text:?}: want one of {}", Self::ALL.map(Self::as_str).join(", ")))
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Below this much the node is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// Bytes, files, or processes.
    Units(u64),
    /// Thousandths of a percent of what there is.
    MilliPercent(u64),
}

impl Amount {
    /// In bytes, files or processes, of `capacity`.
    #[must_use]
    pub fn of(self, capacity: u64) -> u64 {
        match self {
            Self::Units(units) => units,
            Self::MilliPercent(share) => {
                u64::try_from(u128::from(capacity) * u128::from(share) / 100_000).unwrap_or(u64::MAX)
            }
        }
    }
}

/// `SIGNAL<AMOUNT`, several separated by commas: `memory.available<100Mi,nodefs.available<10%`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Limits(pub Vec<(Signal, Amount)>);

impl FromStr for Limits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut all: Vec<(Signal, Amount)> = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (signal, amount) = part
                .split_once('<')
                .ok_or_else(|| format!("{part:?}: want SIGNAL<AMOUNT, such as memory.available<100Mi"))?;
            let (signal, amount) = (Signal::parse(signal.trim())?, parse_amount(amount.trim())?);
            if all.iter().any(|(known, _)| *known == signal) {
                return Err(format!("{signal} is there twice"));
            }
            // As the kubelet: nothing is never short.
            if amount.of(u64::MAX) > 0 {
                all.push((signal, amount));
            }
        }
        Ok(Self(all))
    }
}

fn parse_amount(text: &str) -> Result<Amount, String> {
    let wrong = || format!("{text:?}: want a quantity such as 100Mi, or a share such as 10%");
    if let Some(share) = text.strip_suffix('%') {
        let share: f64 = share.parse().map_err(|_| wrong())?;
        if !(0.0..=100.0).contains(&share) {
            return Err(format!("{text:?}: want 0% to 100%"));
        }
        // Between 0 and 100,000.
        return Ok(Amount::MilliPercent((share * 1000.0).round() as u64));
    }
    let quantity: Quantity = text.parse().map_err(|_| wrong())?;
    u64::try_from(quantity.value_ceil()).map(Amount::Units).map_err(|_| wrong())
}

/// `SIGNAL=DURATION`, several separated by commas: `memory.available=1m30s`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Graces(pub BTreeMap<Signal, u64>);

impl FromStr for Graces {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut all = BTreeMap::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (signal, time) = part
                .split_once('=')
                .ok_or_else(|| format!("{part:?}: want SIGNAL=DURATION, such as memory.available=1m30s"))?;
            let ms = parse_duration_ms(time.trim())?;
            all.insert(Signal::parse(signal.trim())?, ms);
        }
        Ok(Self(all))
    }
}

/// `90s`, `1m30s`, `500ms`, in milliseconds.
///
/// # Errors
/// What would be right.
pub fn parse_duration_ms(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?}: want a duration such as 30s, 1m30s or 500ms");
    let (mut rest, mut total) = (text, 0_u64);
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(digits);
        let units: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];
        let (name, unit) = units.into_iter().find(|(name, _)| tail.starts_with(name)).ok_or_else(wrong)?;
        let number: u64 = number.parse().map_err(|_| wrong())?;
        total = number.checked_mul(unit).and_then(|more| total.checked_add(more)).ok_or_else(wrong)?;
        rest = tail.get(name.len()..).unwrap_or("");
    }
    Ok(total)
}

/// One threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threshold {
    /// What.
    pub signal: Signal,
    /// Below this.
    pub amount: Amount,
    /// How long it has to be so, milliseconds; `None`: a hard one, that is acted upon at once and without grace.
    pub grace_ms: Option<u64>,
}

/// The hard and the soft ones together.
///
/// # Errors
/// A soft one without its grace.
pub fn thresholds(hard: &Limits, soft: &Limits, graces: &Graces) -> Result<Vec<Threshold>, String> {
    let mut all: Vec<Threshold> =
        hard.0.iter().map(|(signal, amount)| Threshold { signal: *signal, amount: *amount, grace_ms: None }).collect();
    for (signal, amount) in &soft.0 {
        let missing = || format!("--eviction-soft-grace-period: {signal} is missing, every soft threshold wants one");
        let grace_ms = Some(*graces.0.get(signal).ok_or_else(missing)?);
        all.push(Threshold { signal: *signal, amount: *amount, grace_ms });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_and_checked() {
        let limits: Limits =
            "memory.available<100Mi, nodefs.available<12.5%,nodefs.inodesFree<5%".parse().expect("good");
        assert_eq!(
            limits.0,
            [
                (Signal::MemoryAvailable, Amount::Units(100 << 20)),
                (Signal::NodefsAvailable, Amount::MilliPercent(12_500)),
                (Signal::NodefsInodesFree, Amount::MilliPercent(5_000)),
            ]
        );
        assert_eq!(limits.0[1].1.of(8_000), 1_000);
        assert_eq!("".parse(), Ok(Limits::default()));
        assert_eq!("imagefs.available<0%".parse(), Ok(Limits::default()), "nothing is never short");
        for bad in [
            "memory.available",
            "memory<1Gi",
            "memory.available<x",
            "nodefs.available<101%",
            "nodefs.available<-1",
            "memory.available<1Gi,memory.available<2Gi",
        ] {
            assert!(bad.parse::<Limits>().is_err(), "{bad}");
        }
    }

    #[test]
    fn soft_ones_want_a_grace() {
        let (hard, soft): (Limits, Limits) =
            ("memory.available<1Gi".parse().expect("good"), "memory.available<2Gi".parse().expect("good"));
        let graces: Graces = "memory.available=1m30s".parse().expect("good");
        let all = thresholds(&hard, &soft, &graces).expect("complete");
        assert_eq!(all.iter().map(|one| one.grace_ms).collect::<Vec<_>>(), [None, Some(90_000)]);
        let error = thresholds(&hard, &soft, &Graces::default()).expect_err("incomplete");
        assert!(error.contains("memory.available is missing"), "{error}");
        for bad in ["memory.available", "memory.available=", "memory.available=5", "x=5s", "memory.available=5y"] {
            assert!(bad.parse::<Graces>().is_err(), "{bad}");
        }
    }
}
