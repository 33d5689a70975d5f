//! IPv4 ranges.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use super::NetError;

/// An IPv4 range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    /// First address; bits beyond the prefix are zero.
    pub base: Ipv4Addr,
    /// Bits of the network part, 0 to 32.
    pub prefix: u8,
}

impl Cidr {
    /// How many addresses there are for pods: all but the network's, the bridge's and the broadcast address.
    #[must_use]
    pub fn pod_addresses(self) -> u32 {
        u32::try_from((1u64 << (32 - self.prefix)).saturating_sub(3)).unwrap_or(u32::MAX)
    }

    /// The `n`th address, counted from the base.
    #[must_use]
    pub fn nth(self, n: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base.to_bits().wrapping_add(n))
    }

    /// The first usable address: the bridge's.
    #[must_use]
    pub fn gateway(self) -> Ipv4Addr {
        self.nth(1)
    }

    /// The `n`th address for a pod, from 0.
    #[must_use]
    pub fn pod_address(self, n: u32) -> Ipv4Addr {
        self.nth(n.wrapping_add(2))
    }

    /// The inverse of [`Cidr::pod_address`]; `None` for an address that no pod may have.
    #[must_use]
    pub fn pod_number(self, ip: Ipv4Addr) -> Option<u32> {
        let n = ip.to_bits().checked_sub(self.base.to_bits())?.checked_sub(2)?;
        (n < self.pod_addresses()).then_some(n)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = NetError;

    fn from_str(text: &str) -> Result<Self, NetError> {
        let bad = |why| NetError::BadCidr(text.to_owned(), why);
        let (base, prefix) = text.split_once('/').ok_or_else(|| bad("expected address/prefix"))?;
        let base: Ipv4Addr = base.parse().map_err(|_| bad("the address is not IPv4"))?;
        let prefix: u8 = prefix.parse().ok().filter(|p| *p <= 32).ok_or_else(|| bad("the prefix is not 0 to 32"))?;
        let host_bits = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
        if base.to_bits() & host_bits != 0 {
            return Err(bad("the address has bits beyond the prefix"));
        }
        Ok(Self { base, prefix })
    }
}

/// The MAC of an address: locally administered, the last four bytes are the address. It makes neighbours' caches right
/// even when an address moves to another pod.
#[must_use]
pub fn mac_of(ip: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = ip.octets();
    [0x0a, 0x58, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_ranges() {
        for (text, want) in [
            ("10.244.1.0/24", Ok((253, "10.244.1.1", "10.244.1.2"))),
            ("10.0.0.0/8", Ok((16_777_213, "10.0.0.1", "10.0.0.2"))),
            ("10.1.2.4/30", Ok((1, "10.1.2.5", "10.1.2.6"))),
            ("10.1.2.4/31", Ok((0, "10.1.2.5", "10.1.2.6"))),
            ("10.1.2.4/32", Ok((0, "10.1.2.5", "10.1.2.6"))),
            ("0.0.0.0/0", Ok((4_294_967_293, "0.0.0.1", "0.0.0.2"))),
            ("10.244.1.1/24", Err("beyond the prefix")),
            ("10.244.1.0", Err("expected address/prefix")),
            ("10.244.1.0/33", Err("prefix is not")),
            ("10.244.1.0/-1", Err("prefix is not")),
            ("fd00::/64", Err("not IPv4")),
            ("", Err("expected")),
        ] {
            match (text.parse::<Cidr>(), want) {
                (Ok(cidr), Ok((size, gateway, first))) => {
                    assert_eq!(cidr.to_string(), text);
                    assert_eq!(cidr.pod_addresses(), size, "{text}");
                    assert_eq!(cidr.gateway().to_string(), gateway);
                    assert_eq!(cidr.pod_address(0).to_string(), first);
                }
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{text}: {error}"),
                (got, want) => panic!("{text}: {got:?}, expected {want:?}"),
            }
        }
    }

    #[test]
    fn numbers_pod_addresses() {
        let cidr: Cidr = "10.244.1.0/29".parse().expect("a range");
        assert_eq!(cidr.pod_addresses(), 5);
        for n in 0..5 {
            assert_eq!(cidr.pod_number(cidr.pod_address(n)), Some(n));
        }
        for outside in ["10.244.1.0", "10.244.1.1", "10.244.1.7", "10.244.1.8", "10.244.0.255", "0.0.0.0"] {
            assert_eq!(cidr.pod_number(outside.parse().expect("an address")), None, "{outside}");
        }
    }

    #[test]
    fn mac_is_local_unicast() {
        let mac = mac_of(Ipv4Addr::new(10, 244, 1, 7));
        assert_eq!(mac, [0x0a, 0x58, 10, 244, 1, 7]);
        assert_eq!(mac[0] & 3, 2, "locally administered, not multicast");
    }
}
