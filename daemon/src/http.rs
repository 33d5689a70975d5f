//! `/healthz`, `/readyz` and `/metrics` over HTTP/1.1: three GETs, one answer a connection. Not for anything else, so no HTTP library.

use crate::metrics::Registry;
use crate::shutdown::Shutdown;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// A request's head may be this long, bytes.
const MAX_HEAD: usize = 8 * 1024;
/// A request and its answer may take this long.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections served at once; more wait in the kernel's queue.
const AT_ONCE: usize = 16;

/// Says whether the daemon can do its work: `Err` with what is wrong.
pub type Health = dyn Fn() -> Result<(), String> + Send + Sync;

/// What a daemon says of itself.
#[derive(Clone)]
pub struct Checks {
    /// `/healthz`: whether it works at all.
    pub health: Arc<Health>,
    /// `/readyz`: whether it does all of its work, such as taking writes.
    pub ready: Arc<Health>,
}

/// Serves `/healthz`, `/readyz` (the same here) and `/metrics` on `address` in the background until the shutdown. Returns the real
/// address (for port 0).
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(
    address: SocketAddr,
    metrics: Arc<Registry>,
    health: Arc<Health>,
    shutdown: Shutdown,
) -> std::io::Result<SocketAddr> {
    let ready = Arc::clone(&health);
    serve_checks(address, metrics, Checks { health, ready }, shutdown).await
}

/// As [`serve`], for a daemon that can be healthy and not ready.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve_checks(
    address: SocketAddr,
    metrics: Arc<Registry>,
    checks: Checks,
    shutdown: Shutdown,
) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let real = listener.local_addr()?;
    tracing::info!(%real, "serving /healthz, /readyz and /metrics");
    tokio::spawn(async move {
        let slots = Arc::new(Semaphore::new(AT_ONCE));
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
            let connection = tokio::select! {
                accepted = listener.accept() => accepted,
                () = shutdown.asked() => return,
            };
            let (metrics, checks) = (Arc::clone(&metrics), checks.clone());
            match connection {
                Ok((connection, _)) => drop(tokio::spawn(async move {
                    // A peer that breaks off or is too slow gets no answer; it is no problem of ours.
                    let _ = tokio::time::timeout(PATIENCE, one(connection, &metrics, &checks)).await;
                    drop(slot);
                })),
                Err(error) => {
                    tracing::warn!(%error, "accept a metrics connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(real)
}

async fn one(mut connection: TcpStream, metrics: &Registry, checks: &Checks) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() > MAX_HEAD {
            return send(&mut connection, "431 Request Header Fields Too Large", "the request is too long\n").await;
        }
        if connection.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let (status, body) = answer(&String::from_utf8_lossy(&head), metrics, checks);
    send(&mut connection, status, &body).await
}

/// The status line and body for a request's head.
fn answer(head: &str, metrics: &Registry, checks: &Checks) -> (&'static str, String) {
    let mut words = head.lines().next().unwrap_or_default().split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if method != "GET" {
        return ("405 Method Not Allowed", "only GET is served here\n".to_owned());
    }
    let told = |check: &Health| match check() {
        Ok(()) => ("200 OK", "ok\n".to_owned()),
        Err(problem) => ("503 Service Unavailable", format!("{problem}\n")),
    };
    match target.split('?').next().unwrap_or_default() {
        "/metrics" => ("200 OK", metrics.render()),
        "/healthz" => told(&*checks.health),
        "/readyz" => told(&*checks.ready),
        _ => ("404 Not Found", "only /healthz, /readyz and /metrics are here\n".to_owned()),
    }
}

async fn send(connection: &mut TcpStream, status: &str, body: &str) -> std::io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    connection.write_all(head.as_bytes()).await?;
    connection.write_all(body.as_bytes()).await?;
    connection.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut connection = TcpStream::connect(address).await.expect("connect");
        connection.write_all(request.as_bytes()).await.expect("write");
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.expect("read");
        answer
    }

    #[tokio::test]
    async fn serves_health_and_metrics_and_refuses_the_rest() {
        let metrics = Arc::new(Registry::default());
        metrics.counter("seen_total", &[], "Seen.").increment();
        let healthy = Arc::new(AtomicBool::new(true));
        let health: Arc<Health> = Arc::new({
            let healthy = Arc::clone(&healthy);
            move || if healthy.load(Ordering::Relaxed) { Ok(()) } else { Err("etcd cannot be reached".to_owned()) }
        });
        let (trigger, shutdown) = Shutdown::manual();
        let checks = Checks { health, ready: Arc::new(|| Err("the store is full".to_owned())) };
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let address = serve_checks(any, metrics, checks, shutdown).await.expect("listen");
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(ask(address, &get("/metrics")).await.contains("seen_total 1"));
        assert!(ask(address, &get("/healthz")).await.starts_with("HTTP/1.1 200"));
        let unready = ask(address, &get("/readyz")).await;
        assert!(unready.starts_with("HTTP/1.1 503") && unready.ends_with("the store is full\n"), "{unready}");
        healthy.store(false, Ordering::Relaxed);
        let sick = ask(address, &get("/healthz?verbose")).await;
        assert!(sick.starts_with("HTTP/1.1 503") && sick.ends_with("etcd cannot be reached\n"), "{sick}");
        assert!(ask(address, &get("/")).await.starts_with("HTTP/1.1 404"));
        assert!(ask(address, "POST /metrics HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 405"));
        assert!(
            ask(address, &format!("GET /{} HTTP/1.1\r\n", "x".repeat(2 * MAX_HEAD))).await.starts_with("HTTP/1.1 431")
        );
        trigger.end();
    }
}
