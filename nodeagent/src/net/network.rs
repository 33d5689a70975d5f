//! The bridge, and pods on it.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::route::RouteProtocol;
use nix::errno::Errno;
use sha2::{Digest as _, Sha256};

use super::cidr::mac_of;
use super::ipam::{Ipam, check_uid};
use super::links::{self, Link, Pair};
use super::netlink::Netlink;
use super::ports::{Forward, PortBook, PortWish};
use super::{Cidr, NetError, Netns, firewall};

/// The name of the interface inside every pod.
const POD_IFNAME: &str = "eth0";
/// Index of `lo` in every namespace.
const LOOPBACK: u32 = 1;
/// Begins the alias of every veth of ours; the pod's uid follows.
const ALIAS: &str = "minipod:";
/// So many names are tried for a veth before we give up; a second one is needed once in 2^48 pods.
const NAMES: u32 = 8;
/// How long a veth may take to go with its namespace before it is removed by hand. The kernel needs some 30 ms.
const LINGER: Duration = Duration::from_millis(500);

/// How the node's network shall be.
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// Name of the bridge: letters, digits, `-`, `_`, `.`; at most 15 bytes.
    pub bridge: String,
    /// The node's part of the pod network; its first address is the bridge's.
    pub pod_cidr: Cidr,
    /// The pod network of all nodes, when known: traffic within it keeps its source address.
    pub cluster_cidr: Option<Cidr>,
    /// For `ipam`.
    pub data_dir: PathBuf,
    /// Of the pods' interfaces; `None`: the kernel's default (1500).
    pub mtu: Option<u32>,
}

/// What a pod got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodNetwork {
    /// The one address of the pod.
    pub ip: Ipv4Addr,
    /// Prefix length of the node's range.
    pub prefix: u8,
    /// Derived from `ip`, `0a:58:…`.
    pub mac: [u8; 6],
    /// Inside the pod: `eth0`.
    pub ifname: String,
    /// The bridge.
    pub gateway: Ipv4Addr,
    /// The other end, on the node.
    pub host_ifname: String,
}

/// The pods of another node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeRoute {
    /// Its range.
    pub pod_cidr: Cidr,
    /// Its address, on a link of this node.
    pub via: Ipv4Addr,
}

/// The network of this node. Every method blocks for at most a few milliseconds (but [`Network::open`] and
/// [`Network::shutdown`], which run `nft`), may be called from any thread, and is idempotent.
#[derive(Debug)]
pub struct Network {
    shared: Arc<Shared>,
    reaper: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    config: NetConfig,
    bridge_index: u32,
    state: Mutex<State>,
    /// Told when `State::leaving` or `State::closed` changes.
    changed: Condvar,
}

/// One lock for all: the kernel has one for its links too.
#[derive(Debug)]
struct State {
    netlink: Netlink,
    book: Ipam,
    ports: PortBook,
    /// Pods that are detached and whose veth may still be there, and since when. At most the pods of a node.
    leaving: BTreeMap<String, Instant>,
    closed: bool,
}

