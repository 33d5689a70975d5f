//! `logs`: of one container, or of many at once.

use std::io::IsTerminal;

use bytes::Bytes;
use minipod_client::{ClientError, Logs, Query};
use minipod_proto::Resource;
use minipod_proto::v1::{LogsRequest, Pod};
use tokio::sync::mpsc;

use super::access::container;
use super::args::LogsArgs;
use super::error::CliError;
use super::session::Session;
use super::{print_bytes, target};
use crate::view::text::{self, LogFilter};

/// What kubectl shows of each container when a selector chose them and nothing else is said.
const SELECTED_TAIL: i64 = 10;
/// A line that is longer goes out in parts, which lines of others may part.
const MAX_LINE_BYTES: usize = 64 << 10;
/// Pieces of logs between the connections and standard output: enough that neither waits for a switch of tasks.
const PIECES: usize = 16;

/// Prints logs. To a terminal, control characters are shown, except colours; to anything else every byte passes.
pub async fn logs(session: &Session, options: &LogsArgs) -> Result<(), CliError> {
    let sources = sources(session, options).await?;
    let prefixed = |request: &LogsRequest| {
        let name = format!("[pod/{}/{}] ", request.pod, request.container);
        if options.prefix { name.into_bytes() } else { Vec::new() }
    };
    let mut output = Output { filter: (std::io::stdout().is_terminal() && !options.raw).then(LogFilter::default) };
    if !options.follow || sources.len() == 1 {
        for request in sources {
            let mut lines = Lines::new(prefixed(&request));
            let mut logs = session.client.logs(request).await?;
            while let Some(piece) = logs.next().await? {
                output.print(&lines.push(&piece))?;
            }
            output.print(&lines.finish())?;
        }
        return output.finish();
    }
    if sources.len() > options.max_log_requests {
        let most = options.max_log_requests;
        return Err(CliError::usage(
            format!("{} containers are meant, and {most} logs are followed at most", sources.len()),
            format!("choose fewer, or allow more: --max-log-requests={}", sources.len()),
        ));
    }
    let (sender, mut pieces) = mpsc::channel(PIECES);
    for request in sources {
        let lines = Lines::together(prefixed(&request));
        let logs = session.client.logs(request.clone()).await?;
        tokio::spawn(follow(logs, lines, request, sender.clone()));
    }
    drop(sender);
    let mut failure = None;
    while let Some(piece) = pieces.recv().await {
        match piece {
            Ok(piece) => output.print(&piece)?,
            // The others go on; the first error is told at last, by the exit code too.
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    output.finish()?;
    failure.map_or(Ok(()), |error| Err(error.into()))
}

async fn follow(
    mut logs: Logs,
    mut lines: Lines,
    request: LogsRequest,
    sender: mpsc::Sender<Result<Bytes, ClientError>>,
) {
    loop {
        let (piece, last) = match logs.next().await {
            Ok(Some(piece)) => (lines.push(&piece), false),
            Ok(None) => (lines.finish(), true),
            Err(error) => {
                let what = format!("{}/{}", request.pod, request.container);
                note!("error: the log of {} has ended: {}", text::line(&what), text::line(&error.to_string()));
                // Nobody reads when standard output is closed.
                let _ = sender.send(Err(error)).await;
                return;
            }
        };
        if sender.send(Ok(piece)).await.is_err() || last {
            return;
        }
    }
}

/// Which logs are meant, in the order in which they are printed.
async fn sources(session: &Session, options: &LogsArgs) -> Result<Vec<LogsRequest>, CliError> {
    let selected = !options.selector.is_empty();
    let pods = match (&options.pod, selected) {
        (Some(_), true) | (None, false) => {
            return Err(CliError::usage(
                "logs are of a pod, or of the pods of a selector",
                "minictl logs POD; minictl logs -l app=web",
            ));
        }
        (Some(pod), false) if options.all_containers => {
            vec![session.client.get::<Pod>(&session.namespace, target::pod_name(pod)?).await?]
        }
        (Some(pod), false) => {
            let name = target::pod_name(pod)?;
            return Ok(vec![request(
                session,
                options,
                name,
                &container(session, &session.namespace, name, &options.container).await?,
            )]);
        }
        (None, true) => {
            let query = Query::namespace(&session.namespace).with_labels(&options.selector);
            let mut pods = session.client.list::<Pod>(&query).await?.items;
            pods.sort_by(|a, b| a.meta().name.cmp(&b.meta().name));
            pods
        }
    };
    let mut sources = Vec::new();
    for pod in &pods {
        let name = &pod.meta().name;
        if options.all_containers {
            let spec = pod.spec();
            let all = spec.init_containers.iter().chain(&spec.containers);
            sources.extend(all.map(|container| request(session, options, name, &container.name)));
        } else if options.container.is_empty() {
            sources.push(request(session, options, name, &super::access::choose(pod)));
        } else {
            sources.push(request(session, options, name, &options.container));
        }
    }
    if sources.is_empty() {
        note!("no pods match {:?} in namespace {:?}", options.selector, session.namespace);
    }
    Ok(sources)
}

fn request(session: &Session, options: &LogsArgs, pod: &str, container: &str) -> LogsRequest {
    let selected_tail = (!options.selector.is_empty()).then_some(SELECTED_TAIL);
    LogsRequest {
        namespace: session.namespace.clone(),
        pod: pod.to_owned(),
        container: container.to_owned(),
        follow: options.follow,
        previous: options.previous,
        tail_lines: options.tail.map_or(selected_tail, |lines| (lines >= 0).then_some(lines)),
        since_seconds: options.since.map(|since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX)),
        since_time: options.since_time,
        timestamps: options.timestamps,
        limit_bytes: options.limit_bytes,
    }
}

struct Output {
    filter: Option<LogFilter>,
}

impl Output {
    fn print(&mut self, bytes: &[u8]) -> Result<(), CliError> {
        match &mut self.filter {
            Some(filter) => print_bytes(&filter.push(bytes)),
            None => print_bytes(bytes),
        }
    }

    fn finish(self) -> Result<(), CliError> {
        self.filter.map_or(Ok(()), |mut filter| print_bytes(&filter.finish()))
    }
}

/// Gives each line its prefix, and keeps a line together where other logs are printed beside it.
struct Lines {
    prefix: Vec<u8>,
    /// Only whole lines are let out.
    whole: bool,
    held: Vec<u8>,
    /// What was let out last did not end its line.
    in_line: bool,
}

impl Lines {
    fn new(prefix: Vec<u8>) -> Self {
        Self { prefix, whole: false, held: Vec::new(), in_line: false }
    }

    fn together(prefix: Vec<u8>) -> Self {
        Self { whole: true, ..Self::new(prefix) }
    }

    fn push(&mut self, piece: &[u8]) -> Bytes {
        if !self.whole && self.prefix.is_empty() {
            return Bytes::copy_from_slice(piece);
        }
        self.held.extend_from_slice(piece);
        let whole = self.held.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let ready = if !self.whole || self.held.len() - whole > MAX_LINE_BYTES { self.held.len() } else { whole };
        let rest = self.held.split_off(ready);
        let ready = std::mem::replace(&mut self.held, rest);
        self.let_out(&ready)
    }

    fn finish(&mut self) -> Bytes {
        let mut rest = std::mem::take(&mut self.held);
        if self.whole && !rest.is_empty() {
            // The end of one log must not become the beginning of another one's line.
            rest.push(b'\n');
        }
        self.let_out(&rest)
    }

    fn let_out(&mut self, bytes: &[u8]) -> Bytes {
        let mut out = Vec::with_capacity(bytes.len() + self.prefix.len());
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            if !self.in_line {
                out.extend_from_slice(&self.prefix);
            }
            out.extend_from_slice(line);
            self.in_line = !line.ends_with(b"\n");
        }
        out.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(mut lines: Lines, pieces: &[&str]) -> Vec<String> {
        let mut out: Vec<Bytes> = pieces.iter().map(|piece| lines.push(piece.as_bytes())).collect();
        out.push(lines.finish());
        out.iter().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).collect()
    }

    #[test]
    fn lines_get_their_prefix_once_and_stay_whole() {
        let pieces = ["a", "b\nc\nd", "e\n", "f"];
        assert_eq!(printed(Lines::new(Vec::new()), &pieces), ["a", "b\nc\nd", "e\n", "f", ""]);
        assert_eq!(printed(Lines::new(b"> ".to_vec()), &pieces), ["> a", "b\n> c\n> d", "e\n", "> f", ""]);
        assert_eq!(printed(Lines::together(b"> ".to_vec()), &pieces), ["", "> ab\n> c\n", "> de\n", "", "> f\n"]);
        let long = "x".repeat(MAX_LINE_BYTES + 1);
        assert_eq!(
            printed(Lines::together(b"> ".to_vec()), &[&long, "y\nz"]),
            [format!("> {long}"), "y\n".into(), "> z\n".into()]
        );
    }
}
