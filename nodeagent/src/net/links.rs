//! The messages of rtnetlink that the pod network needs, and what is read from the answers.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd};

use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind,
    InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Cidr;
use crate::sys::Netns;

/// Marks the routes that are ours in the node's table.
pub(super) const ROUTE_PROTOCOL: RouteProtocol = RouteProtocol::Other(109);

/// A veth pair as it shall be made.
pub(super) struct Pair<'a> {
    pub(super) host_name: &'a str,
    pub(super) bridge_index: u32,
    pub(super) pod_name: &'a str,
    pub(super) pod_mac: [u8; 6],
    pub(super) mtu: Option<u32>,
}

/// Makes both ends, puts one into the pod's namespace and the other on the bridge. The pod's end cannot be set up yet: the
/// kernel (`veth_open`) refuses with ENOTCONN before the pair is joined.
pub(super) fn create_pair(pair: &Pair<'_>, netns: &Netns) -> RouteNetlinkMessage {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(pair.pod_name.to_owned()),
        LinkAttribute::Address(pair.pod_mac.to_vec()),
        LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()),
    ];
    let mut host = up(LinkMessage::default());
    host.attributes =
        vec![LinkAttribute::IfName(pair.host_name.to_owned()), LinkAttribute::Controller(pair.bridge_index)];
    if let Some(mtu) = pair.mtu {
        peer.attributes.push(LinkAttribute::Mtu(mtu));
        host.attributes.push(LinkAttribute::Mtu(mtu));
    }
    host.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    RouteNetlinkMessage::NewLink(host)
}

/// Makes a bridge with a fixed MAC, so that it does not change when pods come and go.
pub(super) fn create_bridge(name: &str, mac: [u8; 6]) -> RouteNetlinkMessage {
    let mut link = up(LinkMessage::default());
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Address(mac.to_vec()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
    ];
    RouteNetlinkMessage::NewLink(link)
}

/// Notes on the link whose it is.
pub(super) fn set_alias(name: &str, alias: &str) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.attributes = vec![LinkAttribute::IfName(name.to_owned()), LinkAttribute::IfAlias(alias.to_owned())];
    RouteNetlinkMessage::SetLink(link)
}

/// Keeps a link without an IPv6 address of its own making; with EAFNOSUPPORT where the kernel has no IPv6. The pod network has
/// IPv4 alone, and a new link-local address is announced to everybody: the bridge carries each announcement to all pods of the node.
pub(super) fn set_no_link_local(name: &str) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    let none = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    link.attributes = vec![LinkAttribute::IfName(name.to_owned()), LinkAttribute::AfSpecUnspec(vec![none])];
    RouteNetlinkMessage::SetLink(link)
}

/// Lets the bridge send a frame back where it came from: with br_netfilter a connection of a pod to itself by a port of the
/// node is turned around within the bridge.
pub(super) fn set_hairpin(name: &str) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    let port = InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(true)]);
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::LinkInfo(vec![LinkInfo::PortKind(InfoPortKind::Bridge), LinkInfo::PortData(port)]),
    ];
    RouteNetlinkMessage::NewLink(link)
}

/// Sets a link up.
pub(super) fn set_up(index: u32) -> RouteNetlinkMessage {
    let mut link = up(LinkMessage::default());
    link.header.index = index;
    RouteNetlinkMessage::SetLink(link)
}

/// Asks for one link.
pub(super) fn link_named(name: &str) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    RouteNetlinkMessage::GetLink(link)
}

/// Asks for all links.
pub(super) fn all_links() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetLink(LinkMessage::default())
}

/// Removes a link.
pub(super) fn delete_link(index: u32) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    RouteNetlinkMessage::DelLink(link)
}

/// Gives a link an address.
pub(super) fn address(index: u32, ip: Ipv4Addr, prefix: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = prefix;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(IpAddr::V4(ip)), AddressAttribute::Address(IpAddr::V4(ip))];
    message
}

/// Asks for all IPv4 addresses.
pub(super) fn all_addresses() -> RouteNetlinkMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    RouteNetlinkMessage::GetAddress(message)
}

/// A route; no destination is the default route.
pub(super) fn route(destination: Option<Cidr>, via: Ipv4Addr, protocol: RouteProtocol) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = protocol;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    if let Some(cidr) = destination {
        message.header.destination_prefix_length = cidr.prefix;
        message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(cidr.base)));
    }
    message.attributes.push(RouteAttribute::Gateway(RouteAddress::Inet(via)));
    message
}

/// Asks for all IPv4 routes.
pub(super) fn all_routes() -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    RouteNetlinkMessage::GetRoute(message)
}

/// Of a route that carries our mark: where to, and by whom.
pub(super) fn our_route(message: &RouteMessage) -> Option<(Cidr, Ipv4Addr)> {
    if message.header.protocol != ROUTE_PROTOCOL {
        return None;
    }
    let (mut base, mut via) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => base = Some(*ip),
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => via = Some(*ip),
            _ => {}
        }
    }
    Some((Cidr { base: base?, prefix: message.header.destination_prefix_length }, via?))
}

/// What we want to know of a link.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) alias: String,
    pub(super) mac: Vec<u8>,
    /// Index of the other end of a veth, in its own namespace.
    pub(super) peer: Option<u32>,
    pub(super) master: Option<u32>,
    pub(super) is_bridge: bool,
}

impl Link {
    /// Of a netlink answer; `None` for anything else than a link.
    pub(super) fn of(message: RouteNetlinkMessage) -> Option<Self> {
        let RouteNetlinkMessage::NewLink(message) = message else { return None };
        let mut link = Self { index: message.header.index, ..Self::default() };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = alias,
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::Link(peer) => link.peer = Some(peer),
                LinkAttribute::Controller(master) => link.master = Some(master),
                LinkAttribute::LinkInfo(infos) => {
                    link.is_bridge = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Bridge)));
                }
                _ => {}
            }
        }
        Some(link)
    }
}

fn up(mut link: LinkMessage) -> LinkMessage {
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link
}
