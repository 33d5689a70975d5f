//! Performs probes and hooks. Whatever is asked from outside goes from the node's namespace to the pod's address.

use std::sync::OnceLock;
use std::time::Duration;

use minipod_proto::v1::int_or_string::Value as Port;
use minipod_proto::v1::{
    Container, ExecAction, GrpcAction, HttpGetAction, IntOrString, LifecycleHandler, Probe, TcpSocketAction,
};
use reqwest::header::{HeaderName, HeaderValue};
use tokio::time::timeout;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::Outcome;
use crate::shim::{ExecOutput, ExecStreams, Shim};

/// Of what a probe says, this much is kept (Kubernetes' value).
const MAX_OUTPUT_BYTES: usize = 10 << 10;
/// Redirects that are followed (Kubernetes' value).
const MAX_REDIRECTS: usize = 10;

/// Whom a probe or hook is for.
#[derive(Debug, Clone)]
pub struct Target {
    /// The pod's supervisor.
    pub shim: Option<Shim>,
    /// The container.
    pub container: Container,
    /// Its run.
    pub attempt: u32,
    /// The pod's address, the node's for a pod on the node's network.
    pub address: String,
}

/// Performs a probe within its timeout.
pub async fn probe(target: &Target, probe: &Probe) -> Outcome {
    let seconds = u64::try_from(probe.timeout_seconds).unwrap_or(0).max(1);
    match timeout(Duration::from_secs(seconds), ask(target, probe)).await {
        Ok(outcome) => outcome,
        Err(_) => Outcome::Failure(format!("no answer within {seconds} s")),
    }
}

async fn ask(target: &Target, probe: &Probe) -> Outcome {
    if let Some(action) = &probe.exec {
        exec(target, action).await
    } else if let Some(action) = &probe.http_get {
        http(target, action).await
    } else if let Some(action) = &probe.tcp_socket {
        tcp(target, action).await
    } else if let Some(action) = &probe.grpc {
        grpc(target, action).await
    } else {
        Outcome::Unknown("the probe says nothing to do".to_owned())
    }
}

/// Performs a hook; it has the time that its run lives.
///
/// # Errors
/// Why it failed.
pub async fn hook(target: &Target, handler: &LifecycleHandler) -> Result<(), String> {
    if let Some(action) = &handler.exec {
        return match exec(target, action).await {
            Outcome::Success(_) => Ok(()),
            Outcome::Failure(why) | Outcome::Unknown(why) => Err(why),
        };
    }
    if let Some(action) = &handler.http_get {
        // As in Kubernetes any answer will do.
        return send(target, action).await.map(drop);
    }
    if let Some(sleep) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
        return Ok(());
    }
    Err("the hook says nothing that can be done, want exec, httpGet or sleep".to_owned())
}

async fn exec(target: &Target, action: &ExecAction) -> Outcome {
    let Some(shim) = &target.shim else {
        return Outcome::Unknown("the pod's supervisor is not connected".to_owned());
    };
    let mut process =
        match shim.exec(&target.container.name, target.attempt, &action.command, ExecStreams::default()).await {
            Ok(process) => process,
            Err(error) => return Outcome::Unknown(crate::report::chain(&error)),
        };
    let mut output = Vec::new();
    loop {
        match process.next().await {
            Some(ExecOutput::Stdout(data) | ExecOutput::Stderr(data)) => {
                let room = MAX_OUTPUT_BYTES.saturating_sub(output.len());
                output.extend(data.into_iter().take(room));
            }
            Some(ExecOutput::Exited(0)) => return Outcome::Success(String::new()),
            Some(ExecOutput::Exited(code)) => {
                let text = String::from_utf8_lossy(&output);
                return Outcome::Failure(format!("exit code {code}: {}", text.trim_end()));
            }
            None => return Outcome::Unknown("the pod's supervisor ended".to_owned()),
        }
    }
}

async fn http(target: &Target, action: &HttpGetAction) -> Outcome {
    match send(target, action).await {
        Ok(response) if response.status().is_success() => Outcome::Success(String::new()),
        Ok(response) if response.status().is_redirection() => {
            Outcome::Success("the answer redirects to another host and was not followed".to_owned())
        }
        Ok(response) => Outcome::Failure(format!("HTTP probe failed with statuscode: {}", response.status().as_u16())),
        Err(why) => Outcome::Failure(why),
    }
}

