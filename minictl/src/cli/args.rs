//! The command line.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use minipod_proto::v1::Time;

use super::cp::Side;
use super::forward::Ports;
use super::resize::Amounts;
use super::store::StoreCommand;

/// minictl: pods on a cluster of Linux machines.
#[derive(Debug, Parser)]
#[command(name = "minictl", version, propagate_version = true, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Debug, Clone, Default, Args)]
pub struct Global {
    /// Address of the API server, such as http://10.0.0.1:7650; several, separated by commas.
    #[arg(long, global = true, value_name = "URL", env = "MINIPOD_SERVER", help_heading = "Connection")]
    pub server: Option<String>,
    /// Namespace [default: that of the context, else default].
    #[arg(short, long, global = true, value_name = "NAME", help_heading = "Connection")]
    pub namespace: Option<String>,
    /// Context of the configuration file; goes before MINIPOD_SERVER.
    #[arg(long, global = true, value_name = "NAME", help_heading = "Connection")]
    pub context: Option<String>,
    /// Configuration file [default: ~/.config/minipod/config.yaml].
    #[arg(long, global = true, value_name = "FILE", env = "MINIPOD_CONFIG", help_heading = "Connection")]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make the objects of manifests be as the manifests say.
    Apply(ApplyArgs),
    /// Create the objects of manifests.
    Create(CreateArgs),
    /// Show objects.
    Get(GetArgs),
    /// Show an object in detail, with its events.
    Describe(TargetArgs),
    /// Say why a pod is pending, or not ready.
    Why {
        /// The pod.
        pod: String,
        /// wide: every node, however many there are; json: what the scheduler answers.
        #[arg(short, long, value_enum)]
        output: Option<Verbosity>,
    },
    /// Say where pods would go, without creating them.
    Fit(FitArgs),
    /// Change CPU and memory of a running pod's container, without a restart unless its resizePolicy asks for one.
    Resize(ResizeArgs),
    /// Delete objects.
    Delete(DeleteArgs),
    /// Print the logs of a container.
    Logs(LogsArgs),
    /// Run a command in a container; its exit code becomes that of minictl.
    Exec(ExecArgs),
    /// Take part in the streams of a container's own process: its output from now on, with -i its input.
    Attach(AttachArgs),
    /// Copy files into a container, or out of it: minictl cp POD:/PATH FILE. The image needs no tar for it.
    Cp(CopyArgs),
    /// Add a debug container to a running pod: an image of yours beside its containers, that is never restarted and never removed.
    Debug(DebugArgs),
    /// Listen here, and carry each connection to a port of a pod's localhost.
    PortForward(ForwardArgs),
    /// Images in the nodes' stores.
    #[command(subcommand)]
    Image(ImageCommand),
    /// Nodes.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Take nodes out of scheduling; their pods stay.
    Cordon {
        /// The nodes.
        #[arg(required = true)]
        nodes: Vec<String>,
    },
    /// Give nodes back to scheduling.
    Uncordon {
        /// The nodes.
        #[arg(required = true)]
        nodes: Vec<String>,
    },
    /// End pods, if their disruption budgets allow that now. Nothing makes them anew.
    Evict(EvictArgs),
    /// Take nodes out of scheduling and evict their pods as the disruption budgets allow it; wait until they are gone.
    Drain(DrainArgs),
    /// The configuration file with its contexts.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Look after the store: its status, snapshots, damage, what to restore.
    #[command(subcommand)]
    Store(StoreCommand),
    /// Start a cluster on this machine (needs root) and leave it running.
    Up(UpArgs),
    /// End the clusters that `up` or `demo --keep` left running, and remove what crashed ones left.
    Down,
    /// Start a cluster on this machine, show what a pod is with the examples, take everything down (needs root).
    Demo(DemoArgs),
    /// Print the versions of minictl and of the nodes.
    Version,
    /// Print a completion script: source <(minictl completion bash).
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// A manifest, a directory of manifests (*.yaml, *.yml, *.json) or - for standard input; may be given several times.
    #[arg(short, long = "filename", required = true, value_name = "FILE")]
    pub files: Vec<String>,
    /// Let the server check everything, and store nothing.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    #[command(flatten)]
    pub sources: ApplyArgs,
    /// How to print what was created [default: one line each].
    #[arg(short, long, value_enum)]
    pub output: Option<Output>,
}

