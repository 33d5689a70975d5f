//! Which addresses lie behind which node: told to every node whenever it changes.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use minipod_daemon::shutdown::Shutdown;
use minipod_proto::{Kind, v1::routes::Route};
use tokio::sync::watch;

use crate::cache::{Cache, Filter};

/// So long after a look at all nodes nothing new is told: a fleet that comes at once would otherwise cost a look, and a table for
/// every node, with each of its nodes.
const SETTLE: Duration = Duration::from_millis(50);

/// The routes to all nodes, in the order of their names.
pub type Table = Arc<Vec<Route>>;

/// Keeps the table up to date until the shutdown.
pub async fn keep(cache: Arc<Cache>, table: watch::Sender<Table>, shutdown: Shutdown) {
    let Ok(filter) = Filter::everything(Kind::Node) else { return };
    while !shutdown.is_asked() {
        let Ok(mut changes) = cache.subscribe(Kind::Node, filter.clone(), 0) else { return };
        loop {
            // Cancel safe: `next` loses nothing, and what it returns is only a hint to look again.
            let ended = tokio::select! {
                next = changes.next() => next.is_err(),
                () = shutdown.asked() => return,
            };
            let routes = routes(&cache, &filter);
            table.send_if_modified(|old| {
                let differs = **old != routes;
                if differs {
                    *old = Arc::new(routes);
                }
                differs
            });
            if ended {
                break;
            }
            // Cancel safe: a sleep.
            tokio::select! {
                () = tokio::time::sleep(SETTLE) => {}
                () = shutdown.asked() => return,
            }
            // What came meanwhile is seen in one look.
            while let Some(Ok(_)) = changes.next().now_or_never() {}
        }
    }
}

fn routes(cache: &Cache, filter: &Filter) -> Vec<Route> {
    let (nodes, _) = cache.list(Kind::Node, filter);
    let route = |entry: &Arc<crate::cache::Entry>| {
        let node = entry.object.as_node()?;
        let via = node.address("InternalIP").filter(|via| !via.is_empty())?;
        let cidr = node.spec().pod_cidr.as_str();
        (!cidr.is_empty()).then(|| Route { node: entry.key.clone(), pod_cidr: cidr.to_owned(), via: via.to_owned() })
    };
    nodes.iter().filter_map(route).collect()
}