async fn send(target: &Target, action: &HttpGetAction) -> Result<reqwest::Response, String> {
    let port = port_number(&target.container, action.port.as_ref())?;
    let host = bracketed(if action.host.is_empty() { &target.address } else { &action.host });
    let scheme = if action.scheme.eq_ignore_ascii_case("https") { "https" } else { "http" };
    let slash = if action.path.starts_with('/') { "" } else { "/" };
    let mut request = client()?.get(format!("{scheme}://{host}:{port}{slash}{}", action.path));
    for header in &action.http_headers {
        let wrong = |error: String| format!("header {:?}: {error}", header.name);
        let name = HeaderName::from_bytes(header.name.as_bytes()).map_err(|error| wrong(error.to_string()))?;
        let value = HeaderValue::from_str(&header.value).map_err(|error| wrong(error.to_string()))?;
        request = request.header(name, value);
    }
    request.send().await.map_err(|error| crate::report::chain(&error))
}

/// One client for all; it keeps no connections, because a probe shall find out whether new ones are taken.
fn client() -> Result<&'static reqwest::Client, String> {
    static CLIENT: OnceLock<Result<reqwest::Client, String>> = OnceLock::new();
    let made = CLIENT.get_or_init(|| {
        // An error means that the process has chosen its TLS provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let redirect = reqwest::redirect::Policy::custom(|attempt| {
            let same = attempt.previous().first().is_none_or(|first| first.host_str() == attempt.url().host_str());
            match attempt.previous().len() {
                MAX_REDIRECTS.. if same => attempt.error("too many redirects"),
                _ if same => attempt.follow(),
                _ => attempt.stop(),
            }
        });
        let builder = reqwest::Client::builder()
            .user_agent(concat!("minipod-probe/", env!("CARGO_PKG_VERSION")))
            .no_proxy()
            .pool_max_idle_per_host(0)
            // As in Kubernetes: a probe asks whether it answers, not who it is.
            .danger_accept_invalid_certs(true)
            .redirect(redirect);
        builder.build().map_err(|error| crate::report::chain(&error))
    });
    made.as_ref().map_err(Clone::clone)
}

async fn tcp(target: &Target, action: &TcpSocketAction) -> Outcome {
    let port = match port_number(&target.container, action.port.as_ref()) {
        Ok(port) => port,
        Err(why) => return Outcome::Failure(why),
    };
    let host = if action.host.is_empty() { &target.address } else { &action.host };
    match tokio::net::TcpStream::connect((host.as_str(), port)).await {
        Ok(_) => Outcome::Success(String::new()),
        Err(error) => Outcome::Failure(format!("connect to {host}:{port}: {error}")),
    }
}

async fn grpc(target: &Target, action: &GrpcAction) -> Outcome {
    let url = format!("http://{}:{}", bracketed(&target.address), action.port);
    let failure = |error: &(dyn std::error::Error + 'static)| Outcome::Failure(crate::report::chain(error));
    let endpoint = match tonic::transport::Endpoint::from_shared(url) {
        Ok(endpoint) => endpoint,
        Err(error) => return failure(&error),
    };
    let channel = match endpoint.connect().await {
        Ok(channel) => channel,
        Err(error) => return failure(&error),
    };
    let request = HealthCheckRequest { service: action.service.clone().unwrap_or_default() };
    match HealthClient::new(channel).check(request).await {
        Ok(answer) if answer.get_ref().status() == ServingStatus::Serving => Outcome::Success(String::new()),
        Ok(answer) => Outcome::Failure(format!("the service is {}", answer.get_ref().status().as_str_name())),
        Err(status) => Outcome::Failure(format!("{:?}: {}", status.code(), status.message())),
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() }
}

fn port_number(container: &Container, port: Option<&IntOrString>) -> Result<u16, String> {
    let number = match port.and_then(|port| port.value.as_ref()) {
        Some(Port::Int(number)) => i64::from(*number),
        Some(Port::Str(name)) => {
            let named = container.ports.iter().find(|port| port.name == *name);
            named.map(|port| i64::from(port.container_port)).ok_or_else(|| format!("no port is named {name:?}"))?
        }
        None => return Err("the port is missing".to_owned()),
    };
    u16::try_from(number).map_err(|_| format!("port {number} is none, want 1 to 65535"))
}
