//! Members that authenticate each other: real processes with certificates that are right, and some that are not.

#[path = "processes/server.rs"]
mod server;

use minipod_store::certs;
use minipod_store::members::{Members, parse_members};
use server::{Server, until};
use std::path::Path;

fn members(list: &str) -> Members {
    parse_members(list).expect("members")
}

/// Has the server speak TLS with the certificate `name` of the directory.
fn with_certificate(server: &mut Server, dir: &Path, name: &str, ca: &Path) {
    for (flag, file) in [
        ("--peer-cert-file", dir.join(format!("{name}.pem"))),
        ("--peer-key-file", dir.join(format!("{name}-key.pem"))),
        ("--peer-trusted-ca-file", ca.join("ca.pem")),
    ] {
        server.args.extend([flag.to_owned(), file.display().to_string()]);
    }
}

/// Members of a new cluster at `https` addresses, not started.
fn cluster(root: &Path, names: &[&str]) -> Vec<Server> {
    let mut servers: Vec<Server> = names.iter().map(|name| Server::new(root, name)).collect();
    let list: Vec<String> = servers.iter().map(|server| format!("{}=https://{}", server.name, server.peer)).collect();
    for server in &mut servers {
        server.args = vec!["--initial-cluster".to_owned(), list.join(",")];
    }
    servers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_speak_tls_and_strangers_are_refused() {
    let root = tempfile::tempdir().expect("a directory");
    let (ours, theirs) = (root.path().join("ours"), root.path().join("theirs"));
    certs::make(&ours, &members("a=https://127.0.0.1:1,b=https://127.0.0.1:1,c=https://127.0.0.1:1"), 1)
        .expect("certs");
    let mut servers = cluster(root.path(), &["a", "b", "c"]);
    for server in &mut servers {
        let name = server.name.clone();
        with_certificate(server, &ours, &name, &ours);
        server.start();
    }
    let mut client = servers[0].client().await;
    client.put("k", "v", None).await.expect("put");
    let mut other = servers[1].client().await;
    assert_eq!(other.get("k", None).await.expect("get").kvs().len(), 1);

    // What the joining side refuses itself it can name. The server's refusal may be lost behind the end of the connection: in TLS 1.3
    // a client has begun to speak before its certificate is looked at (RFC 8446, 4.4.2.4).
    // Another authority's certificate, trusting ours; then the other way round; then ours that has ended; then none.
    certs::make(&theirs, &members("x=https://127.0.0.1:1"), 1).expect("certs");
    certs::make(&ours, &members("old=https://127.0.0.1:1"), 0).expect("certs");
    certs::make(&ours, &members("d=https://127.0.0.1:1"), 1).expect("certs");
    let at = servers[0].peer;
    for (place, (dir, name, ca, words)) in [
        (&theirs, "x", &ours, &["transport error"][..]),
        // Both authorities have one name, so it is the signature that tells them apart.
        (&ours, "d", &theirs, &["UnknownIssuer", "BadSignature"]),
        (&ours, "old", &ours, &["transport error"]),
    ]
    .into_iter()
    .enumerate()
    {
        let mut stranger = Server::new(root.path(), &format!("stranger{place}"));
        stranger.args = vec!["--join".to_owned(), format!("https://{at}")];
        with_certificate(&mut stranger, dir, name, ca);
        let said = stranger.start_refused();
        assert!(
            words.iter().any(|word| said.contains(word)) && said.contains("join"),
            "{name}: {words:?} not in {said}"
        );
    }
    let mut plain = Server::new(root.path(), "plain");
    plain.args = vec!["--join".to_owned(), format!("http://{at}")];
    assert!(plain.start_refused().contains("join"));
    let names = |list: etcd_client::MemberListResponse| -> Vec<String> {
        list.members().iter().map(|member| member.name().to_owned()).collect()
    };
    let mut known = names(client.member_list().await.expect("list"));
    known.sort();
    assert_eq!(known, ["a", "b", "c"], "no stranger has become a member");

    // One with a certificate that was made later, by the same authority, comes in.
    let mut late = Server::new(root.path(), "d");
    late.args = vec!["--join".to_owned(), format!("https://{at}")];
    with_certificate(&mut late, &ours, "d", &ours);
    late.start();
    // It serves once it is no learner any more.
    until("the new member reads", async || match late.client().await.get("k", None).await {
        Ok(answer) if answer.kvs().len() == 1 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_must_be_who_it_was_dialled_as() {
    let root = tempfile::tempdir().expect("a directory");
    let dir = root.path().join("certs");
    certs::make(&dir, &members("a=https://127.0.0.1:1,b=https://elsewhere:1"), 1).expect("certs");
    let mut servers = cluster(root.path(), &["a", "b"]);
    for server in &mut servers {
        let name = server.name.clone();
        with_certificate(server, &dir, &name, &dir);
        server.start();
    }
    until("a refuses b, whose certificate names another host", async || {
        let log = servers[0].log();
        let log = log.to_lowercase();
        if log.contains("not valid for name") || log.contains("notvalidforname") { Ok(()) } else { Err(log) }
    })
    .await;
}

#[test]
fn files_and_addresses_are_checked_before_anything_is_begun() {
    let root = tempfile::tempdir().expect("a directory");
    let dir = root.path().join("certs");
    certs::make(&dir, &members("a=https://127.0.0.1:1"), 1).expect("certs");
    // A certificate that is there is not replaced, and a name leads nowhere else.
    assert!(certs::make(&dir, &members("a=https://127.0.0.1:1"), 1).is_err());
    for name in ["../a", "ca", ".", "a b"] {
        let said = certs::make(&dir, &members(&format!("{name}=https://h:1")), 1).expect_err("refused").to_string();
        assert!(said.contains(name), "{said}");
    }
    let refused = |change: &dyn Fn(&mut Server)| {
        let mut server = cluster(root.path(), &["a"]).remove(0);
        change(&mut server);
        let said = server.start_refused();
        assert!(!server.dir.exists(), "{said}");
        said
    };
    let said = refused(&|_| {});
    assert!(said.contains("it must begin with http://") && said.contains("--peer-cert-file is not given"), "{said}");
    let said = refused(&|server| server.args.extend(["--peer-cert-file", "x"].map(str::to_owned)));
    assert!(said.contains("--peer-key-file is missing"), "{said}");
    let said = refused(&|server| with_certificate(server, &dir, "b", &dir));
    assert!(said.contains("b.pem") && said.contains("No such file"), "{said}");
    std::fs::write(dir.join("c.pem"), "no certificate").expect("written");
    std::fs::write(dir.join("c-key.pem"), "no key").expect("written");
    let said = refused(&|server| with_certificate(server, &dir, "c", &dir));
    assert!(said.contains("c.pem") && said.contains("must be a PEM certificate"), "{said}");
}
