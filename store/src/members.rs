//! Members as they are written on a command line: `a=https://host:port,b=https://host:port`.

use std::collections::BTreeMap;

/// Peer addresses by name.
pub type Members = BTreeMap<String, Vec<String>>;

/// Host and port of an address.
fn authority(url: &str) -> Option<(&str, &str, u16)> {
    let (scheme, rest) = url.split_once("://").filter(|(scheme, _)| ["http", "https"].contains(scheme))?;
    let (host, port) = rest.trim_end_matches('/').rsplit_once(':')?;
    let port = port.parse::<u16>().ok()?;
    (!host.is_empty() && !host.contains('/')).then_some((scheme, host, port))
}

/// An address of a member: `http://host:port` or `https://host:port`.
///
/// # Errors
/// When it is not written like that.
pub fn parse_url(url: &str) -> Result<String, String> {
    let (scheme, host, port) =
        authority(url).ok_or("it must be http://host:port, or https://host:port with certificates")?;
    Ok(format!("{scheme}://{host}:{port}"))
}

/// The host of an address that [`parse_url`] has made, without the brackets of an IPv6 address, and its port.
#[must_use]
pub fn host_and_port(url: &str) -> Option<(&str, u16)> {
    authority(url).map(|(_, host, port)| (host.trim_matches(['[', ']']), port))
}

/// A list of members; a name may come several times.
///
/// # Errors
/// When an item is not `name=address`; it is named.
pub fn parse_members(list: &str) -> Result<Members, String> {
    let mut members = Members::new();
    for item in list.split(',') {
        let (name, url) = item.split_once('=').ok_or_else(|| format!("{item:?}: it must be name=https://host:port"))?;
        if name.is_empty() {
            return Err(format!("{item:?}: the name is empty"));
        }
        let url = parse_url(url).map_err(|problem| format!("{url:?}: {problem}"))?;
        members.entry(name.to_owned()).or_default().push(url);
    }
    Ok(members)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_members_are_checked() {
        assert_eq!(parse_url("http://h:1/"), Ok("http://h:1".to_owned()));
        assert_eq!(parse_url("https://[::1]:1"), Ok("https://[::1]:1".to_owned()));
        assert_eq!(host_and_port("https://[::1]:7"), Some(("::1", 7)));
        for bad in ["h:1", "ftp://h:1", "http://h", "http://:1", "http://h:x", "http://h/p:1"] {
            assert!(parse_url(bad).is_err(), "{bad}");
        }
        let members = parse_members("a=http://h:1,b=https://h:2,a=http://h:3").expect("members");
        assert_eq!(members["a"], ["http://h:1", "http://h:3"]);
        for bad in ["a", "a=h:1", "=http://h:1", ""] {
            assert!(parse_members(bad).is_err(), "{bad}");
        }
    }
}
