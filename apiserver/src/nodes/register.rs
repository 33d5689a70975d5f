//! Registration: a Node object, and a range of pod addresses that nobody else has.

use std::sync::Arc;

use minipod_proto::{
    Kind,
    v1::{CreateRequest, Node, NodeStatus, Object, RegisterResponse, Time},
};

use super::{
    Sessions,
    cidr::{Choice, ClusterCidr},
    pressure::follow_pressure,
    ranges::{Given, Ranges},
};
use crate::{
    error::ApiError,
    keys,
    registry::{Registry, Verdict},
    storage::{Guard, Outcome, Write},
};

/// Tries for a range when other nodes register at the same time.
const ATTEMPTS: u32 = 64;

/// Registers nodes.
pub struct Registrar {
    registry: Arc<Registry>,
    sessions: Arc<Sessions>,
    cluster_cidr: ClusterCidr,
    heartbeat_interval_ms: i64,
    ranges: Ranges,
}

impl Registrar {
    /// A registrar that gives ranges of a cluster's addresses.
    pub fn new(
        registry: Arc<Registry>,
        sessions: Arc<Sessions>,
        cluster_cidr: ClusterCidr,
        heartbeat_interval_ms: i64,
    ) -> Registrar {
        Registrar { registry, sessions, cluster_cidr, heartbeat_interval_ms, ranges: Ranges::default() }
    }

    /// Makes or refreshes the node.
    ///
    /// # Errors
    /// When the node is wrong, no range is left, or the store cannot be written.
    pub async fn register(&self, given: Option<Node>) -> Result<RegisterResponse, ApiError> {
        let given = given.ok_or_else(|| ApiError::Invalid("node: missing".into()))?;
        let name = given.metadata.as_ref().map(|meta| meta.name.clone()).unwrap_or_default();
        keys::object_key(Kind::Node, "", &name)?;
        self.sessions.touch(&name);
        let node = self.make_or_refresh(&name, &given).await?;
        let node = Node::try_from(node)
            .map_err(|_| ApiError::Unavailable("the store holds no node under the node's key".into()))?;
        let pod_cidr = node.spec().pod_cidr.clone();
        Ok(RegisterResponse { node: Some(node), pod_cidr, heartbeat_interval_ms: self.heartbeat_interval_ms })
    }

    async fn make_or_refresh(&self, name: &str, given: &Node) -> Result<Object, ApiError> {
        for _ in 0..ATTEMPTS {
            let existing = self.registry.read(Kind::Node, name).await?;
            if let Some(node) = existing.as_ref().and_then(|entry| entry.object.as_node())
                && !node.spec().pod_cidr.is_empty()
            {
                return self.refresh(name, given, &node.spec().pod_cidr).await;
            }
            let (range, claim) = self.range(name).await?;
            if existing.is_some() {
                return self.refresh(name, given, &range).await;
            }
            match self.create(given, &range, claim).await {
                // Somebody was faster with the node, or took the range while there was no node to see.
                Err(ApiError::Exists { .. } | ApiError::Stale { .. }) => self.ranges.forget(),
                done => return done,
            }
        }
        Err(ApiError::Unavailable("too many nodes register at the same time; try again".into()))
    }

    /// The node comes to be only while the range is still its own: `claim` is the range's key as it was written for it.
    async fn create(&self, given: &Node, range: &str, claim: Guard) -> Result<Object, ApiError> {
        let mut node = given.clone();
        let meta = node.metadata.get_or_insert_default();
        meta.resource_version.clear();
        node.spec_mut().pod_cidr = range.to_owned();
        node.spec_mut().pod_cidrs = vec![range.to_owned()];
        node.status = Some(alive(node.status.take().unwrap_or_default(), None, self.registry.now()));
        let request = CreateRequest { object: Some(node.into()), dry_run: false };
        self.registry.create_while(request, Some(claim)).await
    }