impl Network {
    /// Makes the bridge with its address, forwarding and masquerade, and reads the address book.
    /// What cannot be had of forwarding and masquerade is logged: pods of one node still reach each other.
    ///
    /// # Errors
    /// When the bridge cannot be made or the address book cannot be read.
    pub fn open(config: NetConfig) -> Result<Self, NetError> {
        check_bridge_name(&config.bridge)?;
        let mut netlink = Netlink::open().map_err(|e| failed("open a netlink socket for", &config.bridge, e))?;
        let bridge_index = ensure_bridge(&mut netlink, &config)?;
        let book = Ipam::open(&config.data_dir, config.pod_cidr)?;
        let ports = PortBook::open(&config.data_dir)?;
        firewall::enable(&config, &ports.all());
        let state = Mutex::new(State { netlink, book, ports, leaving: BTreeMap::new(), closed: false });
        let shared = Arc::new(Shared { config, bridge_index, state, changed: Condvar::new() });
        let reaper = thread::Builder::new().name("veth-reaper".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.reap()
        });
        let reaper = reaper.map_err(|e| failed("start the reaper of", &shared.config.bridge, e))?;
        Ok(Self { shared, reaper: Some(reaper) })
    }

    /// Gives the pod its address, connects its namespace and forwards the node's ports that it wants. The same uid gets the
    /// same address until [`Network::detach`].
    ///
    /// # Errors
    /// [`NetError::Exhausted`], or what netlink or nft says; nothing but the address stays reserved then.
    pub fn attach(&self, uid: &str, netns: &Netns, wishes: &[PortWish]) -> Result<PodNetwork, NetError> {
        check_uid(uid)?;
        let mut inside = Netlink::open_in(netns).map_err(|e| failed("enter the network namespace of pod", uid, e))?;
        let (ip, host_ifname, pod_index) = {
            let mut state = self.shared.lock();
            state.leaving.remove(uid);
            let ip = state.book.reserve(uid)?;
            let (name, index) = self.shared.connect(&mut state.netlink, &mut inside, uid, ip, netns)?;
            if !wishes.is_empty() {
                let hairpin = state.netlink.call(links::set_hairpin(&name), 0);
                hairpin.map_err(|e| failed("turn frames around on veth", &name, e))?;
            }
            (ip, name, index)
        };
        let cidr = self.shared.config.pod_cidr;
        configure_inside(&mut inside, pod_index, ip, cidr).map_err(|(what, e)| failed(what, uid, e))?;
        self.shared.forward(uid, wishes.iter().map(|wish| Forward { wish: *wish, pod_ip: ip }).collect())?;
        Ok(PodNetwork {
            ip,
            prefix: cidr.prefix,
            mac: mac_of(ip),
            ifname: POD_IFNAME.to_owned(),
            gateway: cidr.gateway(),
            host_ifname,
        })
    }

    /// The address of a pod that has one.
    #[must_use]
    pub fn address(&self, uid: &str) -> Option<Ipv4Addr> {
        self.shared.lock().book.get(uid)
    }

    /// Frees the address and the ports. Call it when the pod's namespace is gone or going: the veth dies with it, in its own time.
    /// A veth that is still there half a second later is removed in the background.
    ///
    /// # Errors
    /// When the address book cannot be written.
    pub fn detach(&self, uid: &str) -> Result<(), NetError> {
        check_uid(uid)?;
        self.shared.forward(uid, Vec::new())?;
        let mut state = self.shared.lock();
        state.book.release(uid)?;
        state.leaving.insert(uid.to_owned(), Instant::now());
        self.shared.changed.notify_one();
        Ok(())
    }

    /// Frees addresses and removes veths of pods that are not in `live`; returns the uids of those that had any. A pod counts as
    /// live from before its `attach` to after its `detach`.
    ///
    /// # Errors
    /// When the address book or the links cannot be read.
    pub fn reconcile(&self, live: &HashSet<String>) -> Result<Vec<String>, NetError> {
        let mut state = self.shared.lock();
        let mut dead = state.book.reconcile(live)?;
        if state.ports.reconcile(live)? {
            firewall::apply(&self.shared.config, &state.ports.all()).map_err(NetError::Ports)?;
        }
        let names: HashSet<String> = live.iter().flat_map(|uid| (0..NAMES).map(|n| veth_name(uid, n))).collect();
        for link in self.shared.veths(&mut state.netlink)? {
            match link.alias.strip_prefix(ALIAS) {
                Some(uid) if live.contains(uid) => continue,
                Some(uid) if !dead.iter().any(|d| d == uid) => dead.push(uid.to_owned()),
                // Killed between making and marking it.
                None if names.contains(&link.name) => continue,
                _ => {}
            }
            delete(&mut state.netlink, &link)?;
        }
        Ok(dead)
    }

    /// Makes the routes to other nodes exactly these (host-gw).
    ///
    /// # Errors
    /// What netlink says.
    pub fn set_routes(&self, routes: &[NodeRoute]) -> Result<(), NetError> {
        let wanted: HashSet<(Cidr, Ipv4Addr)> = routes.iter().map(|route| (route.pod_cidr, route.via)).collect();
        set_routes(&mut self.shared.lock().netlink, &wanted)
    }

    /// Removes the bridge, its veths, the routes and the firewall table. For tests and for leaving a node.
    ///
    /// # Errors
    /// What netlink says.
    pub fn shutdown(self) -> Result<(), NetError> {
        let shared = &self.shared;
        firewall::disable(&shared.config.bridge);
        let netlink = &mut shared.lock().netlink;
        set_routes(netlink, &HashSet::new())?;
        for link in shared.veths(netlink)? {
            delete(netlink, &link)?;
        }
        match find(netlink, &shared.config.bridge)? {
            Some(bridge) => delete(netlink, &bridge),
            None => Ok(()),
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        if let Some(reaper) = self.reaper.take() {
            // It panics only where this process would have died of it.
            let _ = reaper.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the pod's ports exactly these. Under the lock, so that the newest rules are what stays; a node's pods with ports
    /// of the node are few.
    fn forward(&self, uid: &str, forwards: Vec<Forward>) -> Result<(), NetError> {
        let mut state = self.lock();
        let none = forwards.is_empty();
        if !state.ports.set(uid, forwards)? && none {
            return Ok(());
        }
        // Also when the book knows them already: it may be that only making the rules failed.
        firewall::apply(&self.config, &state.ports.all()).map_err(NetError::Ports)
    }

    /// The pod's veth: the one that is there and whole, else a new one. Returns its name on the node and its index in the pod.
    fn connect(
        &self,
        host: &mut Netlink,
        inside: &mut Netlink,
        uid: &str,
        ip: Ipv4Addr,
        netns: &Netns,
    ) -> Result<(String, u32), NetError> {
        let alias = format!("{ALIAS}{uid}");
        for n in 0..NAMES {
            let name = veth_name(uid, n);
            if let Some(link) = self.create(host, &name, &alias, ip, netns)? {
                let here = link.master == Some(self.bridge_index);
                let ours = link.alias == alias || (link.alias.is_empty() && here);
                if !ours {
                    continue;
                }
                let pod = find(inside, POD_IFNAME)?;
                if let Some(pod) = pod.filter(|p| here && p.peer == Some(link.index) && p.mac == mac_of(ip)) {
                    mark(host, &name, &alias)?;
                    return Ok((name, pod.index));
                }
                // Of an earlier sandbox of this pod, not yet gone.
                delete(host, &link)?;
                if self.create(host, &name, &alias, ip, netns)?.is_some() {
                    continue;
                }
            }
            let pod = find(inside, POD_IFNAME)?.ok_or_else(|| failed("find eth0 of pod", uid, Errno::ENODEV.into()))?;
            return Ok((name, pod.index));
        }
        Err(failed("find a free veth name for pod", uid, Errno::EEXIST.into()))
    }

    /// Makes and marks a veth; or returns the link that has its name already.
    fn create(
        &self,
        host: &mut Netlink,
        name: &str,
        alias: &str,
        ip: Ipv4Addr,
        netns: &Netns,
    ) -> Result<Option<Link>, NetError> {
        let pair = Pair {
            host_name: name,
            bridge_index: self.bridge_index,
            pod_name: POD_IFNAME,
            pod_mac: mac_of(ip),
            mtu: self.config.mtu,
        };
        match host.call(links::create_pair(&pair, netns), NLM_F_CREATE | NLM_F_EXCL) {
            Ok(()) => mark(host, name, alias).map(|()| None),
            Err(error) if is(&error, Errno::EEXIST) => match find(host, name)? {
                Some(link) => Ok(Some(link)),
                // The name that exists is eth0 inside the pod.
                None => Err(failed("create eth0 for", name, error)),
            },
            Err(error) => Err(failed("create veth", name, error)),
        }
    }

    /// Our veths on this bridge.
    fn veths(&self, netlink: &mut Netlink) -> Result<Vec<Link>, NetError> {
        let all = netlink.dump(links::all_links()).map_err(|e| failed("list links of", &self.config.bridge, e))?;
        let ours = |link: &Link| {
            link.master == Some(self.bridge_index)
                && (link.alias.starts_with(ALIAS) || link.alias.is_empty() && link.name.starts_with(VETH))
        };
        Ok(all.into_iter().filter_map(Link::of).filter(ours).collect())
    }

    /// Removes veths that outlive their pods, until the network is closed.
    fn reap(&self) {
        let mut state = self.lock();
        while !state.closed {
            let now = Instant::now();
            let next = state.leaving.iter().min_by_key(|(_, since)| **since).map(|(uid, since)| (uid.clone(), *since));
            state = match next {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some((_, since)) if since + LINGER > now => {
                    let waited = self.changed.wait_timeout(state, since + LINGER - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                Some((uid, _)) => {
                    state.leaving.remove(&uid);
                    if let Err(error) = remove_veths(&mut state.netlink, &uid) {
                        tracing::warn!(uid, %error, "a veth stays behind until the next reconcile");
                    }
                    // Others may want the lock between two removals of some 20 ms each.
                    drop(state);
                    self.lock()
                }
            };
        }
    }
}

const VETH: &str = "mp";

/// The `n`th choice of a name for the veth of a pod: 14 bytes of the 15 that the kernel allows.
fn veth_name(uid: &str, n: u32) -> String {
    let hash = Sha256::new().chain_update(uid).chain_update(n.to_le_bytes()).finalize();
    hash.iter().take(6).fold(String::from(VETH), |mut name, byte| {
        let _ = write!(name, "{byte:02x}");
        name
    })
}

fn remove_veths(netlink: &mut Netlink, uid: &str) -> Result<(), NetError> {
    let alias = format!("{ALIAS}{uid}");
    for n in 0..NAMES {
        match find(netlink, &veth_name(uid, n))? {
            None => break,
            Some(link) if link.alias == alias => delete(netlink, &link)?,
            Some(_) => {}
        }
    }
    Ok(())
}

/// `lo` and `eth0` up, the address, the way out.
fn configure_inside(
    inside: &mut Netlink,
    index: u32,
    ip: Ipv4Addr,
    cidr: Cidr,
) -> Result<(), (&'static str, io::Error)> {
    let steps = [
        "set up lo in pod",
        "keep IPv6 from eth0 in pod",
        "set up eth0 in pod",
        "add the address of pod",
        "add the default route of pod",
    ];
    let anew = NLM_F_CREATE | NLM_F_REPLACE;
    let results = inside
        .batch(vec![
            (links::set_up(LOOPBACK), 0),
            (links::set_no_link_local(POD_IFNAME), 0),
            (links::set_up(index), 0),
            (RouteNetlinkMessage::NewAddress(links::address(index, ip, cidr.prefix)), anew),
            (RouteNetlinkMessage::NewRoute(links::route(None, cidr.gateway(), RouteProtocol::Static)), anew),
        ])
        .map_err(|e| ("talk to the namespace of pod", e))?;
    for (step, result) in steps.into_iter().zip(results) {
        unless_without_ipv6(result).map_err(|e| (step, e))?;
    }
    Ok(())
}

/// A kernel without IPv6 has nothing to keep away.
fn unless_without_ipv6(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if is(&error, Errno::EAFNOSUPPORT) { Ok(()) } else { Err(error) })
}

fn ensure_bridge(netlink: &mut Netlink, config: &NetConfig) -> Result<u32, NetError> {
    let name = &config.bridge;
    let gateway = config.pod_cidr.gateway();
    match netlink.call(links::create_bridge(name, mac_of(gateway)), NLM_F_CREATE | NLM_F_EXCL) {
        Err(error) if !is(&error, Errno::EEXIST) => return Err(failed("create bridge", name, error)),
        _ => {}
    }
    let link = find(netlink, name)?.ok_or_else(|| failed("find bridge", name, Errno::ENODEV.into()))?;
    if !link.is_bridge {
        return Err(failed("use as a bridge the link", name, Errno::EEXIST.into()));
    }
    let mut requests = vec![(links::set_up(link.index), 0)];
    // The node's range may have changed since this bridge was made.
    for message in netlink.dump(links::all_addresses()).map_err(|e| failed("list addresses of", name, e))? {
        let RouteNetlinkMessage::NewAddress(address) = message else { continue };
        let is_ours = address.attributes.contains(&AddressAttribute::Local(IpAddr::V4(gateway)))
            && address.header.prefix_len == config.pod_cidr.prefix;
        if address.header.index == link.index && !is_ours {
            requests.push((RouteNetlinkMessage::DelAddress(address), 0));
        }
    }
    let address = links::address(link.index, gateway, config.pod_cidr.prefix);
    requests.push((RouteNetlinkMessage::NewAddress(address), NLM_F_CREATE | NLM_F_REPLACE));
    for result in netlink.batch(requests).map_err(|e| failed("configure bridge", name, e))? {
        result.map_err(|e| failed("configure bridge", name, e))?;
    }
    Ok(link.index)
}

fn set_routes(netlink: &mut Netlink, wanted: &HashSet<(Cidr, Ipv4Addr)>) -> Result<(), NetError> {
    let messages = netlink.dump(links::all_routes()).map_err(|e| failed("list", "routes", e))?;
    let mut there = HashSet::new();
    for message in messages {
        if let RouteNetlinkMessage::NewRoute(route) = message {
            there.extend(links::our_route(&route));
        }
    }
    let message = |(cidr, via): &(Cidr, Ipv4Addr)| links::route(Some(*cidr), *via, links::ROUTE_PROTOCOL);
    let text = |(cidr, via): &(Cidr, Ipv4Addr)| format!("{cidr} via {via}");
    // Removed first: a range that moved to another node may have only one route.
    for route in there.difference(wanted) {
        match netlink.call(RouteNetlinkMessage::DelRoute(message(route)), 0) {
            Err(error) if !is(&error, Errno::ESRCH) => return Err(failed("remove route", &text(route), error)),
            _ => {}
        }
    }
    for route in wanted.difference(&there) {
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        let added = netlink.call(RouteNetlinkMessage::NewRoute(message(route)), flags);
        added.map_err(|e| failed("add route", &text(route), e))?;
    }
    Ok(())
}

fn mark(netlink: &mut Netlink, name: &str, alias: &str) -> Result<(), NetError> {
    netlink.call(links::set_alias(name, alias), 0).map_err(|e| failed("mark veth", name, e))?;
    let quiet = unless_without_ipv6(netlink.call(links::set_no_link_local(name), 0));
    quiet.map_err(|e| failed("keep IPv6 from veth", name, e))
}

fn find(netlink: &mut Netlink, name: &str) -> Result<Option<Link>, NetError> {
    match netlink.get(links::link_named(name)) {
        Ok(message) => Ok(Link::of(message)),
        Err(error) if is(&error, Errno::ENODEV) => Ok(None),
        Err(error) => Err(failed("look up link", name, error)),
    }
}

/// Removes a link; fine when it went by itself.
fn delete(netlink: &mut Netlink, link: &Link) -> Result<(), NetError> {
    match netlink.call(links::delete_link(link.index), 0) {
        Err(error) if !is(&error, Errno::ENODEV) => Err(failed("remove link", &link.name, error)),
        _ => Ok(()),
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno as i32)
}

fn failed(operation: &'static str, object: &str, source: io::Error) -> NetError {
    NetError::Netlink { operation, object: object.to_owned(), source }
}

fn check_bridge_name(name: &str) -> Result<(), NetError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let good = (1..=15).contains(&name.len()) && name.bytes().all(plain) && !matches!(name, "." | "..");
    good.then_some(()).ok_or_else(|| NetError::BadBridge(name.to_owned()))
}