/// How much of an answer is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Verbosity {
    /// Every node.
    Wide,
    /// JSON.
    Json,
}

#[derive(Debug, Args)]
pub struct FitArgs {
    /// A manifest with pods, a directory of manifests or - for standard input; may be given several times.
    #[arg(short, long = "filename", required = true, value_name = "FILE")]
    pub files: Vec<String>,
    /// How many copies of all these pods.
    #[arg(short = 'n', long, default_value_t = 1, value_name = "NUMBER", value_parser = clap::value_parser!(i32).range(1..=10_000))]
    pub copies: i32,
    /// Namespace [default: that of the context, else default]. Without the short form here: -n is the number.
    #[arg(long, value_name = "NAME", help_heading = "Connection")]
    pub namespace: Option<String>,
    /// wide: every node against the first pod that does not fit; json: everything.
    #[arg(short, long, value_enum)]
    pub output: Option<Verbosity>,
}

/// How objects are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table with more columns.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// kind/name, one per line.
    Name,
}

/// What of a kind is selected.
#[derive(Debug, Clone, Default, Args)]
pub struct SelectArgs {
    /// In all namespaces.
    #[arg(short = 'A', long)]
    pub all_namespaces: bool,
    /// Label selector, such as app=web,tier!=db or 'env in (a,b)'.
    #[arg(short = 'l', long, value_name = "SELECTOR", default_value = "", hide_default_value = true)]
    pub selector: String,
    /// Field selector, such as spec.nodeName=node-a or status.phase=Pending.
    #[arg(long, value_name = "SELECTOR", default_value = "", hide_default_value = true)]
    pub field_selector: String,
}

#[derive(Debug, Args)]
pub struct TargetArgs {
    /// KIND, KIND NAME…, KIND/NAME…, or KIND,KIND.
    #[arg(required = true, value_name = "KIND [NAME]")]
    pub targets: Vec<String>,
    #[command(flatten)]
    pub select: SelectArgs,
}

#[derive(Debug, Args)]
pub struct GetArgs {
    #[command(flatten)]
    pub target: TargetArgs,
    /// How to print them [default: a table].
    #[arg(short, long, value_enum)]
    pub output: Option<Output>,
    /// Go on and print every change.
    #[arg(short, long)]
    pub watch: bool,
    /// No line of titles.
    #[arg(long)]
    pub no_headers: bool,
    /// Labels as the last column.
    #[arg(long)]
    pub show_labels: bool,
}

#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// KIND NAME…, KIND/NAME…, or KIND with -l or --all.
    #[arg(value_name = "KIND [NAME]", required_unless_present = "files")]
    pub targets: Vec<String>,
    #[command(flatten)]
    pub select: SelectArgs,
    /// The objects of a manifest, a directory of manifests or - (standard input).
    #[arg(short, long = "filename", value_name = "FILE", conflicts_with = "targets")]
    pub files: Vec<String>,
    /// All objects of the kind in the namespace.
    #[arg(long)]
    pub all: bool,
    /// Seconds between TERM and KILL [default: the pod's own].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(i64).range(0..))]
    pub grace_period: Option<i64>,
    /// Remove the objects at once, whatever their nodes do.
    #[arg(long, conflicts_with = "grace_period")]
    pub force: bool,
    /// Wait until they are gone.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub wait: bool,
    /// How long to wait at most, such as 30s or 2m [default: without end].
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub timeout: Option<Duration>,
    /// What is not there is no error.
    #[arg(long)]
    pub ignore_not_found: bool,
}