    async fn refresh(&self, name: &str, given: &Node, range: &str) -> Result<Object, ApiError> {
        let now = self.registry.now();
        let written = self.registry.modify(Kind::Node, name, |old| {
            let Some(old_node) = old.as_node() else { return Ok(Verdict::Keep) };
            let mut node = old_node.clone();
            let labels = given.metadata.as_ref().map(|meta| meta.labels.clone()).unwrap_or_default();
            // Labels that users have added stay.
            node.metadata.get_or_insert_default().labels.extend(labels);
            if node.spec().pod_cidr.is_empty() {
                node.spec_mut().pod_cidr = range.to_owned();
                node.spec_mut().pod_cidrs = vec![range.to_owned()];
            }
            node.status = Some(alive(given.status.clone().unwrap_or_default(), Some(old_node.status()), now));
            follow_pressure(&mut node, now);
            let object = Object::from(node);
            crate::registry::admission::validate_update(old, &object)?;
            Ok(Verdict::put(object))
        });
        Ok(written.await?.object)
    }

    /// A range that is the node's alone, with its key as it is now: the key is written only if nobody has it, or a node that is
    /// gone. Whether a node is gone is asked of the store in that transaction: the cache may not know a node yet.
    async fn range(&self, name: &str) -> Result<(String, Guard), ApiError> {
        for _ in 0..ATTEMPTS {
            let read = if self.ranges.is_known() { None } else { Some(self.given().await?) };
            let cache = &self.registry.cache;
            let left = |node: &str| {
                cache.get(Kind::Node, node).is_some()
                    || cache.ledgers(std::iter::once(node)).into_iter().flatten().next().is_some()
            };
            let Some(chosen) = self.ranges.choose(self.cluster_cidr, name, read, left) else { continue };
            let index = match chosen.choice {
                Choice::Has(index) => {
                    return Ok((self.cluster_cidr.range(index), Guard::new(keys::pod_cidr(index), chosen.revision)));
                }
                Choice::Free(index) | Choice::Reclaim(index, _) => index,
                Choice::Full => {
                    let (cidr, count) = (self.cluster_cidr, self.cluster_cidr.capacity());
                    return Err(ApiError::TooLarge(format!(
                        "--cluster-cidr {cidr} has room for {count} nodes, and all are taken"
                    )));
                }
            };
            let mut guards = vec![Guard::new(keys::pod_cidr(index), chosen.revision)];
            if let Some(owner) = &chosen.owner {
                guards.extend([Guard::new(keys::object(Kind::Node, owner), 0), Guard::new(keys::ledger(owner), 0)]);
            }
            let write = Write::Put(keys::pod_cidr(index), name.as_bytes().to_vec());
            match self.registry.storage.txn(guards, vec![write]).await? {
                Outcome::Done { revision } => {
                    return Ok((self.cluster_cidr.range(index), Guard::new(keys::pod_cidr(index), revision)));
                }
                // What the guards hold now is newer than the cache: what is asked next is true then.
                Outcome::Lost { present } => {
                    self.ranges.forget();
                    if let Some(newest) = present.iter().flatten().map(|item| item.revision).max() {
                        self.registry.cache.reach(newest).await?;
                    }
                }
            }
        }
        Err(ApiError::Unavailable("too many nodes register at the same time; try again".into()))
    }

    /// All ranges that are given.
    async fn given(&self) -> Result<Given, ApiError> {
        let (items, _) = self.registry.storage.all(&keys::pod_cidr_prefix(), 0).await?;
        let mut given = Given::new();
        for item in items {
            if let keys::Parsed::PodCidr(index) = keys::parse(&item.key)
                && let Ok(index) = index.parse::<u32>()
            {
                given.insert(index, (String::from_utf8_lossy(&item.value).into_owned(), item.revision));
            }
        }
        Ok(given)
    }
}

/// The status of a node that has just been heard of: what it says, and Ready unless it says otherwise.
pub(super) fn alive(mut reported: NodeStatus, before: Option<&NodeStatus>, now: Time) -> NodeStatus {
    if !reported.conditions.iter().any(|condition| condition.r#type == "Ready") {
        // Transition times go on where the node does not speak of its readiness.
        let known = before.and_then(|status| status.conditions.iter().find(|condition| condition.r#type == "Ready"));
        reported.conditions.extend(known.cloned());
        reported.set_condition("Ready", "True", "AgentReady", "the node's agent is connected", now);
    }
    reported
}
