//! A registry that does what no registry should: an HTTP server of a few lines with an answer per path.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use minipod_nodeagent::image::Digest;
use sha2::{Digest as _, Sha256};

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// What it answers. `HOST` in a text stands for its own host and port.
#[derive(Clone)]
pub enum Answer {
    Is(&'static str, Vec<u8>),
    /// Promises so many bytes and ends the connection after fewer.
    Cut(Vec<u8>, usize),
    /// Promises so many bytes and sends no more after some.
    Hangs(Vec<u8>),
    /// Only for that `Authorization`; others get that challenge.
    Secret(String, String, Vec<u8>),
    /// That challenge, whatever is shown.
    Wants(String),
    /// This status, and chunks until nobody takes them any more.
    Endless(&'static str),
    /// A byte now and then.
    Drips(Vec<u8>),
    /// A redirection.
    SendsTo(String),
}

pub struct Liar {
    /// `host:port`.
    pub host: String,
    asked: Arc<AtomicUsize>,
}

impl Liar {
    pub fn start(answers: BTreeMap<String, Answer>) -> Liar {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let host = listener.local_addr().expect("bound").to_string();
        let asked = Arc::new(AtomicUsize::new(0));
        let (own, count) = (host.clone(), asked.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // Whoever connects has been there, also if no request comes.
                count.fetch_add(1, Ordering::Relaxed);
                let (own, answers) = (own.clone(), answers.clone());
                std::thread::spawn(move || answer(stream, &own, &answers));
            }
        });
        Liar { host, asked }
    }

    /// How many connections there were; each has one request.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

/// One request on one connection. An error means that the client is gone.
fn answer(mut stream: TcpStream, own: &str, answers: &BTreeMap<String, Answer>) -> Option<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        request.push(byte[0]);
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let path = request.split(' ').nth(1)?.split('?').next()?;
    let authorization = request.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("authorization").then(|| value.trim().to_owned())
    });
    let mut say = |bytes: &[u8]| stream.write_all(bytes).ok();
    let head = |status: &str, more: &str| format!("HTTP/1.1 {status}\r\n{more}\r\nConnection: close\r\n\r\n");
    let sized =
        |kind: &str, length: usize| head("200 OK", &format!("Content-Type: {kind}\r\nContent-Length: {length}"));
    let wants = |challenge: &str| {
        let challenge = challenge.replace("HOST", own);
        head("401 Unauthorized", &format!("WWW-Authenticate: {challenge}\r\nContent-Length: 0"))
    };
    match answers.get(path) {
        Some(Answer::Is(kind, body)) => {
            say(sized(kind, body.len()).as_bytes())?;
            say(body)
        }
        Some(Answer::Cut(body, promised)) => {
            say(sized("x/y", *promised).as_bytes())?;
            say(body)
        }
        Some(Answer::Hangs(body)) => {
            say(sized("x/y", body.len()).as_bytes())?;
            say(&body[..body.len() / 2])?;
            std::thread::sleep(Duration::from_secs(20));
            Some(())
        }
        Some(Answer::Secret(wanted, _, body)) if authorization.as_deref() == Some(wanted) => {
            say(sized(MANIFEST, body.len()).as_bytes())?;
            say(body)
        }
        Some(Answer::Secret(_, challenge, _) | Answer::Wants(challenge)) => say(wants(challenge).as_bytes()),
        Some(Answer::Endless(status)) => {
            say(head(status, "Transfer-Encoding: chunked").as_bytes())?;
            let chunk = [b"10000\r\n".as_slice(), &[b'x'; 0x1_0000], b"\r\n"].concat();
            loop {
                say(&chunk)?;
            }
        }
        Some(Answer::Drips(body)) => {
            say(sized("x/y", body.len()).as_bytes())?;
            for byte in body {
                say(&[*byte])?;
                std::thread::sleep(Duration::from_millis(300));
            }
            Some(())
        }
        Some(Answer::SendsTo(place)) => {
            let place = place.replace("HOST", own);
            say(head("307 Temporary Redirect", &format!("Location: {place}\r\nContent-Length: 0")).as_bytes())
        }
        None => say(head("404 Not Found", "Content-Length: 0").as_bytes()),
    }
}

pub fn digest(bytes: &[u8]) -> Digest {
    Digest::from_hash(&Sha256::digest(bytes))
}

/// A tar with one file.
pub fn layer(content: &[u8]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    tar.append_data(&mut header, "file", content).expect("in memory");
    tar.into_inner().expect("in memory")
}

/// A config of these layers, with more fields of its `config` object (`,"User":"x"`).
pub fn config_of(layers: &[&[u8]], more: &str) -> Vec<u8> {
    let arch = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let diffs: Vec<String> = layers.iter().map(|layer| format!("\"{}\"", digest(layer))).collect();
    format!(
        r#"{{"architecture":"{arch}","os":"linux","config":{{"Cmd":["x"]{more}}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
        diffs.join(",")
    )
    .into_bytes()
}

/// A manifest that says these sizes, whatever they are.
pub fn manifest_of(config: &[u8], config_size: u64, layers: &[(Digest, u64)]) -> Vec<u8> {
    let layers: Vec<String> = layers
        .iter()
        .map(|(digest, size)| format!(r#"{{"mediaType":"{LAYER}","digest":"{digest}","size":{size}}}"#))
        .collect();
    format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":{config_size}}},"layers":[{}]}}"#,
        digest(config),
        layers.join(",")
    )
    .into_bytes()
}

/// A small image: the answers for its manifest, config and layer; the manifest; the layer.
pub fn image(content: &[u8]) -> (BTreeMap<String, Answer>, Vec<u8>, Vec<u8>) {
    let layer = layer(content);
    let config = config_of(&[&layer], "");
    let manifest = manifest_of(&config, config.len() as u64, &[(digest(&layer), layer.len() as u64)]);
    let answers = BTreeMap::from([
        ("/v2/a/b/manifests/1".to_owned(), Answer::Is(MANIFEST, manifest.clone())),
        (format!("/v2/a/b/manifests/{}", digest(&manifest)), Answer::Is(MANIFEST, manifest.clone())),
        (format!("/v2/a/b/blobs/{}", digest(&config)), Answer::Is("x/y", config)),
        (format!("/v2/a/b/blobs/{}", digest(&layer)), Answer::Is("x/y", layer.clone())),
    ]);
    (answers, manifest, layer)
}
