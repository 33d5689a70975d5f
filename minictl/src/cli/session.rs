//! Which servers and which namespace a command is for.

use minipod_client::{Client, DEFAULT_SERVER, Options};

use super::args::Global;
use super::config::Config;
use super::error::CliError;

/// A client and where it works.
#[derive(Debug)]
pub struct Session {
    /// The API.
    pub client: Client,
    /// The namespace where nothing else is said.
    pub namespace: String,
    /// Whether the namespace was asked for on the command line.
    pub explicit_namespace: bool,
}

impl Session {
    /// The address: `--server`, the context that `--context` names, `MINIPOD_SERVER`, the current context, the default, in this order.
    pub fn new(global: &Global) -> Result<Session, CliError> {
        let (server, namespace) = resolve(global, &Config::load(global)?)?;
        let client = Client::new(&Options::servers(&server))?;
        let explicit_namespace = global.namespace.is_some();
        Ok(Session { client, namespace, explicit_namespace })
    }

    /// The namespace to list: none for all of them.
    pub fn scope(&self, all_namespaces: bool) -> &str {
        if all_namespaces { "" } else { &self.namespace }
    }
}

fn resolve(global: &Global, config: &Config) -> Result<(String, String), CliError> {
    let context = match &global.context {
        Some(name) => Some(config.context(name)?),
        None if config.current.is_empty() => None,
        None => Some(config.context(&config.current)?),
    };
    let of_context = context.map(|context| context.server.clone()).filter(|server| !server.is_empty());
    let stated = global.server.clone().filter(|server| !server.trim().is_empty());
    // clap gives MINIPOD_SERVER as --server: a context that was named goes before both, as the more deliberate word.
    let server = if global.context.is_some() { of_context.or(stated) } else { stated.or(of_context) };
    let of_context = context.map(|context| context.namespace.clone()).filter(|namespace| !namespace.is_empty());
    let namespace = global.namespace.clone().or(of_context);
    Ok((server.unwrap_or_else(|| DEFAULT_SERVER.to_owned()), namespace.unwrap_or_else(|| "default".to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::config::Context;

    #[test]
    fn the_order_of_addresses() {
        let context = |name: &str, server: &str, namespace: &str| Context {
            name: name.into(),
            server: server.into(),
            namespace: namespace.into(),
        };
        let config = Config {
            current: "one".into(),
            contexts: vec![context("one", "http://one", "n1"), context("two", "http://two", "")],
        };
        let global = |server: Option<&str>, context: Option<&str>, namespace: Option<&str>| Global {
            server: server.map(str::to_owned),
            namespace: namespace.map(str::to_owned),
            context: context.map(str::to_owned),
            config: None,
        };
        for (given, server, namespace) in [
            (global(None, None, None), "http://one", "n1"),
            (global(Some("http://x"), None, None), "http://x", "n1"),
            (global(Some("http://x"), Some("two"), None), "http://two", "default"),
            (global(None, Some("two"), Some("n")), "http://two", "n"),
            (global(Some(" "), None, None), "http://one", "n1"),
        ] {
            assert_eq!(resolve(&given, &config).unwrap(), (server.to_owned(), namespace.to_owned()), "{given:?}");
        }
        assert_eq!(resolve(&global(None, None, None), &Config::default()).unwrap().0, DEFAULT_SERVER);
        let error = resolve(&global(None, Some("three"), None), &config).unwrap_err();
        assert!(error.to_string().contains("three"), "{error}");
    }
}
