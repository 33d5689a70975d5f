//! The registry's side of a pull: HTTP with its token dance (OCI distribution specification 1.1, and Docker's token authentication).
//!
//! A registry is whatever a manifest names, so nothing of it is trusted: every answer but a layer is bounded in bytes and in time, it may ask for
//! credentials once per request, and where it sends us on to is looked at first. Elsewhere must speak TLS and is never this machine itself
//! (its services, a cloud's metadata) unless the node's operator has named that host.

use std::collections::HashMap;
use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{ACCEPT, HeaderMap, LOCATION, WWW_AUTHENTICATE};
use reqwest::redirect::Policy;
use reqwest::{Certificate, Client, ClientBuilder, Method, RequestBuilder, Response, StatusCode, Url};

use super::certs::{self, CertsError};
use super::pull::Credentials;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// As browsers and the field's tools have it.
const MAX_REDIRECTS: usize = 10;
/// Most of an answer to a request for a token; real ones have some kilobytes.
const MAX_TOKEN_BYTES: u64 = 1 << 20;
/// Most of an error's text that is shown.
const MAX_SAID_BYTES: usize = 200;
/// What an answer that is not a layer may take, in times of the silence that is allowed.
const SMALL_ANSWER_SILENCES: u32 = 4;
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
                         application/vnd.docker.distribution.manifest.list.v2+json, \
                         application/vnd.docker.distribution.manifest.v2+json";

/// What a registry did instead of answering.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// It has no such manifest or blob.
    #[error("it is not there")]
    NotFound,
    /// It wants credentials, or others.
    #[error("it wants credentials that allow it")]
    Unauthorized,
    /// It cannot be reached, or broke off.
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    /// Nobody who is trusted says that it is who it should be.
    #[error(transparent)]
    Untrusted(Box<Untrusted>),
    /// It answers in the clear.
    #[error("{0} does not speak TLS: where it should not, --registry-http wants its name")]
    NoTls(String),
    /// What the operator says of its certificates cannot be used.
    #[error("its certificates on this node")]
    Certs(#[source] Box<CertsError>),
    /// Another status than was to be expected.
    #[error("it answers {status}: {said}")]
    Status {
        /// HTTP's.
        status: StatusCode,
        /// The beginning of its text.
        said: String,
    },
    /// It sends more than such an answer can have.
    #[error("its answer has more than {limit} bytes")]
    TooBig {
        /// The most.
        limit: u64,
    },
    /// It takes longer than such an answer can take.
    #[error("its answer is not complete after {} s", .0.as_secs())]
    Slow(Duration),
    /// It sends us to a place where we do not go.
    #[error("it sends us on to {to}: {why}")]
    Elsewhere {
        /// Where to.
        to: String,
        /// Why not.
        why: &'static str,
    },
    /// Its answer makes no sense.
    #[error("its answer is malformed: {0}")]
    Malformed(&'static str),
}

/// A registry's certificate that nobody who is trusted has signed, or not for it, or not for now.
#[derive(Debug, thiserror::Error)]
#[error("{host} is not trusted ({why}): where it should be, {} wants its authority's certificate", place.display())]
pub struct Untrusted {
    /// `host[:port]`.
    pub host: String,
    /// What is wrong with its certificate.
    pub why: String,
    /// Where an operator says whom to trust.
    pub place: PathBuf,
}

/// The HTTP clients of all pulls.
#[derive(Debug)]
pub(super) struct Clients {
    /// For hosts that the manifest or the operator has named.
    named: Client,
    /// For hosts that a registry has named.
    elsewhere: Client,
    /// How long a registry may say nothing.
    patience: Duration,
    /// The operator's directories of certificates.
    certs: PathBuf,
}

impl Clients {
    /// # Errors
    /// When TLS cannot be set up.
    pub(super) fn new(patience: Duration, certs: PathBuf) -> Result<Self, reqwest::Error> {
        let named = trusting(|| builder(patience), Vec::new())?;
        let elsewhere = trusting(|| builder(patience).dns_resolver(Elsewhere), Vec::new())?;
        Ok(Self { named, elsewhere, patience, certs })
    }

    /// One for a host that the operator has a directory of certificates for.
    fn trusting(&self, host: &str) -> Result<Option<Client>, RegistryError> {
        let Some(certs) = certs::read(&self.certs, host).map_err(|error| RegistryError::Certs(Box::new(error)))? else {
            return Ok(None);
        };
        let client = || match &certs.identity {
            Some(identity) => builder(self.patience).identity(identity.clone()),
            None => builder(self.patience),
        };
        Ok(Some(trusting(client, certs.authorities)?))
    }
}

/// With the system's authorities and these. A system may have none (Debian without ca-certificates): there these alone are trusted, and
/// registries without TLS are reached all the same.
fn trusting(client: impl Fn() -> ClientBuilder, authorities: Vec<Certificate>) -> Result<Client, reqwest::Error> {
    client().tls_certs_merge(authorities.clone()).build().or_else(|_| client().tls_certs_only(authorities).build())
}

/// Redirections are followed by `Registry::go`, which looks where they lead.
fn builder(patience: Duration) -> ClientBuilder {
    Client::builder()
        .redirect(Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(patience)
        .user_agent(concat!("minipod/", env!("CARGO_PKG_VERSION")))
}

/// Resolves names, but to none of this machine's own addresses.
#[derive(Debug)]
struct Elsewhere;

impl Resolve for Elsewhere {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let all = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let others: Vec<SocketAddr> = all.filter(|address| !is_here(address.ip())).collect();
            if others.is_empty() {
                return Err("the name stands for an address of this machine itself".into());
            }
            Ok(Box::new(others.into_iter()) as Addrs)
        })
    }
}

