//! `minipod-scheduler sim`: flags, what is printed, files.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::{Value, json};

use super::chart::Chart;
use super::engine::{DecisionTime, Span};
use super::job::{Amounts, SECOND_US, Workload};
use super::read;
use super::strategy::{self, Options};
use super::study::{self, Setup};
use super::workload::{lublin, mix};
use super::{figures, table};
use crate::plan::Profile;

/// Compares placement strategies in virtual time. Nothing is contacted; the same flags give the same figures.
#[derive(Debug, Args)]
#[command(after_help = after_help())]
pub struct Sim {
    #[command(subcommand)]
    study: Study,
}

fn after_help() -> String {
    let lines: Vec<String> = strategy::ALL.iter().map(|(name, what, _)| format!("  {name:<16} {what}")).collect();
    format!(
        "Strategies:\n{}\n\nThe page docs/scheduling-strategies.md shows and explains the plots of `sim all`.",
        lines.join("\n")
    )
}

#[derive(Debug, Subcommand)]
enum Study {
    /// Rigid parallel jobs after the model of Lublin and Feitelson (2003).
    Rigid(Rigid),
    /// Services and batch: conflicts and busyness over decision time and number of schedulers.
    Mix(Mix),
    /// App + LogCollector on Node_A and Node_B: how many interleavings end stuck.
    TwoNode(TwoNode),
    /// How well minipod's profiles fill nodes, beside first fit and chance.
    Packing(Packing),
    /// Rigid jobs of a log in the Standard Workload Format.
    Swf(Swf),
    /// Pods and nodes of CSV files as GPU clusters publish them: the strategies, and packing.
    Trace(Trace),
    /// Everything that docs/scheduling-strategies.md shows.
    All(Common),
}

