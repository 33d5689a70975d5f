//! The Standard Workload Format, version 2: one job a line, 18 fields between blanks, `;` before comments and the header.
//! Feitelson's Parallel Workloads Archive describes it: <https://www.cs.huji.ac.il/labs/parallel/workload/swf.html>.

use super::{Problem, ReadError, unless};
use crate::sim::job::{Amounts, Job, SECOND_US, Workload};

/// Names of the fields in their order.
const FIELDS: [&str; 18] = [
    "job number",
    "submit time",
    "wait time",
    "run time",
    "allocated processors",
    "average CPU time",
    "used memory",
    "requested processors",
    "requested time",
    "requested memory",
    "status",
    "user",
    "group",
    "executable",
    "queue",
    "partition",
    "preceding job",
    "think time",
];

/// One job. `None` is -1: not known. Times are seconds, memory is KB for each processor.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Record {
    /// Counts from 1.
    pub number: Option<f64>,
    /// From the log's beginning.
    pub submit_s: Option<f64>,
    /// From coming to beginning.
    pub wait_s: Option<f64>,
    /// From beginning to end.
    pub run_s: Option<f64>,
    /// Processors that it had.
    pub processors: Option<f64>,
    /// CPU time used, mean over processors.
    pub cpu_s: Option<f64>,
    /// Used, for each processor.
    pub memory_kb: Option<f64>,
    /// Processors that were asked for.
    pub requested_processors: Option<f64>,
    /// Run time that was asked for.
    pub requested_s: Option<f64>,
    /// Memory that was asked for, for each processor.
    pub requested_memory_kb: Option<f64>,
    /// 0 failed, 1 completed, 2 to 4 parts of a job with checkpoints, 5 cancelled.
    pub status: Option<f64>,
    /// By number.
    pub user: Option<f64>,
    /// By number.
    pub group: Option<f64>,
    /// Program, by number.
    pub executable: Option<f64>,
    /// By number; by convention 0 is interactive.
    pub queue: Option<f64>,
    /// By number.
    pub partition: Option<f64>,
    /// It came after this one had ended.
    pub preceding: Option<f64>,
    /// Between that job's end and this one's coming.
    pub think_s: Option<f64>,
}

impl Record {
    fn new(fields: [Option<f64>; 18]) -> Record {
        let [number, submit_s, wait_s, run_s, processors, cpu_s, memory_kb, requested_processors, requested_s, ..] =
            fields;
        let [.., requested_memory_kb, status, user, group, executable, queue, partition, preceding, think_s] = fields;
        Record {
            number,
            submit_s,
            wait_s,
            run_s,
            processors,
            cpu_s,
            memory_kb,
            requested_processors,
            requested_s,
            requested_memory_kb,
            status,
            user,
            group,
            executable,
            queue,
            partition,
            preceding,
            think_s,
        }
    }

    /// The job, if it has run on something: cancelled ones often have not.
    fn job(&self) -> Option<Job> {
        let processors = self.processors.or(self.requested_processors).filter(|count| *count >= 1.0)?;
        let (submit_s, run_s) = (self.submit_s?, self.run_s.filter(|run| *run > 0.0)?);
        let count = processors as u32;
        Some(Job {
            service: false,
            submit_us: (submit_s * SECOND_US as f64) as u64,
            duration_us: (run_s * SECOND_US as f64) as u64,
            parts: vec![PROCESSOR],
            count,
            min_count: count,
        })
    }
}

const PROCESSOR: Amounts = Amounts([1000, 1024, 0]);

/// A log.
#[derive(Debug, Clone, PartialEq)]
pub struct Swf {
    /// MaxProcs of the header, else MaxNodes.
    pub processors: Option<u32>,
    /// The jobs.
    pub records: Vec<Record>,
}

/// Reads a log.
///
/// # Errors
/// All fields that are not numbers, with their lines, and lines that have not 18 fields.
pub fn swf(text: &str) -> Result<Swf, ReadError> {
    let (mut records, mut problems) = (Vec::new(), Vec::new());
    let (mut nodes, mut processors) = (None, None);
    for (at, line) in text.lines().enumerate() {
        let (at, line) = (at + 1, line.trim());
        if let Some(comment) = line.strip_prefix(';') {
            let Some((key, value)) = comment.split_once(':') else { continue };
            let number = value.split_whitespace().next().and_then(|number| number.parse().ok());
            match key.trim() {
                "MaxNodes" => nodes = nodes.or(number),
                "MaxProcs" => processors = processors.or(number),
                _ => {}
            }
        } else if !line.is_empty() {
            match record(at, line) {
                Ok(record) => records.push(record),
                Err(more) => problems.extend(more),
            }
        }
    }
    unless(problems, Swf { processors: processors.or(nodes), records })
}