/// Whether an address leads to this machine's own services, or to what its link alone has, such as a cloud's metadata.
fn is_here(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_unspecified() || v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unspecified() || v6.is_unicast_link_local(),
    }
}

/// How a request shows who it comes from.
#[derive(Clone)]
enum Proof {
    Basic(Credentials),
    Bearer(String),
}

impl std::fmt::Debug for Proof {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Self::Basic(_)) { "Basic" } else { "Bearer" })
    }
}

/// One registry, for one pull: a token that one pod's secret brought is not for another pod (KEP-2535).
#[derive(Debug)]
pub(super) struct Registry {
    clients: Arc<Clients>,
    base: Url,
    /// As people write it.
    name: String,
    /// Hosts that were asked for, with the client of those that the operator has certificates for.
    trusting: Mutex<HashMap<String, Option<Client>>>,
    /// `host[:port]` of those that are spoken to without TLS.
    plain_http: Vec<String>,
    repository: String,
    credentials: Option<Credentials>,
    proof: Mutex<Option<Proof>>,
}

impl Registry {
    /// `host` is the registry's `host[:port]`, `repository` the image's name there.
    ///
    /// # Errors
    /// When the host is none.
    pub(super) fn new(
        clients: Arc<Clients>,
        (host, repository): (&str, &str),
        plain_http: &[String],
        credentials: Option<Credentials>,
    ) -> Result<Self, RegistryError> {
        let scheme = if plain_http.iter().any(|plain| plain == host) { "http" } else { "https" };
        let name = host.to_owned();
        // The name that people know is not that of the host which serves it.
        let host = if host == "docker.io" { "registry-1.docker.io" } else { host };
        let base = Url::parse(&format!("{scheme}://{host}/v2/"));
        let base = base.map_err(|_| RegistryError::Malformed("its name is no host"))?;
        let (plain_http, repository) = (plain_http.to_vec(), repository.to_owned());
        let (trusting, proof) = Default::default();
        Ok(Self { clients, base, name, trusting, plain_http, repository, credentials, proof })
    }