#[derive(Debug, Clone, Args)]
struct Common {
    /// Strategies, separated by commas; those that the study is about by default.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    strategies: Vec<String>,
    /// Everything random comes from this number.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Schedulers side by side, for the optimistic strategies and minipod (1 to 32).
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=32))]
    schedulers: u16,
    /// Seconds that a scheduler takes for each try at a job (Omega's paper: 0.1).
    #[arg(long, default_value = "0.1", value_parser = seconds)]
    job_decision: u64,
    /// Seconds for each try at a service; as for any job by default.
    #[arg(long, value_parser = seconds)]
    service_decision: Option<u64>,
    /// Seconds for each unit (task, pod) of the job beside that (Omega's paper: 0.005).
    #[arg(long, default_value = "0.005", value_parser = seconds)]
    unit_decision: u64,
    /// Seconds after which hoard-timeout gives back; 600, or 30 for two-node, by default.
    #[arg(long, value_parser = seconds)]
    hoard_timeout: Option<u64>,
    /// Seconds after which minipod keeps nodes for who waits.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    hold_after: u32,
    /// Which nodes minipod's core prefers: pack or spread.
    #[arg(long, default_value = "spread")]
    profile: Profile,
    /// Write all figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write charts (SVG) to this directory, which is made if need be.
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Rigid {
    /// Nodes, each of which runs one unit of a job.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(8..=16_384))]
    nodes: u32,
    /// Jobs.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    jobs: u32,
    /// Work that comes over what the nodes can do.
    #[arg(long, default_value = "0.9", value_parser = load)]
    load: f64,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Mix {
    /// Nodes of 32 CPUs and 128 GiB.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    nodes: u32,
    /// Jobs.
    #[arg(long, default_value_t = 6_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    jobs: u32,
    /// Work that comes over what the nodes can do.
    #[arg(long, default_value = "0.7", value_parser = load)]
    load: f64,
    /// Seconds that a decision on a service takes, in turn; services have a scheduler of their own.
    #[arg(long, value_delimiter = ',', default_values = ["0.1", "0.3", "1", "3", "10", "30", "100"], value_parser = seconds)]
    service_decisions: Vec<u64>,
    /// Numbers of schedulers, in turn, each of which takes --slow-decision for every job.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16, 32], value_parser = clap::value_parser!(u16).range(1..=32))]
    scheduler_counts: Vec<u16>,
    /// Seconds for each try at a job when schedulers are many: so long that one cannot keep up.
    #[arg(long, default_value = "10", value_parser = seconds)]
    slow_decision: u64,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct TwoNode {
    /// Numbers of pairs that come at the same moment.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4], value_parser = clap::value_parser!(u16).range(1..=100))]
    pairs: Vec<u16>,
    /// Interleavings for each.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    runs: u64,
    /// Seconds after which a run is over.
    #[arg(long, default_value = "3600", value_parser = seconds)]
    limit: u64,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Packing {
    /// Nodes of 32 CPUs and 128 GiB.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    nodes: u32,
    /// Pods that are drawn from, and that are packed onto as few nodes as possible.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pods: u32,
    /// Orders of the pods; figures are means.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1_000))]
    runs: u64,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Swf {
    /// The log.
    file: PathBuf,
    /// Nodes; what the log's header says by default.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    nodes: Option<u32>,
    /// Of the log's jobs, so many from the beginning.
    #[arg(long, value_name = "COUNT")]
    first: Option<usize>,
    /// Space the arrivals so that the load is this; as in the log by default.
    #[arg(long, value_parser = load)]
    load: Option<f64>,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Trace {
    /// CSV of nodes: cpu_milli, memory_mib, gpu; or cpu_num, gpu_capacity_num.
    #[arg(long, value_name = "FILE")]
    node_list: PathBuf,
    /// CSV of pods: cpu_milli, memory_mib, num_gpu, gpu_milli; or cpu_request, memory_request, gpu_request.
    #[arg(long, value_name = "FILE")]
    pod_list: PathBuf,
    /// Of the nodes, so many from the beginning: fewer make the cluster fuller.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    nodes: Option<u32>,
    /// Orders of the pods for packing; figures are means.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1_000))]
    runs: u64,
    #[command(flatten)]
    common: Common,
}

/// Seconds to microseconds.
fn seconds(text: &str) -> Result<u64, String> {
    let value = text.parse::<f64>().ok().filter(|value| (0.0..=1e9).contains(value));
    value
        .map(|value| (value * SECOND_US as f64) as u64)
        .ok_or_else(|| format!("{text:?}: want seconds from 0, such as 0.1"))
}

fn load(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| *value > 0.0 && *value <= 100.0);
    value.ok_or_else(|| format!("{text:?}: want a share above 0, such as 0.9"))
}

/// What a study has found.
struct Findings {
    text: String,
    json: Value,
    charts: Vec<Chart>,
}

/// Runs a study, prints its table and writes its files.
///
/// # Errors
/// What is wrong with the flags or a file.
pub fn run(sim: Sim) -> Result<(), String> {
    let (findings, common) = match sim.study {
        Study::Rigid(study) => (study.run()?, study.common),
        Study::Mix(study) => (study.run()?, study.common),
        Study::TwoNode(study) => (study.run()?, study.common),
        Study::Packing(study) => (study.run()?, study.common),
        Study::Swf(study) => (study.run()?, study.common),
        Study::Trace(study) => (study.run()?, study.common),
        Study::All(common) => (all(&common)?, common),
    };
    print!("{}", findings.text);
    if let Some(file) = &common.json {
        let text = serde_json::to_string_pretty(&findings.json).map_err(|error| error.to_string())?;
        write(file, &(text + "\n"))?;
    }
    if let Some(directory) = &common.plots {
        fs::create_dir_all(directory)
            .map_err(|error| format!("make the directory {}: {error}", directory.display()))?;
        for (name, chart) in &findings.charts {
            write(&directory.join(format!("{name}.svg")), chart)?;
        }
    }
    Ok(())
}

fn write(file: &Path, text: &str) -> Result<(), String> {
    fs::write(file, text).map_err(|error| format!("write {}: {error}", file.display()))
}

fn read_file(file: &Path) -> Result<String, String> {
    fs::read_to_string(file).map_err(|error| format!("read {}: {error}", file.display()))
}

/// All studies with their defaults, under the flags that they share.
fn all(common: &Common) -> Result<Findings, String> {
    let common = || common.clone();
    let rigid = Rigid { nodes: 256, jobs: 500, load: 0.9, common: common() }.run()?;
    let service_decisions = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0].map(|at| (at * SECOND_US as f64) as u64).to_vec();
    let (scheduler_counts, slow_decision) = (vec![1, 2, 4, 8, 16, 32], 10 * SECOND_US);
    let mix = Mix {
        nodes: 100,
        jobs: 6_000,
        load: 0.7,
        service_decisions,
        scheduler_counts,
        slow_decision,
        common: common(),
    }
    .run()?;
    let two_node = TwoNode { pairs: vec![1, 2, 4], runs: 1_000, limit: 3_600 * SECOND_US, common: common() }.run()?;
    let packing = Packing { nodes: 100, pods: 2_000, runs: 10, common: common() }.run()?;
    let studies = [two_node, rigid, mix, packing];
    Ok(Findings {
        text: studies.iter().map(|one| one.text.as_str()).collect::<Vec<_>>().join("\n"),
        json: Value::Array(studies.iter().map(|one| one.json.clone()).collect()),
        charts: studies.into_iter().flat_map(|one| one.charts).collect(),
    })
}

impl Common {
    /// With these strategies where none are named.
    fn setup(&self, by_default: &[&str], hoard_timeout_us: u64) -> Result<Setup, String> {
        let mut strategies = self.strategies.clone();
        if strategies.is_empty() {
            strategies = by_default.iter().map(|name| (*name).to_owned()).collect();
        }
        for name in &strategies {
            strategy::find(name)?;
        }
        let time = DecisionTime {
            job_us: self.job_decision,
            service_us: self.service_decision.unwrap_or(self.job_decision),
            unit_us: self.unit_decision,
        };
        let options = Options {
            schedulers: usize::from(self.schedulers),
            time,
            hoard_timeout_us: self.hoard_timeout.unwrap_or(hoard_timeout_us),
            hold_after_ms: i64::from(self.hold_after) * 1000,
            profile: self.profile,
        };
        Ok(Setup { strategies, options, seed: self.seed })
    }

    fn compare_all(&self) -> Result<Setup, String> {
        self.setup(&strategy::STANDARD, Options::default().hoard_timeout_us)
    }

    /// The flags that decide on figures, for the JSON.
    fn parameters(&self, setup: &Setup) -> Value {
        let (time, s) = (setup.options.time, |us: u64| us as f64 / SECOND_US as f64);
        json!({
            "seed": setup.seed,
            "schedulers": setup.options.schedulers,
            "job_decision_s": s(time.job_us),
            "service_decision_s": s(time.service_us),
            "unit_decision_s": s(time.unit_us),
            "hoard_timeout_s": s(setup.options.hoard_timeout_us),
            "hold_after_s": self.hold_after,
        })
    }
}

fn to_json(study: &str, parameters: Value, results: &impl Serialize) -> Result<Value, String> {
    let results = serde_json::to_value(results).map_err(|error| error.to_string())?;
    Ok(json!({ "study": study, "parameters": parameters, "results": results }))
}

/// The strategies on one workload.
fn compare(prefix: &str, workload: &Workload, common: &Common) -> Result<Findings, String> {
    let setup = common.compare_all()?;
    if workload.jobs.is_empty() {
        return Err(format!("{}: no job is left that these nodes could run", workload.name));
    }
    let main = workload.main_resource();
    let about = format!("{}, offered load {:.2}", workload.name, workload.load()[main]);
    let outcomes = setup.compare(workload, Span::arrivals(workload))?;
    Ok(Findings {
        text: format!("{about}; until the last job has come; waits in seconds\n{}", table::comparison(&outcomes)),
        json: to_json(prefix, common.parameters(&setup), &outcomes)?,
        charts: figures::comparison(prefix, &about, &outcomes),
    })
}

impl Rigid {
    fn run(&self) -> Result<Findings, String> {
        let workload = lublin::rigid(self.nodes, self.jobs as usize, self.common.seed).at_load(self.load);
        compare("rigid", &workload, &self.common)
    }
}

impl Swf {
    fn run(&self) -> Result<Findings, String> {
        let text = read_file(&self.file)?;
        let mut log = read::swf(&text).map_err(|error| format!("{}:\n{error}", self.file.display()))?;
        log.records.truncate(self.first.unwrap_or(usize::MAX));
        let (mut workload, left_out) = log.workload(self.nodes);
        if let Some(load) = self.load {
            workload = workload.at_load(load);
        }
        workload.name =
            format!("{} jobs of {}, {} nodes", workload.jobs.len(), name_of(&self.file), workload.nodes.len());
        if left_out > 0 {
            eprintln!("{left_out} jobs are left out: they did not run, or are larger than the nodes");
        }
        compare("swf", &workload, &self.common)
    }
}

fn name_of(file: &Path) -> String {
    file.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

impl Trace {
    fn run(&self) -> Result<Findings, String> {
        let wrong = |file: &Path, error: read::ReadError| format!("{}:\n{error}", file.display());
        let text = read_file(&self.node_list)?;
        let mut nodes = read::nodes(&text).map_err(|error| wrong(&self.node_list, error))?;
        nodes.nodes.truncate(self.nodes.map_or(usize::MAX, |count| count as usize));
        if !nodes.has_memory {
            eprintln!("{} does not tell the nodes' memory: it is never short", self.node_list.display());
        }
        let text = read_file(&self.pod_list)?;
        let jobs = read::pods(&text).map_err(|error| wrong(&self.pod_list, error))?;
        let (mut workload, left_out) = nodes.workload(jobs);
        workload.name =
            format!("{} pods of {}, {} nodes", workload.jobs.len(), name_of(&self.pod_list), workload.nodes.len());
        if left_out > 0 {
            eprintln!("{left_out} pods are left out: they fit on no node");
        }
        let mut findings = compare("trace", &workload, &self.common)?;
        let pods: Vec<Amounts> = workload.jobs.iter().map(super::job::Job::unit).collect();
        let packing = study::packing(&pods, &workload.nodes, self.runs, self.common.seed);
        findings.text +=
            &format!("\nThe same pods, without times, mean of {} orders\n{}", self.runs, table::packing(&packing));
        findings.json = json!([
            findings.json,
            to_json("trace-packing", json!({ "seed": self.common.seed, "runs": self.runs }), &packing)?
        ]);
        findings.charts.extend(figures::packing("trace-packing", &workload.name, &packing));
        Ok(findings)
    }
}

impl Mix {
    fn run(&self) -> Result<Findings, String> {
        let workload = mix(self.nodes, self.jobs as usize, self.common.seed).at_load(self.load);
        let about = format!("{}, offered load {:.2}", workload.name, self.load);
        let names = ["opt-fit-inc", "opt-fit-all", "opt-seq-inc", "opt-seq-all", "minipod"];
        let setup = self.common.setup(&names, Options::default().hoard_timeout_us)?;
        let apart = Setup {
            options: Options { schedulers: setup.options.schedulers.max(2), ..setup.options },
            ..setup.clone()
        };
        let times: Vec<f64> = self.service_decisions.iter().map(|at| *at as f64 / SECOND_US as f64).collect();
        let counts: Vec<usize> = self.scheduler_counts.iter().map(|count| usize::from(*count)).collect();
        // minipod's schedulers share the pods out by name and not by kind: it has no scheduler for services alone.
        let kinds = Setup {
            strategies: apart.strategies.iter().filter(|name| name.starts_with("opt-")).cloned().collect(),
            ..apart
        };
        let by_time = study::by_decision_time(&kinds, &workload, &times)?;
        let slow = DecisionTime { job_us: self.slow_decision, service_us: self.slow_decision, ..setup.options.time };
        let slow = Setup { options: Options { time: slow, ..setup.options }, ..setup.clone() };
        let by_count = study::by_schedulers(&slow, &workload, &counts)?;
        let mut charts = figures::decision_time(&about, &by_time);
        let slow_s = self.slow_decision as f64 / SECOND_US as f64;
        charts.extend(figures::schedulers(&format!("{about}, {slow_s} s for each decision"), &by_count));
        Ok(Findings {
            text: format!(
                "{about}\n{}\n{}",
                table::points("SERVICE-DECISION", &by_time),
                table::points("SCHEDULERS", &by_count)
            ),
            json: to_json(
                "mix",
                self.common.parameters(&setup),
                &json!({ "by_decision_time": by_time, "by_schedulers": by_count }),
            )?,
            charts,
        })
    }
}

impl TwoNode {
    fn run(&self) -> Result<Findings, String> {
        let setup = self.common.setup(&strategy::STANDARD, 30 * SECOND_US)?;
        let pairs: Vec<usize> = self.pairs.iter().map(|pairs| usize::from(*pairs)).collect();
        let results = study::two_node(&setup, &pairs, self.runs, self.limit)?;
        let about =
            "App 1 GiB + LogCollector 0.5 GiB, together, on Node_A 1.25 GiB and Node_B 2 GiB; each pair runs for 60 s";
        Ok(Findings {
            text: format!("{about}; {} interleavings\n{}", self.runs, table::two_node(&results)),
            json: to_json("two-node", self.common.parameters(&setup), &results)?,
            charts: figures::two_node(&results),
        })
    }
}

impl Packing {
    fn run(&self) -> Result<Findings, String> {
        let node = Amounts([32_000, 128 << 10, 0]);
        let pods = study::pods_to_pack(self.pods as usize, node, self.common.seed);
        let results = study::packing(&pods, &vec![node; self.nodes as usize], self.runs, self.common.seed);
        let about = format!(
            "{} pods, nodes of 32 CPUs and 128 GiB ({} of them where their number is fixed), mean of {} orders",
            self.pods, self.nodes, self.runs
        );
        let parameters = json!({ "seed": self.common.seed, "nodes": self.nodes, "pods": self.pods, "runs": self.runs });
        Ok(Findings {
            text: format!("{about}\n{}", table::packing(&results)),
            json: to_json("packing", parameters, &results)?,
            charts: figures::packing("packing", &about, &results),
        })
    }
}
