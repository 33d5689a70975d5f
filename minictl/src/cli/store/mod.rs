//! `minictl store …`: what an operator does with the store of a cluster.
//!
//! `status` asks the API; everything else needs the store itself: a running member over its own protocol (the API server's
//! `--store-listen`, a `minipod-store` or an etcd), or its files.

mod status;

use std::fs::File;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use minipod_store::members::{Members, parse_members};
use minipod_store::peer::tls::{PeerTls, TlsFiles};
use minipod_store::remote::Remote;
use minipod_store::service::Cluster;
use minipod_store::tool;

use super::args::Global;
use super::error::CliError;
use super::print;

/// The API servers of one cluster call it so; members that are restored must, too.
const CLUSTER_TOKEN: &str = "minipod";

#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Show the members: who leads, how far and how full each is, and what is wrong.
    Status {
        #[command(flatten)]
        at: Optional,
        /// How to print it [default: a table].
        #[arg(short, long, value_enum)]
        output: Option<StatusOutput>,
    },
    /// Save everything that a running store holds into a file, and check the file.
    ///
    /// The file is etcd's own form: `minictl store restore` and `etcdctl snapshot restore` both take it. It holds the Secrets in the clear.
    Snapshot {
        /// The file to make; one that is there is replaced when the new one is whole.
        file: PathBuf,
        #[command(flatten)]
        at: One,
    },
    /// Check every record and snapshot of a data directory, or a saved snapshot, restore it in memory and print its hash. Changes nothing.
    Verify {
        /// The data directory of a store that is not running, or a saved snapshot.
        path: PathBuf,
        /// Compare the hash with that of a running member at the same revision: HOST:PORT.
        #[arg(long, value_name = "ENDPOINT")]
        against: Option<String>,
        #[command(flatten)]
        tls: Tls,
    },
    /// Make a data directory from a saved snapshot, of this store or of an etcd, for API servers to start with.
    ///
    /// With --peers, do it for every member with the same snapshot.
    Restore {
        /// The saved snapshot.
        snapshot: PathBuf,
        /// The directory to make.
        #[arg(long, value_name = "DIR")]
        data_dir: PathBuf,
        /// The members, as for the API servers: name=https://host:port,…
        #[arg(long, value_name = "LIST", value_parser = parse_members, requires = "name")]
        peers: Option<Members>,
        /// Which of --peers this one is.
        #[arg(long, requires = "peers")]
        name: Option<String>,
        /// Move the revision on by so much and compact what was before, so that everybody who has seen what is lost lists anew; 0 keeps
        /// the snapshot's revision.
        #[arg(long, value_name = "NUMBER", default_value_t = 1_000_000_000)]
        bump_revision: u32,
    },
    /// Print every record of the log of a data directory, one a line.
    Dump {
        /// The data directory.
        data_dir: PathBuf,
    },
}

/// How a status is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StatusOutput {
    /// JSON.
    Json,
}

/// Members to ask instead of the API.
#[derive(Debug, Args)]
pub struct Optional {
    /// Members of the store to ask instead of the API server: HOST:PORT,… (its --store-listen, a minipod-store, an etcd).
    #[arg(long, value_name = "LIST", value_delimiter = ',', env = "MINIPOD_STORE_ENDPOINTS")]
    endpoints: Vec<String>,
    #[command(flatten)]
    tls: Tls,
}

/// The one member to ask.
#[derive(Debug, Args)]
pub struct One {
    /// A member of the store: HOST:PORT (the API server's --store-listen, a minipod-store, an etcd).
    #[arg(long, value_name = "ENDPOINT", env = "MINIPOD_STORE_ENDPOINTS", default_value = "127.0.0.1:2379")]
    endpoints: String,
    #[command(flatten)]
    tls: Tls,
}

/// TLS with the store.
#[derive(Debug, Args)]
pub struct Tls {
    /// The PEM certificate to show to the store; the three files belong together.
    #[arg(long, value_name = "FILE", env = "MINIPOD_STORE_CERT")]
    store_cert: Option<PathBuf>,
    /// Its PEM key.
    #[arg(long, value_name = "FILE", env = "MINIPOD_STORE_KEY")]
    store_key: Option<PathBuf>,
    /// The PEM certificate of the authority whose certificate the store must show.
    #[arg(long, value_name = "FILE", env = "MINIPOD_STORE_CACERT")]
    store_cacert: Option<PathBuf>,
}

impl Tls {
    fn load(&self) -> Result<Option<PeerTls>, CliError> {
        let flags = ["--store-cert", "--store-key", "--store-cacert"];
        let (cert, key, ca) = (self.store_cert.clone(), self.store_key.clone(), self.store_cacert.clone());
        let files = TlsFiles::from_three(flags, cert, key, ca).map_err(minipod_store::remote::RemoteError::from)?;
        let tls = files.as_ref().map(PeerTls::load).transpose();
        Ok(tls.map_err(minipod_store::remote::RemoteError::from)?)
    }
}