    /// A manifest or an index by tag or digest, as it is sent.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub(super) async fn manifest(&self, reference: &str, limit: u64) -> Result<Vec<u8>, RegistryError> {
        let answer = async { body(self.ask(Method::GET, &format!("manifests/{reference}")).await?, limit).await };
        self.in_time(answer).await
    }

    /// The digest that it says a tag has, if it says so.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub(super) async fn digest(&self, tag: &str) -> Result<Option<String>, RegistryError> {
        let answer = self.in_time(self.ask(Method::HEAD, &format!("manifests/{tag}"))).await?;
        let digest = answer.headers().get("docker-content-digest");
        Ok(digest.and_then(|digest| digest.to_str().ok()).map(str::to_owned))
    }

    /// A blob's content is about to come: how long that takes is the caller's matter.
    ///
    /// # Errors
    /// See [`RegistryError`].
    pub(super) async fn blob(&self, digest: &str) -> Result<Response, RegistryError> {
        self.in_time(self.ask(Method::GET, &format!("blobs/{digest}"))).await
    }

    /// Whoever sends a byte now and then is not silent, and not done either.
    async fn in_time<T>(&self, answer: impl Future<Output = Result<T, RegistryError>>) -> Result<T, RegistryError> {
        let most = self.clients.patience * SMALL_ANSWER_SILENCES;
        tokio::time::timeout(most, answer).await.unwrap_or(Err(RegistryError::Slow(most)))
    }

    /// Asks; shows credentials if that is wanted, once: a registry that wants more has refused.
    async fn ask(&self, method: Method, what: &str) -> Result<Response, RegistryError> {
        let path = format!("{}/{what}", self.repository);
        let url = self.base.join(&path).map_err(|_| RegistryError::Malformed("the image's name is no path"))?;
        let known = self.proof.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut answer = self.go(method.clone(), url.clone(), known).await?;
        if answer.status() == StatusCode::UNAUTHORIZED {
            let proof = self.prove(answer.headers()).await?;
            *self.proof.lock().unwrap_or_else(PoisonError::into_inner) = Some(proof.clone());
            answer = self.go(method, url, Some(proof)).await?;
        }
        match answer.status() {
            status if status.is_success() => Ok(answer),
            StatusCode::NOT_FOUND => Err(RegistryError::NotFound),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(RegistryError::Unauthorized),
            status => Err(RegistryError::Status { status, said: said(answer).await }),
        }
    }

    /// One request and where it leads. The proof is for the registry itself and for nobody else.
    async fn go(&self, method: Method, mut url: Url, proof: Option<Proof>) -> Result<Response, RegistryError> {
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.request(method.clone(), &url)?.header(ACCEPT, MANIFESTS);
            if let Some(proof) = proof.as_ref().filter(|_| self.is_home(&url)) {
                request = proof.on(request);
            }
            let answer = request.send().await.map_err(|error| self.not_reached(&url, error))?;
            if !answer.status().is_redirection() {
                return Ok(answer);
            }
            let place = answer.headers().get(LOCATION).and_then(|place| place.to_str().ok());
            let place = place.ok_or(RegistryError::Malformed("it sends us on without saying where to"))?;
            url = url.join(place).map_err(|_| RegistryError::Malformed("where it sends us on to is no URL"))?;
        }
        Err(RegistryError::Elsewhere { to: shown(&url), why: "it has sent us about too often" })
    }

    /// A request to a place that may be asked.
    fn request(&self, method: Method, url: &Url) -> Result<RequestBuilder, RegistryError> {
        if let Some(client) = self.trusting(url)? {
            return Ok(client.request(method, url.clone()));
        }
        if self.is_home(url) || self.is_plain(url) {
            return Ok(self.clients.named.request(method, url.clone()));
        }
        let refused = |why| RegistryError::Elsewhere { to: shown(url), why };
        if url.scheme() != "https" {
            return Err(refused("it speaks no TLS, and --registry-http does not name it"));
        }
        let host = url.host_str().unwrap_or_default();
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        if address.is_ok_and(is_here) {
            return Err(refused("that is this machine itself, and --registry-http does not name it"));
        }
        Ok(self.clients.elsewhere.request(method, url.clone()))
    }

    /// The client for a place whose certificates the operator has named, and thereby the place.
    fn trusting(&self, url: &Url) -> Result<Option<Client>, RegistryError> {
        if url.scheme() != "https" {
            return Ok(None);
        }
        let host = host_of(url);
        let mut known = self.trusting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = known.get(&host) {
            return Ok(client.clone());
        }
        let mut client = self.clients.trusting(&host)?;
        if client.is_none() && self.is_home(url) && self.name != host {
            client = self.clients.trusting(&self.name)?;
        }
        known.insert(host, client.clone());
        Ok(client)
    }

    /// Says what to do where TLS is what failed.
    fn not_reached(&self, url: &Url, error: reqwest::Error) -> RegistryError {
        let host = host_of(url);
        match tls_error(&error) {
            Some(rustls::Error::InvalidCertificate(why)) => {
                let place = self.clients.certs.join(if self.is_home(url) { &self.name } else { &host });
                RegistryError::Untrusted(Box::new(Untrusted { why: why.to_string(), place, host }))
            }
            Some(rustls::Error::InvalidMessage(_)) => RegistryError::NoTls(host),
            _ => RegistryError::Http(error),
        }
    }

    fn is_home(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    fn is_plain(&self, url: &Url) -> bool {
        let host = url.host_str().unwrap_or_default();
        let port = url.port_or_known_default().unwrap_or_default();
        let named = |plain: &String| *plain == format!("{host}:{port}") || (port == 80 && plain == host);
        url.scheme() == "http" && self.plain_http.iter().any(named)
    }

    /// What the registry asks for: the credentials themselves, or a token of the server that it names.
    async fn prove(&self, headers: &HeaderMap) -> Result<Proof, RegistryError> {
        let texts = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|text| text.to_str().ok());
        let challenges: Vec<Challenge<'_>> = texts.filter_map(Challenge::read).collect();
        if let Some(bearer) = challenges.iter().find(|challenge| challenge.scheme.eq_ignore_ascii_case("bearer")) {
            return self.token(bearer).await.map(Proof::Bearer);
        }
        let is_basic = challenges.iter().any(|challenge| challenge.scheme.eq_ignore_ascii_case("basic"));
        let credentials = self.credentials.clone().filter(|_| is_basic);
        credentials.map(Proof::Basic).ok_or(RegistryError::Unauthorized)
    }

    async fn token(&self, challenge: &Challenge<'_>) -> Result<String, RegistryError> {
        #[derive(serde::Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let realm = challenge.get("realm").and_then(|realm| Url::parse(realm).ok());
        let mut url = realm.ok_or(RegistryError::Malformed("it wants a token and does not say from where"))?;
        let scope = format!("repository:{}:pull", self.repository);
        url.query_pairs_mut().append_pair("scope", &scope);
        if let Some(service) = challenge.get("service") {
            url.query_pairs_mut().append_pair("service", service);
        }
        let mut request = self.request(Method::GET, &url)?;
        if let Some(credentials) = &self.credentials {
            request = Proof::Basic(credentials.clone()).on(request);
        }
        // Not followed anywhere: the credentials are with it.
        let answer = request.send().await.map_err(|error| self.not_reached(&url, error))?;
        if !answer.status().is_success() {
            return Err(RegistryError::Unauthorized);
        }
        let bytes = body(answer, MAX_TOKEN_BYTES).await?;
        let no_token = RegistryError::Malformed("no token comes from where it sends us for one");
        let Ok(answer) = serde_json::from_slice::<Answer>(&bytes) else { return Err(no_token) };
        answer.token.or(answer.access_token).ok_or(no_token)
    }
}

