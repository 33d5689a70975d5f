//! CSV as published by operators of GPU clusters: a header, and columns by name. Two shapes of pods and two of nodes are known:
//!
//! - pods: `cpu_milli, memory_mib, num_gpu, gpu_milli` (GPU thousandths for each device), or `cpu_request, gpu_request,
//!   memory_request` (whole CPUs and GPUs, GiB); both with `creation_time` and `deletion_time` (seconds) if there are any.
//! - nodes: `cpu_milli, memory_mib, gpu`, or `cpu_num, gpu_capacity_num`, where memory is not told and never short.

use super::{Problem, ReadError, unless};
use crate::sim::job::{Amounts, Job, SECOND_US, Workload};

/// Memory of a node of which it is not told, MiB: more than is ever asked for.
const NEVER_SHORT: i64 = 1 << 30;

/// A table whose columns are found by name.
struct Table<'a> {
    columns: Vec<&'a str>,
    /// Number of the line, and its cells.
    rows: Vec<(usize, Vec<&'a str>)>,
    problems: Vec<Problem>,
}

impl<'a> Table<'a> {
    fn new(text: &'a str) -> Table<'a> {
        let mut lines =
            text.lines().enumerate().map(|(at, line)| (at + 1, line)).filter(|(_, line)| !line.trim().is_empty());
        let columns: Vec<&str> = lines.next().map(|(_, line)| cells(line)).unwrap_or_default();
        let (mut rows, mut problems) = (Vec::new(), Vec::new());
        for (line, text) in lines {
            let row = cells(text);
            if row.len() == columns.len() {
                rows.push((line, row));
            } else {
                let value = format!("{} cells", row.len());
                problems.push(Problem { line, field: "row".into(), value, want: "as many cells as the header has" });
            }
        }
        Table { columns, rows, problems }
    }

    /// Positions of columns, if all are there.
    fn find<const N: usize>(&self, names: [&'static str; N]) -> Option<[Column; N]> {
        let at = names.map(|name| self.columns.iter().position(|column| *column == name));
        at.iter()
            .all(Option::is_some)
            .then(|| std::array::from_fn(|index| Column { name: names[index], at: at[index].unwrap_or(0) }))
    }

    fn header_problem(&self, want: &'static str) -> ReadError {
        ReadError(vec![Problem { line: 1, field: "header".into(), value: self.columns.join(","), want }])
    }
}

fn cells(line: &str) -> Vec<&str> {
    line.split(',').map(|cell| cell.trim().trim_matches('"')).collect()
}

#[derive(Clone, Copy)]
struct Column {
    name: &'static str,
    at: usize,
}

impl Column {
    /// A number from 0; nothing is `empty`, where that is allowed.
    fn number(self, line: usize, row: &[&str], empty: Option<f64>, problems: &mut Vec<Problem>) -> f64 {
        let text = row[self.at];
        let number = match text {
            "" => empty,
            text => text.parse::<f64>().ok().filter(|number| (0.0..1e12).contains(number)),
        };
        number.unwrap_or_else(|| {
            let want = if empty.is_some() { "a number from 0, or nothing" } else { "a number from 0" };
            problems.push(Problem { line, field: self.name.into(), value: text.into(), want });
            0.0
        })
    }
}

/// The nodes of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nodes {
    /// What each has.
    pub nodes: Vec<Amounts>,
    /// Whether the file tells how much memory they have.
    pub has_memory: bool,
}

/// Reads nodes.
///
/// # Errors
/// A header of another shape, and all cells that are not numbers.
pub fn nodes(text: &str) -> Result<Nodes, ReadError> {
    let mut table = Table::new(text);
    let problems = &mut std::mem::take(&mut table.problems);
    let with_memory = table.find(["cpu_milli", "memory_mib", "gpu"]);
    let (columns, unit): ([Option<Column>; 3], f64) = match (with_memory, table.find(["cpu_num", "gpu_capacity_num"])) {
        (Some([cpu, memory, gpu]), _) => ([Some(cpu), Some(memory), Some(gpu)], 1.0),
        (None, Some([cpu, gpu])) => ([Some(cpu), None, Some(gpu)], 1000.0),
        (None, None) => {
            return Err(table
                .header_problem("cpu_milli, memory_mib and gpu, or cpu_num and gpu_capacity_num among the columns"));
        }
    };
    let factors = [unit, 1.0, 1000.0];
    let mut nodes = Vec::new();
    for (line, row) in &table.rows {
        let amount = |at: usize, problems: &mut Vec<Problem>| match columns[at] {
            Some(column) => (column.number(*line, row, None, problems) * factors[at]) as i64,
            None => NEVER_SHORT,
        };
        nodes.push(Amounts([amount(0, problems), amount(1, problems), amount(2, problems)]));
    }
    unless(std::mem::take(problems), Nodes { nodes, has_memory: columns[1].is_some() })
}

/// Reads pods, as jobs of one unit in order of coming. A pod without a time of coming is there from the beginning, one without an end
/// stays to the end.
///
/// # Errors
/// A header of another shape, and all cells that are not numbers.
pub fn pods(text: &str) -> Result<Vec<Job>, ReadError> {
    let mut table = Table::new(text);
    let problems = &mut std::mem::take(&mut table.problems);
    let times = table.find(["creation_time", "deletion_time"]);
    let shared = table.find(["cpu_milli", "memory_mib", "num_gpu", "gpu_milli"]);
    let whole = table.find(["cpu_request", "memory_request", "gpu_request"]);
    let mut all = Vec::new();
    for (line, row) in &table.rows {
        let amounts = match (shared, whole) {
            (Some([cpu, memory, count, each]), _) => {
                let [cpu, memory, count, each] =
                    [cpu, memory, count, each].map(|column| column.number(*line, row, None, problems));
                [cpu, memory, count * each]
            }
            (None, Some([cpu, memory, gpu])) => {
                let [cpu, memory, gpu] = [cpu, memory, gpu].map(|column| column.number(*line, row, None, problems));
                [cpu * 1000.0, memory * 1024.0, gpu * 1000.0]
            }
            (None, None) => {
                return Err(table.header_problem(
                    "cpu_milli, memory_mib, num_gpu and gpu_milli, or cpu_request, memory_request and gpu_request among the columns",
                ));
            }
        };
        let [from, to] = times.map_or([0.0, f64::INFINITY], |[from, to]| {
            [from.number(*line, row, Some(0.0), problems), to.number(*line, row, Some(f64::INFINITY), problems)]
        });
        if to < from {
            let value = format!("{to}");
            problems.push(Problem {
                line: *line,
                field: "deletion_time".into(),
                value,
                want: "no less than creation_time",
            });
        }
        all.push((from, to, Amounts(amounts.map(|amount| amount.ceil() as i64))));
    }
    let ends = all.iter().map(|(from, to, _)| if to.is_finite() { *to } else { *from });
    let last_s = ends.fold(1.0, f64::max);
    all.sort_by(|(one, ..), (other, ..)| one.total_cmp(other));
    let jobs = all.into_iter().map(|(from_s, to_s, amounts)| Job {
        service: !to_s.is_finite(),
        submit_us: (from_s * SECOND_US as f64) as u64,
        duration_us: ((to_s.min(last_s) - from_s).max(1.0) * SECOND_US as f64) as u64,
        parts: vec![amounts],
        count: 1,
        min_count: 1,
    });
    unless(std::mem::take(problems), jobs.collect())
}

impl Nodes {
    /// These nodes with those jobs, and how many jobs were left out because they fit on none of them.
    pub fn workload(self, jobs: Vec<Job>) -> (Workload, usize) {
        let name = format!("{} pods of a trace, {} nodes", jobs.len(), self.nodes.len());
        let mut workload = Workload { name, nodes: self.nodes, jobs };
        let left_out = workload.drop_impossible();
        (workload, left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_shapes_of_nodes() {
        let shared =
            nodes("sn,cpu_milli,memory_mib,gpu,model\nn-0,32000,262144,0,\n\nn-1,64000,1024,2,P100\n").unwrap();
        assert_eq!(shared.nodes, [Amounts([32000, 262_144, 0]), Amounts([64000, 1024, 2000])]);
        let whole = nodes("gpu_model,gpu_capacity_num,cpu_num,node_name\nG1,4,192,0\n").unwrap();
        assert_eq!((whole.nodes, whole.has_memory), (vec![Amounts([192_000, NEVER_SHORT, 4000])], false));
    }

    #[test]
    fn both_shapes_of_pods() {
        let shared = "name,cpu_milli,memory_mib,num_gpu,gpu_milli,creation_time,deletion_time\n\
                      p-0,6000,12288,2,460,30,90\np-1,100,5,0,0,10,\n";
        let told = |jobs: Vec<Job>| -> Vec<(u64, u64, [i64; 3], bool)> {
            let told = jobs
                .iter()
                .map(|job| (job.submit_us / SECOND_US, job.duration_us / SECOND_US, job.unit().0, job.service));
            told.collect()
        };
        let want = vec![(10, 80, [100, 5, 0], true), (30, 60, [6000, 12288, 920], false)];
        assert_eq!(told(pods(shared).unwrap()), want);
        let whole = "instance,cpu_request,gpu_request,memory_request,creation_time,deletion_time\ni-0,12,1,1.5,,\n";
        assert_eq!(told(pods(whole).unwrap()), [(0, 1, [12000, 1536, 1000], true)]);
        assert_eq!(told(pods("cpu_milli,memory_mib,num_gpu,gpu_milli\n1,2,0,0\n").unwrap()), [(0, 1, [1, 2, 0], true)]);
    }

    #[test]
    fn what_is_wrong_is_told_with_line_column_and_value() {
        let text = "cpu_milli,memory_mib,num_gpu,gpu_milli,creation_time,deletion_time\n\
                    1,2,0,0,5,4\n1,two,0,0,,\n1,2\n-1,2,0,,,\n";
        assert_eq!(
            pods(text).unwrap_err().to_string(),
            "line 4: row: \"2 cells\": want as many cells as the header has\n\
             line 2: deletion_time: \"4\": want no less than creation_time\n\
             line 3: memory_mib: \"two\": want a number from 0\n\
             line 5: cpu_milli: \"-1\": want a number from 0\n\
             line 5: gpu_milli: \"\": want a number from 0"
        );
        for (text, value) in [("a,b\n1,2\n", "\"a,b\""), ("", "\"\"")] {
            let problem = nodes(text).unwrap_err().to_string();
            assert!(problem.starts_with(&format!("line 1: header: {value}: want cpu_milli")), "{problem}");
        }
    }
}
