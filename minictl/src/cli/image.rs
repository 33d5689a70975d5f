//! `image load`, `image save`, `image ls`, `image rm` and `image prune`.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::Stream;
use minipod_client::{Client, ImageArchive};
use minipod_proto::v1::image_list_summary::PerNode;
use minipod_proto::v1::{ImageInfo, ImageListSummary, ImageLoadStart, ImageLoadSummary};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::args::ImageCommand;
use super::error::CliError;
use super::print;
use super::session::Session;
use crate::view::table::Table;
use crate::view::text;

/// Bytes of one message: far below the servers' limit, and enough that a message costs nothing.
const PIECE: usize = 256 << 10;

/// `minictl image …`
pub async fn run(session: &Session, command: &ImageCommand) -> Result<(), CliError> {
    match command {
        ImageCommand::Ls { nodes } => {
            let summary = session.client.list_images(nodes.clone()).await?;
            table(&summary, "there are no images; load one: minictl image load FILE")
        }
        ImageCommand::Prune { nodes, all } => {
            let summary = session.client.prune_images(nodes.clone(), *all).await?;
            let hint = if *all { "" } else { " or has a name (--all removes those with names too)" };
            table(&summary, &format!("nothing was removed: every image is in use{hint}"))
        }
        ImageCommand::Remove { images, nodes } => {
            let summary = session.client.remove_images(nodes.clone(), images.clone()).await?;
            let found = |node: &PerNode| !node.images.is_empty() || !node.error.is_empty();
            if !summary.nodes.iter().any(found) {
                let message = format!("no node has {}", images.join(" or "));
                return Err(CliError::usage(message, "see: minictl image ls"));
            }
            table(&summary, "")
        }
        ImageCommand::Save { image, output, nodes } => save(session, image, output, nodes).await,
        ImageCommand::Load { file, nodes, name, entrypoint } => {
            let start = ImageLoadStart { nodes: nodes.clone(), name: name.clone(), entrypoint: entrypoint.clone() };
            let summary = load(&session.client, file, start, io::stderr().is_terminal()).await?;
            report(file, &summary)
        }
    }
}

/// Writes an image's archive; what is incomplete does not get the file's name.
async fn save(session: &Session, image: &str, output: &Path, nodes: &[String]) -> Result<(), CliError> {
    let to_stdout = output == Path::new("-");
    if to_stdout && io::stdout().is_terminal() {
        return Err(CliError::usage("an archive is not for a terminal", "name a file with --output, or send it on"));
    }
    let mut archive = session.client.save_image(nodes.to_vec(), image).await?;
    if to_stdout {
        let failed = |error| CliError::file("write", Path::new("/dev/stdout"))(error);
        let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
        let mut stdout = tokio::fs::File::from_std(stdout.into());
        return receive(&mut archive, &mut stdout).await?.map_err(failed);
    }
    let dir = output.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    let part = dir.join(format!(".{name}.{}.part", std::process::id()));
    let mut file = tokio::fs::File::create(&part).await.map_err(CliError::file("create", &part))?;
    let received = match receive(&mut archive, &mut file).await {
        Ok(Ok(())) => tokio::fs::rename(&part, output).await.map_err(CliError::file("write", output)),
        Ok(Err(error)) => Err(CliError::file("write", &part)(error)),
        Err(error) => Err(error),
    };
    if received.is_err() {
        // The first error is the one to tell.
        let _ = tokio::fs::remove_file(&part).await;
    }
    received
}

/// Takes an archive to its end: an error of the cluster, or within, of the file.
async fn receive(
    archive: &mut ImageArchive,
    out: &mut (impl tokio::io::AsyncWrite + Unpin),
) -> Result<io::Result<()>, CliError> {
    while let Some(data) = archive.next().await? {
        if let Err(error) = out.write_all(&data).await {
            return Ok(Err(error));
        }
    }
    Ok(out.flush().await)
}

/// Loads an archive into nodes; with progress on standard error if wanted.
pub async fn load(
    client: &Client,
    file: &Path,
    start: ImageLoadStart,
    progress: bool,
) -> Result<ImageLoadSummary, CliError> {
    let sent = Arc::new(AtomicU64::new(0));
    if file == Path::new("-") {
        let stdin = Path::new("/dev/stdin");
        let opened = tokio::fs::File::open(stdin).await.map_err(CliError::file("read", stdin))?;
        let data = pieces(opened, sent, 0, progress);
        return Ok(client.load_image(start, data).await?);
    }
    let opened = tokio::fs::File::open(file).await.map_err(CliError::file("read", file))?;
    let meta = opened.metadata().await.map_err(CliError::file("read", file))?;
    if !meta.is_file() {
        let message = format!("{} is not a file", file.display());
        return Err(CliError::usage(message, "an image archive is one tar file: an OCI layout or a root file system"));
    }
    let data = pieces(opened, sent, meta.len(), progress);
    Ok(client.load_image(start, data).await?)
}