#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// The pod.
    pub pod: String,
    /// The container [default: as with logs].
    #[arg(short, long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub container: String,
    /// REQUEST, REQUEST:LIMIT or :LIMIT, such as 500m or 500m:2. A limit that is equal to its request follows it.
    #[arg(long, value_name = "CPU", required_unless_present = "memory")]
    pub cpu: Option<Amounts>,
    /// REQUEST, REQUEST:LIMIT or :LIMIT, such as 256Mi or 256Mi:1Gi.
    #[arg(long, value_name = "MEMORY")]
    pub memory: Option<Amounts>,
    /// Let the server check everything but the node's room, and store nothing.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct EvictArgs {
    /// The pods.
    #[arg(required = true)]
    pub pods: Vec<String>,
    /// Seconds between TERM and KILL [default: the pod's own].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(i64).range(0..))]
    pub grace_period: Option<i64>,
    /// Ask the budgets, and end nothing.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct DrainArgs {
    /// The nodes.
    #[arg(required = true)]
    pub nodes: Vec<String>,
    /// Only the pods with these labels, such as app=web.
    #[arg(short = 'l', long, value_name = "SELECTOR", default_value = "", hide_default_value = true)]
    pub selector: String,
    /// Seconds between TERM and KILL [default: each pod's own].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(i64).range(0..))]
    pub grace_period: Option<i64>,
    /// Also pods with emptyDir volumes: what is in them is lost.
    #[arg(long)]
    pub delete_emptydir_data: bool,
    /// How long to wait at most, such as 30s or 2m [default: without end].
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub timeout: Option<Duration>,
    /// Say which pods would be evicted, and change nothing.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The pod.
    pub pod: Option<String>,
    /// Of the pods with these labels instead, such as app=web.
    #[arg(short = 'l', long, value_name = "SELECTOR", default_value = "", hide_default_value = true)]
    pub selector: String,
    /// Of every container, init containers first.
    #[arg(long, conflicts_with = "container")]
    pub all_containers: bool,
    /// Every line begins with its pod and container.
    #[arg(long)]
    pub prefix: bool,
    /// How many logs may be followed at once.
    #[arg(long, value_name = "NUMBER", default_value_t = 5)]
    pub max_log_requests: usize,
    /// The container [default: that of the annotation kubectl.kubernetes.io/default-container, else the first].
    #[arg(short, long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub container: String,
    /// Go on as it grows.
    #[arg(short, long)]
    pub follow: bool,
    /// Of the run before the present one.
    #[arg(short, long)]
    pub previous: bool,
    /// Only the last lines; -1: all [default: 10 of each with -l, else all].
    #[arg(long, value_name = "LINES", allow_hyphen_values = true, value_parser = clap::value_parser!(i64).range(-1..))]
    pub tail: Option<i64>,
    /// Only what is newer than this, such as 30s, 5m or 2h.
    #[arg(long, value_parser = duration, value_name = "DURATION")]
    pub since: Option<Duration>,
    /// Only what is newer than this moment, such as 2026-01-31T12:00:00Z.
    #[arg(long, value_name = "TIME", conflicts_with = "since")]
    pub since_time: Option<Time>,
    /// Every line with its time.
    #[arg(long)]
    pub timestamps: bool,
    /// At most so many bytes.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(i64).range(1..))]
    pub limit_bytes: Option<i64>,
    /// To a terminal too, pass every byte as it is. Without this, control characters other than colours are shown instead of obeyed.
    #[arg(long)]
    pub raw: bool,
}

#[derive(Debug, Args)]
pub struct ForwardArgs {
    /// The pod.
    pub pod: String,
    /// LOCAL:REMOTE, REMOTE (the same here), or :REMOTE (any free port here).
    #[arg(required = true, value_name = "[LOCAL:]REMOTE")]
    pub ports: Vec<Ports>,
    /// Where to listen. Beyond localhost, everybody who reaches this machine reaches the pod.
    #[arg(long, value_name = "ADDRESS", default_value = "localhost", value_parser = super::forward::address)]
    pub address: IpAddr,
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    /// The pod.
    pub pod: String,
    /// The container [default: as with logs].
    #[arg(short, long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub container: String,
    /// Pass standard input on.
    #[arg(short = 'i', long)]
    pub stdin: bool,
    /// Give the command a terminal; needs -i, and standard input to be one.
    #[arg(short = 't', long)]
    pub tty: bool,
    /// The command and its arguments, after --.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct AttachArgs {
    /// The pod.
    pub pod: String,
    /// The container [default: as with logs].
    #[arg(short, long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub container: String,
    /// Pass standard input on; the container's manifest needs stdin: true.
    #[arg(short = 'i', long)]
    pub stdin: bool,
    /// Expect a terminal; a container whose manifest has tty: true is attached to as one in any case.
    #[arg(short = 't', long)]
    pub tty: bool,
}