/// Does what was asked.
pub async fn run(global: &Global, command: StoreCommand) -> Result<(), CliError> {
    match command {
        StoreCommand::Status { at, output } => {
            let told = if at.endpoints.is_empty() {
                status::from_api(global).await?
            } else {
                status::from_members(&at.endpoints, at.tls.load()?.as_ref()).await
            };
            let text = if output.is_some() { told.json() } else { told.table() };
            print(&text)?;
            told.outcome()
        }
        StoreCommand::Snapshot { file, at } => snapshot(&file, &at).await,
        StoreCommand::Verify { path, against, tls } => verify(&path, against.as_deref(), &tls).await,
        StoreCommand::Restore { snapshot, data_dir, peers, name, bump_revision } => {
            restore(&snapshot, &data_dir, peers, name, bump_revision)
        }
        StoreCommand::Dump { data_dir } => {
            // The reader may go away (`| head`): what could not be printed is told once, at the end.
            let mut printed = Ok(());
            tool::dump(&data_dir, &mut |line| {
                if printed.is_ok() {
                    printed = print(&format!("{line}\n"));
                }
            })?;
            printed
        }
    }
}

async fn snapshot(file: &Path, at: &One) -> Result<(), CliError> {
    if at.endpoints.contains(',') {
        return Err(CliError::usage(
            format!("--endpoints {:?} names several members", at.endpoints),
            "a snapshot comes from one member: name one HOST:PORT",
        ));
    }
    let saved = Remote::new(&at.endpoints, at.tls.load()?.as_ref()).await?.save(file).await?;
    // A backup that was never read is none.
    let report = tool::verify_saved(file)?;
    print(&format!(
        "saved {}: {} bytes, revision {}, {} keys, hash {}\n",
        file.display(),
        saved.bytes,
        report.revision,
        report.keys,
        report.hash
    ))
}

async fn verify(path: &Path, against: Option<&str>, tls: &Tls) -> Result<(), CliError> {
    // Opened here, so that a path that is not there is told as such.
    let found = File::open(path).and_then(|file| file.metadata()).map_err(CliError::file("open", path))?;
    let (text, revision, compacted, hash) = if found.is_dir() {
        let report = tool::verify(path)?;
        (report.to_string(), report.revision, report.compacted, report.hash)
    } else {
        let report = tool::verify_saved(path)?;
        if !report.is_checked {
            note!("{}: this copy of a database has no digest: damage inside of values would not show", path.display());
        }
        (report.to_string(), report.revision, report.compacted, report.hash)
    };
    print(&format!("{text}\n"))?;
    let Some(endpoint) = against else { return Ok(()) };
    let remote = Remote::new(endpoint, tls.load()?.as_ref()).await?;
    if !remote.status().await?.is_ours() {
        return Err(CliError::usage(
            format!("--against {endpoint}: an etcd answers there, whose hashes are of another kind"),
            "compare with a minipod-store or an API server's --store-listen",
        ));
    }
    let there = remote.hash(revision).await?;
    if there.compacted != compacted {
        return Err(CliError::usage(
            format!(
                "--against {endpoint}: it was compacted at {} and this at {compacted}, so that the hashes cannot be equal",
                there.compacted
            ),
            "save a snapshot and compare it at once, before the history is compacted again",
        ));
    }
    if there.hash != hash {
        return Err(CliError::Differs { endpoint: endpoint.to_owned(), revision, here: hash, there: there.hash });
    }
    print(&format!("equal to {endpoint} at revision {revision}\n"))
}

fn restore(
    snapshot: &Path,
    data_dir: &Path,
    peers: Option<Members>,
    name: Option<String>,
    bump_revision: u32,
) -> Result<(), CliError> {
    let name = name.unwrap_or_else(|| "default".to_owned());
    let is_alone = peers.is_none();
    let cluster = match peers {
        Some(members) => Cluster::New { members, token: CLUSTER_TOKEN.to_owned() },
        None => Cluster::Alone { peer_urls: Vec::new() },
    };
    let revision = tool::restore(snapshot, data_dir, &name, &cluster, bump_revision)?;
    print(&format!("restored {} at revision {revision}\n", data_dir.display()))?;
    let more = if is_alone {
        String::new()
    } else {
        format!(" --name={name} --peers=…, and the same on every other member")
    };
    note!("start it with: minipod-apiserver --store=embedded --data-dir={}{more}", data_dir.display());
    Ok(())
}
