//! What the agent counts, for `/metrics`.

use std::sync::Arc;
use std::time::Duration;

use minipod_daemon::metrics::{Gauge, Histogram, Registry};

/// The agent's metrics.
#[derive(Debug)]
pub struct Metrics {
    /// All of them, to be served.
    pub registry: Arc<Registry>,
    pods: Arc<Gauge>,
    connected: Arc<Gauge>,
    waiting: Arc<Gauge>,
    /// From a pod's arrival until all of it runs.
    pub pod_start: Arc<Histogram>,
}

impl Default for Metrics {
    fn default() -> Self {
        let registry = Arc::new(Registry::default());
        Self {
            pods: registry.gauge("minipod_node_pods", &[], "Pods that the agent works on."),
            connected: registry.gauge("minipod_node_session_up", &[], "Whether a session with the API server is up."),
            waiting: registry.gauge("minipod_node_reports_waiting", &[], "Pod statuses that are not acknowledged."),
            pod_start: registry.histogram(
                "minipod_node_pod_start_seconds",
                &[],
                "Time from a new pod's arrival on the node until its phase is Running.",
            ),
            registry,
        }
    }
}

impl Metrics {
    /// A step was performed.
    pub fn step(&self, name: &'static str, took: Duration, failed: bool) {
        let help = "Time that a step of a pod's life takes.";
        self.registry.histogram("minipod_node_step_seconds", &[("step", name)], help).observe(took);
        if failed {
            let help = "Steps that failed; they are tried again.";
            self.registry.counter("minipod_node_step_failures_total", &[("step", name)], help).increment();
        }
    }

    /// Takes note of what only changes now and then.
    pub fn note(&self, pods: usize, connected: bool, waiting: usize) {
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        self.pods.set(count(pods));
        self.connected.set(i64::from(connected));
        self.waiting.set(count(waiting));
    }
}