#[derive(Debug, Args)]
pub struct CopyArgs {
    /// [NAMESPACE/]POD:/PATH, or a file or directory here.
    #[arg(value_name = "FROM", value_parser = Side::parse)]
    pub from: Side,
    /// The other side. A directory that exists takes it under its own name; FROM ending in /. stands for a directory's content.
    #[arg(value_name = "TO", value_parser = Side::parse)]
    pub to: Side,
    /// The container [default: as with logs].
    #[arg(short, long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub container: String,
}

#[derive(Debug, Args)]
pub struct DebugArgs {
    /// The pod.
    pub pod: String,
    /// The image of the debug container.
    #[arg(long, value_name = "IMAGE")]
    pub image: String,
    /// Whether the node asks a registry: IfNotPresent, Always or Never.
    #[arg(long, value_name = "POLICY", default_value = "IfNotPresent", value_parser = ["IfNotPresent", "Always", "Never"])]
    pub image_pull_policy: String,
    /// Its name [default: debugger- and five letters].
    #[arg(short, long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub container: String,
    /// Among the processes of this container.
    #[arg(long, value_name = "CONTAINER", default_value = "", hide_default_value = true)]
    pub target: String,
    /// Attach, with standard input.
    #[arg(short = 'i', long)]
    pub stdin: bool,
    /// With a terminal.
    #[arg(short = 't', long)]
    pub tty: bool,
    /// Attach to it [default: with -i].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub attach: Option<bool>,
    /// A variable of its environment, NAME=VALUE; may be given several times.
    #[arg(long = "env", value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// general: with the right to trace processes (SYS_PTRACE); sysadmin: privileged; restricted: as nobody special, without capabilities.
    #[arg(long, value_enum, default_value_t = Profile::General)]
    pub profile: Profile,
    /// What it runs instead of the image's command, after --.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// What a debug container may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// SYS_PTRACE beside the default capabilities.
    General,
    /// Everything.
    Sysadmin,
    /// Nothing, and not as root.
    Restricted,
}

