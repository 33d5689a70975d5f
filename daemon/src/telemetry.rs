//! Logging to stderr, and traces to an OpenTelemetry collector.
//!
//! `RUST_LOG` chooses what is logged, `MINIPOD_LOG_FORMAT` how. With `OTEL_EXPORTER_OTLP_ENDPOINT` (the variable of the
//! OpenTelemetry specification, for example `http://127.0.0.1:4317`) the spans that pass the same filter leave as OTLP over gRPC.

use std::io::IsTerminal;
use std::sync::OnceLock;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `RUST_LOG` cannot be read.
    #[error("RUST_LOG {value:?}: {source}; write it like info or warn,minipod_apiserver=debug")]
    Filter {
        /// As it was given.
        value: String,
        /// What is wrong with it.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// `MINIPOD_LOG_FORMAT` has an unknown value.
    #[error("MINIPOD_LOG_FORMAT {0:?}: only text and json are known")]
    Format(String),
    /// The collector's address cannot be used.
    #[error("{ENDPOINT} {endpoint:?}; write it like http://127.0.0.1:4317")]
    Endpoint {
        /// As it was given.
        endpoint: String,
        /// What is wrong with it.
        #[source]
        source: ExporterBuildError,
    },
    /// A subscriber is there already.
    #[error("logging was set up twice")]
    Twice,
}

/// Where spans wait until they are sent; there is one per process, like the subscriber.
static TRACES: OnceLock<SdkTracerProvider> = OnceLock::new();

/// Sends the process's log to stderr: level info unless `RUST_LOG` says otherwise, as text or, with
/// `MINIPOD_LOG_FORMAT=json`, as one JSON object a line. Traces as the module says. Call it within a tokio runtime.
///
/// # Errors
/// When one of the variables is not understood, or logging is set up already.
pub fn init() -> Result<(), TelemetryError> {
    let value = std::env::var("RUST_LOG").unwrap_or_default();
    let wanted = if value.is_empty() { "info" } else { &value };
    let filter =
        EnvFilter::try_new(wanted).map_err(|source| TelemetryError::Filter { value: value.clone(), source })?;
    let lines = log_lines(&std::env::var("MINIPOD_LOG_FORMAT").unwrap_or_default())?;
    let spans = match std::env::var(ENDPOINT) {
        Ok(endpoint) if !endpoint.is_empty() => {
            let provider = exporter(&endpoint)?;
            let tracer = provider.tracer("minipod");
            // The first one stays; a second `init` is refused below.
            let _ = TRACES.set(provider);
            Some(tracing_opentelemetry::layer().with_tracer(tracer))
        }
        _ => None,
    };
    let layers = lines.and_then(spans);
    tracing_subscriber::registry().with(layers.with_filter(filter)).try_init().map_err(|_| TelemetryError::Twice)
}

/// Sends what is left of the traces; the last thing a process does. Blocks for a moment.
pub fn flush() {
    if let Some(provider) = TRACES.get()
        && let Err(error) = provider.shutdown()
    {
        tracing::debug!(%error, "some traces were not sent");
    }
}

fn log_lines(format: &str) -> Result<Box<dyn Layer<Registry> + Send + Sync>, TelemetryError> {
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match format {
        "" | "text" => Ok(lines.with_ansi(std::io::stderr().is_terminal()).boxed()),
        "json" => Ok(lines.json().boxed()),
        _ => Err(TelemetryError::Format(format.to_owned())),
    }
}

fn exporter(endpoint: &str) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()
        .map_err(|source| TelemetryError::Endpoint { endpoint: endpoint.to_owned(), source })?;
    let resource = Resource::builder().with_service_name(service_name());
    Ok(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build())
}

/// `OTEL_SERVICE_NAME`, or the name of the executable.
fn service_name() -> String {
    if let Ok(name) = std::env::var("OTEL_SERVICE_NAME") {
        return name;
    }
    let exe = std::env::current_exe().ok();
    exe.and_then(|exe| Some(exe.file_name()?.to_string_lossy().into_owned())).unwrap_or_else(|| "minipod".to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
    use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response, Status};

    use super::*;

    /// A collector that hands on what it gets.
    struct Collector(mpsc::Sender<ExportTraceServiceRequest>);

    #[tonic::async_trait]
    impl TraceService for Collector {
        async fn export(
            &self,
            request: Request<ExportTraceServiceRequest>,
        ) -> Result<Response<ExportTraceServiceResponse>, Status> {
            self.0.send(request.into_inner()).await.map_err(|_| Status::cancelled("the test is over"))?;
            Ok(Response::new(ExportTraceServiceResponse::default()))
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn spans_reach_a_collector_with_their_fields() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("bound"));
        let (sender, mut received) = mpsc::channel(4);
        let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Collector(sender)));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

        let provider = exporter(&endpoint).expect("the address is good");
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::info_span!("bind", pod = "default/web").in_scope(|| tracing::info!("decided"));
        });
        let flushed = tokio::task::spawn_blocking(move || provider.shutdown()).await.expect("no panic");
        flushed.expect("the collector answers");

        let request = tokio::time::timeout(Duration::from_secs(10), received.recv()).await.expect("in time");
        let spans = request.expect("one request").resource_spans;
        let span = &spans[0].scope_spans[0].spans[0];
        assert_eq!(span.name, "bind");
        assert!(span.attributes.iter().any(|attribute| attribute.key == "pod"), "{:?}", span.attributes);
    }

    #[tokio::test]
    async fn a_wrong_collector_or_format_is_said() {
        let error = exporter("not a url").expect_err("refused").to_string();
        assert!(error.contains("not a url") && error.contains("http://127.0.0.1:4317"), "{error}");
        let error = log_lines("xml").map(|_| ()).expect_err("refused").to_string();
        assert!(error.contains("only text and json"), "{error}");
    }
}