impl Proof {
    fn on(&self, request: RequestBuilder) -> RequestBuilder {
        match self {
            Self::Basic(Credentials { user, password }) => request.basic_auth(user, Some(password)),
            Self::Bearer(token) => request.bearer_auth(token),
        }
    }
}

/// One `WWW-Authenticate` (RFC 9110, section 11.6.1), of which the field writes one challenge per header.
#[derive(Debug, PartialEq, Eq)]
struct Challenge<'a> {
    scheme: &'a str,
    parameters: Vec<(&'a str, &'a str)>,
}

impl<'a> Challenge<'a> {
    fn read(text: &'a str) -> Option<Self> {
        let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        let mut parameters = Vec::new();
        while let Some((name, value)) = rest.split_once('=') {
            let (value, after) = match value.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => value.split_at(value.find(',').unwrap_or(value.len())),
            };
            parameters.push((name.trim_matches([' ', ',']), value));
            rest = after;
        }
        (!scheme.is_empty()).then_some(Self { scheme, parameters })
    }

    fn get(&self, name: &str) -> Option<&'a str> {
        self.parameters.iter().find(|(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
    }
}

/// The whole of an answer, if it is not too long.
async fn body(mut answer: Response, limit: u64) -> Result<Vec<u8>, RegistryError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() as u64 > limit {
            return Err(RegistryError::TooBig { limit });
        }
    }
    Ok(bytes)
}