#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Load an image archive (OCI layout, docker save, or a plain root file system, as tar) into nodes.
    Load {
        /// The archive, - for standard input.
        file: PathBuf,
        /// A node; may be given several times [default: every ready one].
        #[arg(long = "node", value_name = "NAME")]
        nodes: Vec<String>,
        /// The image's name; needed for a plain root file system.
        #[arg(long, default_value = "", hide_default_value = true)]
        name: String,
        /// A word of the entrypoint of a plain root file system; may be given several times.
        #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
        entrypoint: Vec<String>,
    },
    /// Write an image to a file: an OCI layout that docker and podman load too.
    Save {
        /// Its name, or its digest.
        image: String,
        /// The file, - for standard output.
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// A node to take it from; may be given several times [default: any that is ready and has it].
        #[arg(long = "node", value_name = "NAME")]
        nodes: Vec<String>,
    },
    /// Take names from images, and remove those that have no other; one that a pod uses stays.
    #[command(name = "rm", alias = "remove")]
    Remove {
        /// Names, or digests.
        #[arg(required = true)]
        images: Vec<String>,
        /// A node; may be given several times [default: every ready one].
        #[arg(long = "node", value_name = "NAME")]
        nodes: Vec<String>,
    },
    /// Remove images that no pod of their node uses and whose names have moved to newer ones.
    Prune {
        /// A node; may be given several times [default: every ready one].
        #[arg(long = "node", value_name = "NAME")]
        nodes: Vec<String>,
        /// Those that have a name too. Images that were loaded, and that no registry has, must be loaded again.
        #[arg(short, long)]
        all: bool,
    },
    /// List the images.
    #[command(alias = "list")]
    Ls {
        /// A node; may be given several times [default: every ready one].
        #[arg(long = "node", value_name = "NAME")]
        nodes: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// The same as `get nodes`.
    #[command(alias = "ls")]
    List {
        /// How to print them [default: a table].
        #[arg(short, long, value_enum)]
        output: Option<Output>,
    },
    /// Take nodes out of scheduling; their pods stay.
    Cordon {
        /// The nodes.
        #[arg(required = true)]
        nodes: Vec<String>,
    },
    /// Give nodes back to scheduling.
    Uncordon {
        /// The nodes.
        #[arg(required = true)]
        nodes: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the configuration file.
    View,
    /// Print the name of the context in use.
    CurrentContext,
    /// List the contexts.
    GetContexts,
    /// Use another context from now on.
    UseContext {
        /// Its name.
        name: String,
    },
    /// Create or change a context (with --server and --namespace).
    SetContext {
        /// Its name.
        name: String,
    },
    /// Remove a context.
    DeleteContext {
        /// Its name.
        name: String,
    },
}

#[derive(Debug, Args)]
pub struct UpArgs {
    /// Where the binaries of minipod are [default: beside minictl].
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// A node as NAME or NAME=RESOURCES, such as node-a=cpu=2,memory=2Gi; may be given several times [default: node-a, node-b].
    #[arg(long = "node", value_name = "NODE")]
    pub nodes: Vec<String>,
    /// How many API servers: with three or more any one may die.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=7))]
    pub apiservers: u8,
    /// How many schedulers.
    #[arg(long, default_value_t = 1)]
    pub schedulers: usize,
    /// Where objects are kept.
    #[arg(long, value_enum, default_value = "embedded")]
    pub store: StoreArg,
    /// A directory of image archives (*.tar) to load.
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StoreArg {
    /// Debian's etcd.
    Etcd,
    /// The API servers' own.
    Embedded,
}

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Leave the cluster up.
    #[arg(long)]
    pub keep: bool,
    /// No pauses for reading.
    #[arg(long)]
    pub fast: bool,
    /// Where the binaries of minipod are [default: beside minictl].
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// The image archives that `cargo xtask images` builds.
    #[arg(long, value_name = "DIR", default_value = "target/images")]
    pub images: PathBuf,
    /// The example manifests.
    #[arg(long, value_name = "DIR", default_value = "deploy/examples")]
    pub examples: PathBuf,
}

/// `90`, `90s`, `5m`, `1h30m`: kubectl's durations, in whole seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?}: want a duration such as 30s, 5m or 1h30m");
    let mut seconds = 0_u64;
    let mut number = String::new();
    for c in text.chars() {
        let unit = match c {
            '0'..='9' => {
                number.push(c);
                continue;
            }
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return Err(wrong()),
        };
        let count: u64 = number.parse().map_err(|_| wrong())?;
        seconds = count.checked_mul(unit).and_then(|more| seconds.checked_add(more)).ok_or_else(wrong)?;
        number.clear();
    }
    if !number.is_empty() {
        let rest: u64 = number.parse().map_err(|_| wrong())?;
        // A bare number is seconds; one after a unit is a mistake.
        if seconds > 0 {
            return Err(wrong());
        }
        seconds = rest;
    } else if text.is_empty() {
        return Err(wrong());
    }
    // The API counts seconds in 63 bits.
    if i64::try_from(seconds).is_err() { Err(wrong()) } else { Ok(Duration::from_secs(seconds)) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations() {
        for (text, seconds) in [("90", 90), ("0s", 0), ("5m", 300), ("1h30m", 5400), ("2d", 172_800)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in ["", "m", "5x", "1h30", "-5s", "99999999999999999999s", "18446744073709551615", "9e9"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn fit_has_n_for_the_number_and_keeps_the_namespace() {
        let cli = Cli::try_parse_from(["minictl", "fit", "-f", "x", "-n", "40", "--namespace", "other"]);
        let cli = cli.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(cli.global.namespace.as_deref(), Some("other"));
        assert!(matches!(cli.command, Command::Fit(FitArgs { copies: 40, .. })));
        let cli = Cli::try_parse_from(["minictl", "-n", "first", "fit", "-f", "x"]).expect("it parses");
        assert_eq!(cli.global.namespace.as_deref(), Some("first"));
        assert!(Cli::try_parse_from(["minictl", "fit", "-f", "x", "-n", "0"]).is_err());
    }

    #[test]
    fn wait_is_a_switch_with_a_value() {
        let parse = |words: &[&str]| match Cli::try_parse_from(words).map(|cli| cli.command) {
            Ok(Command::Delete(delete)) => Ok(delete.wait),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.to_string()),
        };
        assert_eq!(parse(&["minictl", "delete", "pod", "a"]), Ok(true));
        assert_eq!(parse(&["minictl", "delete", "pod", "a", "--wait=false"]), Ok(false));
        assert!(parse(&["minictl", "delete", "pod", "a", "--force", "--grace-period=3"]).is_err());
        assert!(parse(&["minictl", "delete"]).is_err());
    }
}