/// The file as a stream; says how far it is.
fn pieces<R>(
    input: R,
    sent: Arc<AtomicU64>,
    total: u64,
    progress: bool,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static
where
    R: tokio::io::AsyncRead + Unpin + Send + 'static,
{
    futures_util::stream::unfold(Some(input), move |input| {
        let sent = Arc::clone(&sent);
        async move {
            let mut input = input?;
            let mut piece = Vec::with_capacity(PIECE);
            let read = (&mut input).take(PIECE as u64).read_to_end(&mut piece).await;
            match read {
                Err(error) => Some((Err(error), None)),
                Ok(0) => {
                    if progress {
                        let _ = write!(io::stderr(), "\r{:40}\r", "");
                    }
                    None
                }
                Ok(length) => {
                    let so_far = sent.fetch_add(length as u64, Ordering::Relaxed) + length as u64;
                    if progress {
                        let share =
                            (so_far * 100).checked_div(total).map_or(String::new(), |share| format!(" ({share}%)"));
                        // Progress that cannot be shown is no failure.
                        let _ =
                            write!(io::stderr(), "\r{} sent{share}", size(so_far)).and_then(|()| io::stderr().flush());
                    }
                    Some((Ok(Bytes::from(piece)), Some(input)))
                }
            }
        }
    })
}

fn report(file: &Path, summary: &ImageLoadSummary) -> Result<(), CliError> {
    if summary.nodes.is_empty() {
        return Err(CliError::usage(
            format!("{} was loaded into no node: none is ready", file.display()),
            "see: minictl get nodes",
        ));
    }
    let mut table = image_table();
    let mut failed = 0;
    for node in &summary.nodes {
        if node.error.is_empty() {
            node.images.iter().for_each(|image| table.row(cells(&node.node, image)));
        } else {
            failed += 1;
            note!("error: node {}: {}", text::line(&node.node), text::block(&node.error));
        }
    }
    if !table.is_empty() {
        print(&table.render(true))?;
    }
    if failed > 0 { Err(CliError::Some { failed, all: summary.nodes.len() }) } else { Ok(()) }
}

/// The images of an answer by node; `nothing` when there are none.
fn table(summary: &ImageListSummary, nothing: &str) -> Result<(), CliError> {
    let (mut table, mut failed) = (image_table(), 0);
    for node in &summary.nodes {
        node.images.iter().for_each(|image| table.row(cells(&node.node, image)));
        if !node.error.is_empty() {
            failed += 1;
            note!("error: node {}: {}", text::line(&node.node), text::block(&node.error));
        }
    }
    if table.is_empty() && failed == 0 {
        note!("{nothing}");
        return Ok(());
    }
    print(&table.render(true))?;
    if failed > 0 { Err(CliError::Some { failed, all: summary.nodes.len() }) } else { Ok(()) }
}

fn image_table() -> Table {
    Table::new(&["NODE", "IMAGE", "DIGEST", "LAYERS", "SIZE"])
}

fn cells(node: &str, image: &ImageInfo) -> [String; 5] {
    let names = if image.names.is_empty() { "<none>".to_owned() } else { image.names.join(",") };
    // Twelve hexadecimal digits tell images apart for people.
    let digest = image.digest.strip_prefix("sha256:").unwrap_or(&image.digest).chars().take(12).collect();
    let bytes = u64::try_from(image.size_bytes).unwrap_or(0);
    [node.to_owned(), names, digest, image.layers.to_string(), size(bytes)]
}

/// Bytes in powers of 1024 with one digit after the point.
fn size(bytes: u64) -> String {
    let (mut whole, mut rest, mut unit) = (bytes, 0, 0);
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    while whole >= 1024 && unit + 1 < units.len() {
        (rest, whole) = (whole % 1024, whole / 1024);
        unit += 1;
    }
    let name = units.get(unit).copied().unwrap_or_default();
    if unit == 0 { format!("{whole}{name}") } else { format!("{whole}.{}{name}", rest * 10 / 1024) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (bytes, text) in
            [(0, "0B"), (1023, "1023B"), (1536, "1.5KiB"), (5 << 20, "5.0MiB"), (u64::MAX, "16777215.9TiB")]
        {
            assert_eq!(size(bytes), text);
        }
    }
}
