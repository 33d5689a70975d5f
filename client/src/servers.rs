//! The addresses of API servers as they are written on a command line, and what is done when one of them fails.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::error::ClientError;

/// Calls go round the servers for so long before they fail: a new leader of their store is found within a second or two.
const PATIENCE: Duration = Duration::from_secs(3);

/// API servers, `http://HOST:PORT` each, in the order in which they are tried. At least one, none twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Servers(Vec<String>);

impl Servers {
    /// Checks addresses; `http://` is added where no scheme is given.
    ///
    /// # Errors
    /// The first address that is wrong, and what would be right.
    pub fn new<'a>(addresses: impl IntoIterator<Item = &'a str>) -> Result<Servers, ClientError> {
        let mut servers: Vec<String> = Vec::new();
        for given in addresses {
            let wrong = |message: &str| ClientError::Address { address: given.to_owned(), message: message.to_owned() };
            let address = checked(given.trim()).map_err(wrong)?;
            if servers.contains(&address) {
                return Err(wrong("it is named twice"));
            }
            servers.push(address);
        }
        if servers.is_empty() {
            return Err(ClientError::Address { address: String::new(), message: "no address is given".to_owned() });
        }
        Ok(Servers(servers))
    }

    /// The addresses.
    #[must_use]
    pub fn as_slice(&self) -> &[String] {
        &self.0
    }
}

impl FromStr for Servers {
    type Err = ClientError;

    /// Of addresses separated by commas.
    fn from_str(text: &str) -> Result<Servers, ClientError> {
        Servers::new(text.split(','))
    }
}

impl fmt::Display for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

fn checked(address: &str) -> Result<String, &'static str> {
    if address.is_empty() {
        return Err("an address is empty");
    }
    let rest = match address.split_once("://") {
        Some(("http", rest)) => rest,
        Some(("https", _)) => return Err("the API is not served with TLS"),
        Some(_) => return Err("the scheme is not supported"),
        None => address,
    };
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains(|c: char| "/?#@ ".contains(c)) {
        return Err("there is more than a host and a port");
    }
    let (host, port) = authority.rsplit_once(':').ok_or("the port is missing")?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    if bare.unwrap_or(host).is_empty() {
        return Err("the host is missing");
    }
    if bare.is_none() && host.contains(':') {
        return Err("an IPv6 address stands in brackets, such as http://[::1]:7650");
    }
    if port.parse::<u16>().ok().is_none_or(|port| port == 0) {
        return Err("the port is not between 1 and 65535");
    }
    Ok(format!("http://{authority}"))
}

/// When a failed call may be tried at another server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retry {
    /// A read: whenever the server is not there.
    Always,
    /// A write: only when it was never sent.
    NeverSent,
}

/// What follows a try that failed because the server is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// The next server is asked at once.
    Elsewhere,
    /// All have been asked: they are asked again after a pause.
    Pause,
    /// It has failed.
    GiveUp,
}

/// The tries of one call.
#[derive(Debug)]
pub(crate) struct Tries {
    servers: usize,
    retry: Retry,
    failed: usize,
}

impl Tries {
    pub(crate) fn new(servers: usize, retry: Retry) -> Tries {
        Tries { servers, retry, failed: 0 }
    }

    /// One more has failed, `elapsed` after the first began; `sent`: what it asked for may have been done.
    pub(crate) fn failed(&mut self, sent: bool, elapsed: Duration) -> Next {
        self.failed += 1;
        if sent && self.retry == Retry::NeverSent {
            return Next::GiveUp;
        }
        // A lone server's connection may just have gone stale: a read tries a new one. Whoever waits for a lone server says so himself.
        if self.servers == 1 {
            return if self.retry == Retry::Always && self.failed == 1 { Next::Elsewhere } else { Next::GiveUp };
        }
        match self.failed % self.servers {
            0 if elapsed >= PATIENCE => Next::GiveUp,
            0 => Next::Pause,
            _ => Next::Elsewhere,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        for (text, read) in [
            ("http://10.0.0.1:7650", "http://10.0.0.1:7650"),
            (" a:1 , http://b:2/", "http://a:1,http://b:2"),
            ("[::1]:7,http://[fe80::1]:7", "http://[::1]:7,http://[fe80::1]:7"),
        ] {
            assert_eq!(text.parse::<Servers>().expect(text).to_string(), read);
        }
    }

    #[test]
    fn a_wrong_list_says_which_address_and_why() {
        for (text, address, why) in [
            ("", "", "an address is empty"),
            ("http://a:1,,http://b:2", "", "an address is empty"),
            ("http://a:1,", "", "an address is empty"),
            ("http://a:1,http://b", "http://b", "the port is missing"),
            ("a:1,b:x", "b:x", "the port is not between"),
            ("a:0", "a:0", "the port is not between"),
            ("a:65536", "a:65536", "the port is not between"),
            ("http://:1", "http://:1", "the host is missing"),
            ("http://[]:1", "http://[]:1", "the host is missing"),
            ("::1:7650", "::1:7650", "brackets"),
            ("https://a:1", "https://a:1", "not served with TLS"),
            ("etcd://a:1", "etcd://a:1", "scheme is not supported"),
            ("http://a:1/pods", "http://a:1/pods", "more than a host and a port"),
            ("http://me@a:1", "http://me@a:1", "more than a host and a port"),
            ("http://a:1 http://b:2", "http://a:1 http://b:2", "more than a host and a port"),
            ("a:1,b:2,http://a:1", "http://a:1", "named twice"),
        ] {
            let said = text.parse::<Servers>().expect_err(text).to_string();
            let named = format!("server address {address:?}: ");
            assert!(said.starts_with(&named) && said.contains(why), "{text:?}: {said}");
            assert!(said.ends_with("want http://HOST:PORT, several separated by commas"), "{said}");
        }
        assert!(Servers::new([]).expect_err("none").to_string().contains("no address is given"));
    }

    #[test]
    fn the_table_of_tries() {
        use Next::{Elsewhere, GiveUp, Pause};
        use Retry::{Always, NeverSent};
        let (early, late) = (Duration::ZERO, PATIENCE);
        // Servers, kind, and tries that fail: whether it was sent, when, and what follows.
        type Steps<'a> = &'a [(bool, Duration, Next)];
        let table: &[(usize, Retry, Steps<'_>)] = &[
            (1, Always, &[(true, early, Elsewhere), (true, early, GiveUp)]),
            (1, Always, &[(false, late, Elsewhere), (false, late, GiveUp)]),
            (1, NeverSent, &[(false, early, GiveUp)]),
            (1, NeverSent, &[(true, early, GiveUp)]),
            (
                3,
                Always,
                &[(true, early, Elsewhere), (false, early, Elsewhere), (true, early, Pause), (true, early, Elsewhere)],
            ),
            (3, Always, &[(true, early, Elsewhere), (true, late, Elsewhere), (true, late, GiveUp)]),
            (3, NeverSent, &[(false, early, Elsewhere), (false, early, Elsewhere), (false, early, Pause)]),
            (3, NeverSent, &[(false, early, Elsewhere), (true, early, GiveUp)]),
            (2, NeverSent, &[(false, early, Elsewhere), (false, late, GiveUp)]),
        ];
        for (servers, retry, steps) in table {
            let mut tries = Tries::new(*servers, *retry);
            for (step, (sent, elapsed, next)) in steps.iter().enumerate() {
                assert_eq!(tries.failed(*sent, *elapsed), *next, "{servers} {retry:?} step {step}");
            }
        }
    }
}