/// The beginning of an error's text, fit to be shown.
async fn said(mut answer: Response) -> String {
    let mut bytes = Vec::new();
    while bytes.len() < MAX_SAID_BYTES
        && let Ok(Some(chunk)) = answer.chunk().await
    {
        bytes.extend_from_slice(&chunk);
    }
    bytes.truncate(MAX_SAID_BYTES);
    String::from_utf8_lossy(&bytes).escape_debug().to_string()
}

/// `host[:port]`, the port where it is not that of the scheme.
fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// What TLS had to say of an error, if it was TLS.
fn tls_error(error: &reqwest::Error) -> Option<&rustls::Error> {
    let mut next = error.source();
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = match error.downcast_ref::<std::io::Error>() {
            // Its source is that of what it wraps, not what it wraps.
            Some(error) => error.get_ref().map(|inner| inner as &(dyn Error + 'static)),
            None => error.source(),
        };
    }
    None
}

/// Without its query, which can hold signatures.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    // An error means that it can have none.
    let _ = url.set_password(None);
    url.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let bearer =
            r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a/b:pull,push""#;
        let read = Challenge::read(bearer).expect("a challenge");
        assert_eq!((read.scheme, read.get("realm")), ("Bearer", Some("https://auth.example/token")));
        assert_eq!(read.get("Service"), Some("registry.example"));
        assert_eq!(read.get("scope"), Some("repository:a/b:pull,push"));
        for (text, parameters) in [
            ("Basic", vec![]),
            ("Basic realm=x", vec![("realm", "x")]),
            ("Basic realm=x, charset=\"UTF-8\"", vec![("realm", "x"), ("charset", "UTF-8")]),
            ("Basic realm=\"\"", vec![("realm", "")]),
        ] {
            assert_eq!(Challenge::read(text), Some(Challenge { scheme: "Basic", parameters }), "{text}");
        }
        for bad in ["", "Bearer realm=\"x"] {
            assert_eq!(Challenge::read(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_registry_sends_nobody_to_the_node_itself() {
        // An error means that another test was first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let clients = Arc::new(Clients::new(Duration::from_secs(1), "/nonexistent".into()).expect("clients"));
        let plain = ["127.0.0.1:5000".to_owned(), "mirror.example".to_owned()];
        let registry = Registry::new(clients, ("registry.example", "a/b"), &plain, None).expect("a registry");
        for (to, may) in [
            ("https://registry.example/v2/", true),
            ("https://cdn.example/blob?signature=x", true),
            ("https://10.0.0.7/", true),
            ("http://127.0.0.1:5000/x", true),
            ("http://mirror.example/x", true),
            ("http://127.0.0.1:5001/x", false),
            ("http://registry.example/v2/", false),
            ("http://cdn.example/blob", false),
            ("https://127.0.0.1/", false),
            ("https://127.1/", false),
            ("https://2130706433:2379/", false),
            ("https://0.0.0.0/", false),
            ("https://169.254.169.254/latest/meta-data/", false),
            ("https://[::1]/", false),
            ("https://[::ffff:127.0.0.1]/", false),
            ("https://[fe80::1]/", false),
            ("ftp://cdn.example/", false),
            ("file:///etc/passwd", false),
        ] {
            let request = registry.request(Method::GET, &Url::parse(to).expect(to));
            assert_eq!(request.is_ok(), may, "{to}: {request:?}");
        }
    }

    #[tokio::test]
    async fn a_name_that_stands_for_this_machine_is_nowhere() {
        let addresses = Elsewhere.resolve("localhost".parse().expect("a name")).await.map(|found| found.count());
        let why = addresses.expect_err("localhost is here").to_string();
        assert!(why.contains("this machine"), "{why}");
    }
}
