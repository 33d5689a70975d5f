//! The configuration file: named contexts, one of them in use.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use minipod_client::Options;
use minipod_proto::manifest;
use serde::{Deserialize, Serialize};

use super::args::{ConfigCommand, Global};
use super::error::CliError;
use super::print;
use crate::view::table::Table;

/// Largest file that is read, bytes: a configuration is a few lines.
const MAX_BYTES: u64 = 1 << 20;

/// The file's content.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of the context in use; empty: none.
    #[serde(rename = "currentContext")]
    pub current: String,
    /// All contexts.
    pub contexts: Vec<Context>,
}

/// Where to work.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// Its name.
    pub name: String,
    /// Addresses of API servers, separated by commas.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub server: String,
    /// The namespace where nothing else is said.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
}

/// What the file has around the contexts, like every configuration of the field.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(rename = "apiVersion", default = "api_version")]
    api_version: String,
    #[serde(default = "kind")]
    kind: String,
    #[serde(rename = "currentContext", default)]
    current: String,
    #[serde(default)]
    contexts: Vec<Context>,
}

fn api_version() -> String {
    "minipod.dev/v1".to_owned()
}

fn kind() -> String {
    "Config".to_owned()
}

impl Config {
    /// Reads the file; one that is not there is empty, unless it was named.
    pub fn load(global: &Global) -> Result<Config, CliError> {
        let Some(path) = path(global) else { return Ok(Config::default()) };
        match std::fs::metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Config::default()),
            Err(error) => return Err(CliError::file("read", &path)(error)),
            Ok(meta) if meta.len() > MAX_BYTES => {
                let message = format!("{}: {} bytes are no configuration", path.display(), meta.len());
                return Err(CliError::usage(message, "name another file with --config"));
            }
            Ok(_) => {}
        }
        let text = std::fs::read_to_string(&path).map_err(CliError::file("read", &path))?;
        Config::parse(&text, &path)
    }

    fn parse(text: &str, path: &Path) -> Result<Config, CliError> {
        let value = manifest::parse_value(text)
            .map_err(|problems| CliError::Manifest { source_name: path.display().to_string(), problems })?;
        if value.is_null() {
            return Ok(Config::default());
        }
        let file: File = serde_json::from_value(value).map_err(|error| {
            CliError::usage(
                format!("{}: {error}", path.display()),
                "start over: minictl config set-context NAME --server URL",
            )
        })?;
        if file.api_version != api_version() || file.kind != kind() {
            let message =
                format!("{}: found {} {}, want minipod.dev/v1 Config", path.display(), file.api_version, file.kind);
            return Err(CliError::usage(message, "name another file with --config"));
        }
        Ok(Config { current: file.current, contexts: file.contexts })
    }

    fn text(&self) -> String {
        let file = File {
            api_version: api_version(),
            kind: kind(),
            current: self.current.clone(),
            contexts: self.contexts.clone(),
        };
        manifest::value_to_yaml(serde_json::to_value(file).unwrap_or_default())
    }

    /// Writes the file whole or not at all.
    fn save(&self, global: &Global) -> Result<PathBuf, CliError> {
        let path = path(global).ok_or_else(|| {
            CliError::usage("there is no home directory for the configuration file", "name one with --config FILE")
        })?;
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(CliError::file("make directory", dir))?;
        }
        let draft = path.with_extension("yaml.new");
        std::fs::write(&draft, self.text()).map_err(CliError::file("write", &draft))?;
        std::fs::rename(&draft, &path).map_err(CliError::file("replace", &path))?;
        Ok(path)
    }

    /// The context of that name.
    pub fn context(&self, name: &str) -> Result<&Context, CliError> {
        self.contexts.iter().find(|context| context.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.contexts.iter().map(|context| context.name.as_str()).collect();
            let hint = match names.as_slice() {
                [] => format!("make it: minictl config set-context {name} --server URL"),
                names => format!("there are: {}", names.join(", ")),
            };
            CliError::usage(format!("there is no context {name:?}"), hint)
        })
    }
}

/// Where the file is; `None` without a home directory.
fn path(global: &Global) -> Option<PathBuf> {
    if let Some(path) = &global.config {
        return Some(path.clone());
    }
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let dir = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")))?;
    Some(dir.join("minipod/config.yaml"))
}

/// `minictl config …`
pub fn run(global: &Global, command: ConfigCommand) -> Result<(), CliError> {
    let mut config = Config::load(global)?;
    match command {
        ConfigCommand::View => print(&config.text()),
        ConfigCommand::CurrentContext => {
            if config.current.is_empty() {
                return Err(CliError::usage("no context is in use", "choose one: minictl config use-context NAME"));
            }
            print(&format!("{}\n", config.current))
        }
        ConfigCommand::GetContexts => {
            let mut table = Table::new(&["CURRENT", "NAME", "SERVER", "NAMESPACE"]);
            for context in &config.contexts {
                let current = if context.name == config.current { "*" } else { "" };
                table.row([current, &context.name, &context.server, &context.namespace].map(str::to_owned));
            }
            print(&table.render(true))
        }
        ConfigCommand::UseContext { name } => {
            config.context(&name)?;
            config.current.clone_from(&name);
            config.save(global)?;
            print(&format!("context {name:?} is in use\n"))
        }
        ConfigCommand::SetContext { name } => set(global, &mut config, &name),
        ConfigCommand::DeleteContext { name } => {
            config.context(&name)?;
            config.contexts.retain(|context| context.name != name);
            if config.current == name {
                config.current.clear();
            }
            config.save(global)?;
            print(&format!("context {name:?} deleted\n"))
        }
    }
}

fn set(global: &Global, config: &mut Config, name: &str) -> Result<(), CliError> {
    if let Some(server) = &global.server {
        // Refused here rather than at the next command.
        minipod_client::Client::new(&Options::servers(server))?;
    }
    let known = config.contexts.iter_mut().find(|context| context.name == name);
    let word = if known.is_some() { "changed" } else { "created" };
    let mut fresh = Context { name: name.to_owned(), ..Context::default() };
    let is_new = known.is_none();
    let context = known.unwrap_or(&mut fresh);
    if let Some(server) = &global.server {
        context.server.clone_from(server);
    }
    if let Some(namespace) = &global.namespace {
        context.namespace.clone_from(namespace);
    }
    if is_new {
        config.contexts.push(fresh);
    }
    if config.current.is_empty() {
        name.clone_into(&mut config.current);
    }
    config.save(global)?;
    print(&format!("context {name:?} {word}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_read_as_it_is_written() {
        let config = Config {
            current: "a".into(),
            contexts: vec![
                Context { name: "a".into(), server: "http://h:1".into(), namespace: "yes".into() },
                Context { name: "b: #".into(), ..Context::default() },
            ],
        };
        let path = Path::new("c.yaml");
        assert_eq!(Config::parse(&config.text(), path).unwrap(), config);
        assert_eq!(Config::parse("# nothing\n", path).unwrap(), Config::default());
        assert!(config.text().starts_with("apiVersion: minipod.dev/v1\nkind: Config\n"));
    }

    #[test]
    fn a_wrong_file_is_named() {
        for text in ["contexts: 7", "contexts: [{server: x}]", "kind: Pod", "a: b", "{", "currentContext: [a]"] {
            let error = Config::parse(text, Path::new("c.yaml")).unwrap_err();
            assert!(error.sentence().contains("c.yaml"), "{text}: {}", error.sentence());
        }
    }
}
