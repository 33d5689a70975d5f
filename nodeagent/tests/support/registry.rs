//! Debian's docker-registry for a test, filled with skopeo. The tests of whole clusters have this file too, by its path.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A registry that goes with this value.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    /// `host:port`.
    pub host: String,
    dir: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        // An error means that it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Only who is in the file USERS.
const AUTH: &str = "auth: {htpasswd: {realm: test, path: 'USERS'}}\n";

/// A port that nobody listens on now.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

impl Registry {
    /// One on loopback.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start() -> Registry {
        Registry::start_with(loopback(), "", "")
    }

    /// One on loopback that opens to `user` with the password `word` alone.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn closed() -> Registry {
        Registry::start_with(loopback(), "", AUTH)
    }

    /// One on loopback that speaks TLS with `server.pem` and `server-key.pem` of `certs`, and there serves those alone who show a
    /// certificate of `clients`, where it names a file.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn with_tls(certs: &Path, clients: Option<&str>) -> Registry {
        let at = |name: &str| certs.join(name).display().to_string();
        let clients = clients.map(|name| format!(", clientcas: ['{}']", at(name))).unwrap_or_default();
        let tls = format!(", tls: {{certificate: '{}', key: '{}'{clients}}}", at("server.pem"), at("server-key.pem"));
        Registry::start_with(loopback(), &tls, "")
    }

    /// One on that address.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn at(address: SocketAddr) -> Registry {
        Registry::start_with(address, "", "")
    }

    fn start_with(address: SocketAddr, tls: &str, more: &str) -> Registry {
        let dir = tempfile::tempdir().expect("a directory");
        let host = address.to_string();
        let users = dir.path().join("users");
        // bcrypt with the least rounds: the word is no secret.
        let line = "user:$2b$04$RB6GR70.lKCxsw0GVH79D.hbnMDo3FMUfeRvVzW.Wi8rfyUZ85sWG\n";
        std::fs::write(&users, line).expect("written");
        let config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{host}'{tls}}}\n{}",
            dir.path().join("data").display(),
            more.replace("USERS", &users.display().to_string())
        );
        let file = dir.path().join("config.yml");
        std::fs::write(&file, config).expect("written");
        let log = std::fs::File::create(dir.path().join("log")).expect("created");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&file).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("cloned")).stderr(log);
        let child = command.spawn().expect("docker-registry is installed (apt-get install docker-registry)");
        let registry = Registry { child, host, dir };
        let start = Instant::now();
        while TcpStream::connect(&registry.host).is_err() {
            assert!(start.elapsed() < Duration::from_secs(20), "the registry does not come up: {}", registry.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).expect("readable")
    }

    /// Puts an archive in under a name.
    ///
    /// # Panics
    /// When skopeo does not.
    pub fn push(&self, archive: &Path, name: &str) {
        self.push_as(archive, name, &[]);
    }

    /// The same with flags of skopeo.
    ///
    /// # Panics
    /// When skopeo does not.
    pub fn push_as(&self, archive: &Path, name: &str, flags: &[&str]) {
        let target = format!("docker://{}/{name}", self.host);
        let source = format!("oci-archive:{}", archive.display());
        let output = Command::new("skopeo")
            .args(["copy", "--dest-tls-verify=false"])
            .args(flags)
            .args([&source, &target])
            .output();
        let output = output.expect("skopeo is installed (apt-get install skopeo)");
        assert!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// How often each blob was fetched.
    ///
    /// # Panics
    /// When the registry's log cannot be read.
    pub fn fetches(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for line in self.log().lines().filter(|line| line.contains("\"GET /v2/")) {
            if let Some((_, rest)) = line.split_once("/blobs/") {
                *counts.entry(rest.split(' ').next().unwrap_or_default().to_owned()).or_default() += 1;
            }
        }
        counts
    }
}

fn loopback() -> SocketAddr {
    (IpAddr::V4(Ipv4Addr::LOCALHOST), free_port()).into()
}