fn record(line: usize, text: &str) -> Result<Record, Vec<Problem>> {
    let words: Vec<&str> = text.split_whitespace().collect();
    if words.len() != FIELDS.len() {
        let value = format!("{} fields", words.len());
        return Err(vec![Problem { line, field: "record".into(), value, want: "18 fields, -1 for what is not known" }]);
    }
    let mut problems = Vec::new();
    let fields = std::array::from_fn(|at| {
        let number = words[at].parse::<f64>().ok().filter(|number| number.is_finite() && number.abs() < 1e12);
        if number.is_none() {
            let field = format!("field {} ({})", at + 1, FIELDS[at]);
            problems.push(Problem { line, field, value: words[at].into(), want: "a number, or -1 if it is not known" });
        }
        number.filter(|number| *number >= 0.0)
    });
    if problems.is_empty() { Ok(Record::new(fields)) } else { Err(problems) }
}

impl Swf {
    /// The jobs on so many nodes, one for each processor (the header's number if none is given), and how many were left out because
    /// they did not run, or are larger than that.
    pub fn workload(&self, nodes: Option<u32>) -> (Workload, usize) {
        let mut jobs: Vec<Job> = self.records.iter().filter_map(Record::job).collect();
        jobs.sort_by_key(|job| job.submit_us);
        let first_us = jobs.first().map_or(0, |job| job.submit_us);
        jobs.iter_mut().for_each(|job| job.submit_us -= first_us);
        let largest = jobs.iter().map(|job| job.count).max().unwrap_or(1);
        let nodes = nodes.or(self.processors).unwrap_or(largest);
        let mut workload =
            Workload { name: format!("SWF, {nodes} nodes"), nodes: vec![PROCESSOR; nodes as usize], jobs };
        workload.drop_impossible();
        let left_out = self.records.len() - workload.jobs.len();
        (workload, left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_all_eighteen_fields() {
        let text = "; Version: 2\n;  MaxNodes: 128\n; MaxProcs: 256 \n\n  7 10 3 60.5 4 59.25 1000 8 120 2000 1 11 12 13 0 14 6 15\n";
        let log = swf(text).unwrap();
        assert_eq!(log.processors, Some(256));
        let fields =
            [7.0, 10.0, 3.0, 60.5, 4.0, 59.25, 1000.0, 8.0, 120.0, 2000.0, 1.0, 11.0, 12.0, 13.0, 0.0, 14.0, 6.0, 15.0];
        assert_eq!(log.records, [Record::new(fields.map(Some))]);
        let record = &log.records[0];
        assert_eq!((record.requested_memory_kb, record.think_s), (Some(2000.0), Some(15.0)));
    }

    #[test]
    fn unknown_processors_are_those_asked_for_and_jobs_that_did_not_run_are_left_out() {
        let text = "1 100 -1 60 -1 -1 -1 8 -1 -1 1 -1 -1 -1 -1 -1 -1 -1\n\
                    2 90 -1 30 4 -1 -1 8 -1 -1 1 -1 -1 -1 -1 -1 -1 -1\n\
                    3 110 -1 0 4 -1 -1 8 -1 -1 5 -1 -1 -1 -1 -1 -1 -1\n\
                    4 110 -1 9 99 -1 -1 8 -1 -1 1 -1 -1 -1 -1 -1 -1 -1\n";
        let (workload, left_out) = swf(text).unwrap().workload(Some(8));
        let told: Vec<(u64, u32)> = workload.jobs.iter().map(|job| (job.submit_us / SECOND_US, job.count)).collect();
        assert_eq!((told, left_out), (vec![(0, 4), (10, 8)], 2));
    }

    #[test]
    fn what_is_wrong_is_told_with_line_field_and_value() {
        let text = "; c\n1 2 3\n1 2 3 4 5 6 7 8 9 10 11 12 x 14 15 16 17 NaN\n";
        let problem = swf(text).unwrap_err().to_string();
        assert_eq!(
            problem,
            "line 2: record: \"3 fields\": want 18 fields, -1 for what is not known\n\
             line 3: field 13 (group): \"x\": want a number, or -1 if it is not known\n\
             line 3: field 18 (think time): \"NaN\": want a number, or -1 if it is not known"
        );
        let many = swf(&"a\n".repeat(30)).unwrap_err().to_string();
        assert!(
            many.ends_with("line 10: record: \"1 fields\": want 18 fields, -1 for what is not known\nand 20 more"),
            "{many}"
        );
    }
}
