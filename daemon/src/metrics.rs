//! Counters, gauges and histograms, and their text form for Prometheus (exposition format 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Upper bounds of a histogram's buckets, seconds: from a write to a fast disk to a call that was about to be given up.
const BOUNDS_S: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn increment(&self) {
        self.add(1);
    }

    /// `n` more.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The present value.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Makes it `value`.
    pub fn set(&self, value: i64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Adds `n`, which may be negative.
    pub fn add(&self, n: i64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The present value.
    #[must_use]
    pub fn value(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Durations, counted by bucket.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS_S.len()],
    count: AtomicU64,
    sum_us: AtomicU64,
}

impl Histogram {
    /// Counts one duration.
    pub fn observe(&self, duration: Duration) {
        if let Some(bucket) = BOUNDS_S.iter().position(|bound| duration.as_secs_f64() <= *bound) {
            self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

#[derive(Debug, Clone)]
enum Metric {
    Counter(Arc<Counter>),
    Gauge(Arc<Gauge>),
    Histogram(Arc<Histogram>),
}

#[derive(Debug)]
struct Family {
    help: &'static str,
    /// By label text, such as `code="OK"`; empty without labels.
    metrics: BTreeMap<String, Metric>,
}

/// Brings gauges up to date before they are shown.
type Collector = Box<dyn Fn() + Send + Sync>;

/// All metrics of a process. Asking again for the same name and labels gives the same metric.
#[derive(Default)]
pub struct Registry {
    families: Mutex<BTreeMap<&'static str, Family>>,
    collectors: Mutex<Vec<Collector>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("families", &self.families).finish_non_exhaustive()
    }
}

impl Registry {
    /// A counter; by custom its name ends in `_total`.
    pub fn counter(&self, name: &'static str, labels: &[(&str, &str)], help: &'static str) -> Arc<Counter> {
        match self.metric(name, labels, help, || Metric::Counter(Arc::default())) {
            Metric::Counter(counter) => counter,
            // One name with two types is a slip of the programmer's; the metric then counts, but is not shown.
            _ => Arc::default(),
        }
    }

    /// A gauge.
    pub fn gauge(&self, name: &'static str, labels: &[(&str, &str)], help: &'static str) -> Arc<Gauge> {
        match self.metric(name, labels, help, || Metric::Gauge(Arc::default())) {
            Metric::Gauge(gauge) => gauge,
            _ => Arc::default(),
        }
    }

    /// A histogram of durations; by custom its name ends in `_seconds`.
    pub fn histogram(&self, name: &'static str, labels: &[(&str, &str)], help: &'static str) -> Arc<Histogram> {
        match self.metric(name, labels, help, || Metric::Histogram(Arc::default())) {
            Metric::Histogram(histogram) => histogram,
            _ => Arc::default(),
        }
    }

    fn metric(
        &self,
        name: &'static str,
        labels: &[(&str, &str)],
        help: &'static str,
        make: impl FnOnce() -> Metric,
    ) -> Metric {
        let mut families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        let family = families.entry(name).or_insert_with(|| Family { help, metrics: BTreeMap::new() });
        family.metrics.entry(label_text(labels)).or_insert_with(make).clone()
    }

    /// Has `collect` called each time before the metrics are shown: for gauges whose values lie elsewhere and cost little to read.
    pub fn before_render(&self, collect: impl Fn() + Send + Sync + 'static) {
        self.collectors.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(collect));
    }

    /// The text that `/metrics` answers.
    #[must_use]
    pub fn render(&self) -> String {
        for collect in &*self.collectors.lock().unwrap_or_else(PoisonError::into_inner) {
            collect();
        }
        let families = self.families.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        for (name, family) in &*families {
            let kind = match family.metrics.values().next() {
                Some(Metric::Counter(_)) => "counter",
                Some(Metric::Gauge(_)) => "gauge",
                Some(Metric::Histogram(_)) => "histogram",
                None => continue,
            };
            let _ = writeln!(text, "# HELP {name} {}\n# TYPE {name} {kind}", family.help);
            for (labels, metric) in &family.metrics {
                render_one(&mut text, name, labels, metric);
            }
        }
        text
    }
}

fn render_one(text: &mut String, name: &str, labels: &str, metric: &Metric) {
    let braced = |more: &str| match (labels, more) {
        ("", "") => String::new(),
        ("", one) | (one, "") => format!("{{{one}}}"),
        (one, two) => format!("{{{one},{two}}}"),
    };
    // Writing to a String cannot fail.
    let _ = match metric {
        Metric::Counter(counter) => writeln!(text, "{name}{} {}", braced(""), counter.value()),
        Metric::Gauge(gauge) => writeln!(text, "{name}{} {}", braced(""), gauge.value()),
        Metric::Histogram(histogram) => {
            let mut below = 0;
            for (bound, bucket) in BOUNDS_S.iter().zip(&histogram.buckets) {
                below += bucket.load(Ordering::Relaxed);
                let _ = writeln!(text, "{name}_bucket{} {below}", braced(&format!("le=\"{bound}\"")));
            }
            // Buckets and count are read one after the other: keep the count from falling behind a bucket.
            let count = histogram.count.load(Ordering::Relaxed).max(below);
            let sum = Duration::from_micros(histogram.sum_us.load(Ordering::Relaxed)).as_secs_f64();
            let _ = writeln!(text, "{name}_bucket{} {count}", braced("le=\"+Inf\""));
            writeln!(text, "{name}_sum{} {sum}\n{name}_count{} {count}", braced(""), braced(""))
        }
    };
}

fn label_text(labels: &[(&str, &str)]) -> String {
    let escape = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_help_type_labels_and_cumulative_buckets() {
        let registry = Registry::default();
        let looks = registry.gauge("looks", &[], "Looks.");
        registry.before_render(move || looks.add(1));
        assert!(registry.render().contains("\nlooks 1\n"));
        registry.counter("calls_total", &[("code", "O\"K")], "Calls.").add(2);
        registry.counter("calls_total", &[("code", "O\"K")], "Calls.").increment();
        registry.gauge("streams", &[], "Open streams.").set(-1);
        let seconds = registry.histogram("call_seconds", &[("kind", "Pod")], "Duration.");
        seconds.observe(Duration::from_millis(3));
        seconds.observe(Duration::from_secs(60));
        let text = registry.render();
        for line in [
            "# HELP calls_total Calls.",
            "# TYPE calls_total counter",
            "calls_total{code=\"O\\\"K\"} 3",
            "# TYPE streams gauge",
            "streams -1",
            "looks 2",
            "call_seconds_bucket{kind=\"Pod\",le=\"0.0001\"} 0",
            "call_seconds_bucket{kind=\"Pod\",le=\"0.0025\"} 0",
            "call_seconds_bucket{kind=\"Pod\",le=\"0.005\"} 1",
            "call_seconds_bucket{kind=\"Pod\",le=\"10\"} 1",
            "call_seconds_bucket{kind=\"Pod\",le=\"+Inf\"} 2",
            "call_seconds_sum{kind=\"Pod\"} 60.003",
            "call_seconds_count{kind=\"Pod\"} 2",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
