//! `up` and `down`: a cluster on this machine that stays.

use std::path::{Path, PathBuf};

use minipod_client::Client;
use minipod_proto::v1::ImageLoadStart;

use super::args::{StoreArg, UpArgs};
use super::error::CliError;
use super::{image, print};
use crate::local::{self, LocalCluster, NodeOptions, Options, Store};

/// What a node has where nothing else is said.
const RESOURCES: &str = "cpu=4,memory=2Gi";

/// Starts a cluster and leaves it running.
pub async fn up(options: &UpArgs) -> Result<(), CliError> {
    let nodes =
        if options.nodes.is_empty() { vec!["node-a".to_owned(), "node-b".to_owned()] } else { options.nodes.clone() };
    let store = match options.store {
        StoreArg::Etcd => Store::Etcd,
        StoreArg::Embedded => Store::Embedded,
    };
    let wanted = Options {
        apiservers: options.apiservers.into(),
        schedulers: options.schedulers,
        store,
        ..Options::new(
            bin_dir(options.bin_dir.as_deref())?,
            nodes.iter().map(|text| node(text)).collect::<Result<_, _>>()?,
        )
    };
    note!(
        "starting: {}, {} API server(s), {} scheduler(s), nodes {}",
        if store == Store::Etcd { "etcd" } else { "embedded store" },
        options.apiservers,
        options.schedulers,
        nodes.join(" ")
    );
    let cluster = until_interrupted(LocalCluster::start(wanted)).await??;
    if let Some(dir) = &options.images {
        until_interrupted(load_images(cluster.client(), dir)).await??;
    }
    let server = cluster.server().to_owned();
    cluster.keep()?;
    note!("the cluster is up; its nodes are network namespaces of this machine");
    print(&usage(&server))
}

/// What to type at a cluster that stays.
pub fn usage(server: &str) -> String {
    format!(
        "export MINIPOD_SERVER={server}\nminictl get nodes\nminictl apply -f deploy/examples/helloworld.yaml\nminictl down\n"
    )
}

/// Ends every cluster of this machine that nobody owns: those that were left running, and what crashed owners left.
pub fn down() -> Result<(), CliError> {
    let removed = local::remove_abandoned(true)?;
    if removed.is_empty() {
        note!("there is no cluster to end");
    }
    removed.into_iter().try_for_each(|number| print(&format!("cluster {number} is down\n")))
}

/// Where the binaries are: as said, or beside this one.
pub fn bin_dir(stated: Option<&Path>) -> Result<PathBuf, CliError> {
    if let Some(dir) = stated {
        return Ok(dir.to_owned());
    }
    let own = std::env::current_exe().map_err(CliError::file("find", "this executable"))?;
    Ok(own.parent().map(Path::to_owned).unwrap_or_default())
}

fn node(text: &str) -> Result<NodeOptions, CliError> {
    let (name, allocatable) = text.split_once('=').unwrap_or((text, RESOURCES));
    if name.is_empty() || allocatable.is_empty() {
        return Err(CliError::usage(
            format!("node {text:?} has no name or no resources"),
            "want NAME or NAME=cpu=2,memory=2Gi",
        ));
    }
    Ok(NodeOptions { name: name.to_owned(), allocatable: allocatable.to_owned(), ..NodeOptions::default() })
}

/// Loads every archive of a directory into all nodes. Returns the images' names.
pub async fn load_images(client: &Client, dir: &Path) -> Result<Vec<String>, CliError> {
    let entries = std::fs::read_dir(dir).map_err(CliError::file("read directory", dir))?;
    let mut archives: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    archives.retain(|path| path.extension().is_some_and(|extension| extension == "tar") && path.is_file());
    archives.sort();
    if archives.is_empty() {
        let message = format!("{} has no image archives", dir.display());
        return Err(CliError::usage(message, "build them: cargo xtask images"));
    }
    let mut names = Vec::new();
    for archive in archives {
        let summary = image::load(client, &archive, ImageLoadStart::default(), false).await?;
        if summary.nodes.is_empty() {
            return Err(CliError::usage(
                format!("{} was loaded into no node", archive.display()),
                "see: minictl get nodes",
            ));
        }
        for node in summary.nodes {
            if !node.error.is_empty() {
                let message = format!("{}: node {}: {}", archive.display(), node.node, node.error);
                return Err(CliError::usage(message, "is it an OCI layout as a tar file?"));
            }
            names.extend(node.images.into_iter().flat_map(|image| image.names));
        }
    }
    names.sort();
    names.dedup();
    Ok(names)
}

/// Runs `work`; Ctrl-C drops it, which takes down what it has started.
pub async fn until_interrupted<T>(work: impl Future<Output = T>) -> Result<T, CliError> {
    tokio::select! {
        // Cancel safe: `work` is not polled again, its drop cleans up.
        done = work => Ok(done),
        _ = tokio::signal::ctrl_c() => Err(CliError::usage("interrupted", "what was started has been taken down")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_by_word() {
        let shown = |text: &str| node(text).map(|node| format!("{} {}", node.name, node.allocatable)).ok();
        assert_eq!(shown("a").as_deref(), Some("a cpu=4,memory=2Gi"));
        assert_eq!(shown("a=cpu=1,memory=1Gi").as_deref(), Some("a cpu=1,memory=1Gi"));
        assert_eq!(shown("=cpu=1"), None);
        assert_eq!(shown("a="), None);
    }
}
