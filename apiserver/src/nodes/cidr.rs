//! Address ranges of pods: arithmetic, and which one a node gets.

use std::{collections::BTreeMap, fmt, net::Ipv4Addr, str::FromStr};

/// Bits of a node's own range unless the command line says otherwise: 253 pods.
pub const NODE_BITS: u32 = 24;

/// The addresses of all pods, cut into one range per node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterCidr {
    base: u32,
    bits: u32,
    node_bits: u32,
}

/// A text is no range of pod addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no cluster CIDR: an IPv4 network of 8 to 24 bits such as 10.42.0.0/16")]
pub struct CidrError(String);

impl FromStr for ClusterCidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<ClusterCidr, CidrError> {
        let wrong = || CidrError(text.to_owned());
        let (address, bits) = text.split_once('/').ok_or_else(wrong)?;
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        let bits: u32 = bits.parse().map_err(|_| wrong())?;
        let base = u32::from(address);
        let host = u32::MAX.checked_shr(bits).unwrap_or(0);
        if !(8..=NODE_BITS).contains(&bits) || base & host != 0 {
            return Err(wrong());
        }
        Ok(ClusterCidr { base, bits, node_bits: NODE_BITS })
    }
}

impl fmt::Display for ClusterCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.bits)
    }
}

impl ClusterCidr {
    /// With another size of the nodes' ranges. It must be the same as long as the cluster lives.
    ///
    /// # Errors
    /// When a node's range would be larger than the cluster's.
    pub fn with_node_bits(self, node_bits: u32) -> Result<ClusterCidr, String> {
        if !(self.bits..=28).contains(&node_bits) {
            return Err(format!(
                "--node-cidr-mask-size: {node_bits}, want {} to 28 within the cluster CIDR {self}",
                self.bits
            ));
        }
        Ok(ClusterCidr { node_bits, ..self })
    }

    /// How many nodes have room.
    pub fn capacity(self) -> u32 {
        1 << (self.node_bits - self.bits)
    }

    /// The range with a number below the capacity.
    pub fn range(self, index: u32) -> String {
        format!("{}/{}", Ipv4Addr::from(self.base | index << (32 - self.node_bits)), self.node_bits)
    }
}

/// What to do for a node that wants a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// It has this one already.
    Has(u32),
    /// This one was never given.
    Free(u32),
    /// This one belongs to a node that is gone without a trace; with the revision of its key.
    Reclaim(u32, i64),
    /// There is none.
    Full,
}

/// Chooses a range. `given`: owner and key revision by number; `alive`: whether anything of an owner is left.
pub fn choose(
    cidr: ClusterCidr,
    node: &str,
    given: &BTreeMap<u32, (String, i64)>,
    alive: impl Fn(&str) -> bool,
) -> Choice {
    if let Some((index, _)) = given.iter().find(|(index, (owner, _))| owner == node && **index < cidr.capacity()) {
        return Choice::Has(*index);
    }
    // Ordered: as long as they count up, none is left out.
    let mut numbers = (0..cidr.capacity()).zip(given.keys().map(Some).chain(std::iter::repeat(None)));
    if let Some((free, _)) = numbers.find(|(index, given)| *given != Some(index)) {
        return Choice::Free(free);
    }
    let gone = given.iter().find(|(index, (owner, _))| **index < cidr.capacity() && !alive(owner));
    gone.map_or(Choice::Full, |(index, (_, revision))| Choice::Reclaim(*index, *revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        let cidr: ClusterCidr = "10.42.0.0/16".parse().expect("good");
        assert_eq!(
            (cidr.capacity(), cidr.range(0), cidr.range(255)),
            (256, "10.42.0.0/24".into(), "10.42.255.0/24".into())
        );
        let wide = cidr.with_node_bits(21).expect("fits");
        assert_eq!((wide.capacity(), wide.range(3)), (32, "10.42.24.0/21".to_owned()));
        for bits in [15, 29] {
            assert!(cidr.with_node_bits(bits).expect_err("does not fit").contains("want 16 to 28"));
        }
        let one: ClusterCidr = "192.168.7.0/24".parse().expect("good");
        assert_eq!((one.capacity(), one.range(0)), (1, "192.168.7.0/24".into()));
        for bad in [
            "",
            "10.42.0.0",
            "10.42.0.1/16",
            "10.42.0.0/25",
            "10.0.0.0/7",
            "x/16",
            "10.42.0.0/",
            "::/16",
            "10.42.0.0/99",
        ] {
            assert!(bad.parse::<ClusterCidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn choices() {
        let cidr: ClusterCidr = "10.0.0.0/23".parse().expect("good");
        let given = |owners: &[(u32, &str)]| {
            owners.iter().map(|(index, owner)| (*index, ((*owner).to_owned(), i64::from(*index) + 10))).collect()
        };
        let alive = |node: &str| node != "gone";
        assert_eq!(choose(cidr, "a", &given(&[]), alive), Choice::Free(0));
        assert_eq!(choose(cidr, "a", &given(&[(0, "b")]), alive), Choice::Free(1));
        assert_eq!(choose(cidr, "a", &given(&[(0, "b"), (1, "a")]), alive), Choice::Has(1));
        assert_eq!(choose(cidr, "a", &given(&[(0, "b"), (1, "gone")]), alive), Choice::Reclaim(1, 11));
        assert_eq!(choose(cidr, "a", &given(&[(0, "b"), (1, "c")]), alive), Choice::Full);
    }
}
