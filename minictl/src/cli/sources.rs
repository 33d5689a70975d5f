//! Reading manifests: files, directories, standard input. Everything is read and checked before anything is sent.

use std::io::Read;
use std::path::{Path, PathBuf};

use minipod_proto::manifest::{self, MAX_BYTES, Problem};
use minipod_proto::v1::Object;

use super::error::CliError;

/// Files of one directory; more is a mistake, not a set of manifests.
const MAX_FILES: usize = 10_000;

/// All objects of all sources, in order.
pub fn read(sources: &[String], namespace: &str, explicit: bool) -> Result<Vec<Object>, CliError> {
    let mut objects = Vec::new();
    for source in sources {
        for (name, text) in texts(source)? {
            let parsed = manifest::parse(&text)
                .map_err(|problems| CliError::Manifest { source_name: name.clone(), problems })?;
            for mut object in parsed {
                place(&mut object, namespace, explicit)
                    .map_err(|problem| CliError::Manifest { source_name: name.clone(), problems: problem.into() })?;
                objects.push(object);
            }
        }
    }
    if objects.is_empty() {
        let hint = "an object begins with apiVersion and kind; see deploy/examples";
        return Err(CliError::usage(format!("no objects in {}", sources.join(", ")), hint));
    }
    Ok(objects)
}

/// Gives the object the namespace of the command line, and refuses one that says something else.
fn place(object: &mut Object, namespace: &str, explicit: bool) -> Result<(), Problem> {
    let Some(kind) = object.kind_of() else { return Ok(()) };
    let key = object.key();
    let Some(meta) = object.meta_mut() else { return Ok(()) };
    if !kind.namespaced() {
        return Ok(());
    }
    if meta.namespace.is_empty() {
        namespace.clone_into(&mut meta.namespace);
    } else if explicit && meta.namespace != namespace {
        let message = format!("found {:?} in {kind} {key}, but --namespace says {namespace:?}", meta.namespace);
        return Err(Problem::new("metadata.namespace", message));
    }
    Ok(())
}

fn texts(source: &str) -> Result<Vec<(String, String)>, CliError> {
    if source == "-" {
        let name = "standard input".to_owned();
        let text = text(&name, Path::new("-"), std::io::stdin().lock())?;
        return Ok(vec![(name, text)]);
    }
    let path = Path::new(source);
    let files = if path.is_dir() { directory(path)? } else { vec![path.to_owned()] };
    files
        .into_iter()
        .map(|file| {
            let opened = std::fs::File::open(&file).map_err(CliError::file("read", &file))?;
            let name = file.display().to_string();
            Ok((name.clone(), text(&name, &file, opened)?))
        })
        .collect()
}

fn directory(path: &Path) -> Result<Vec<PathBuf>, CliError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(CliError::file("read directory", path))? {
        let file = entry.map_err(CliError::file("read directory", path))?.path();
        let manifest =
            file.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|known| extension == *known));
        if manifest && file.is_file() {
            files.push(file);
        }
        if files.len() > MAX_FILES {
            return Err(CliError::usage(
                format!("{} has more than {MAX_FILES} manifests", path.display()),
                "name the files",
            ));
        }
    }
    if files.is_empty() {
        let hint = "manifests are files whose names end in .yaml, .yml or .json";
        return Err(CliError::usage(format!("directory {} has no manifests", path.display()), hint));
    }
    files.sort();
    Ok(files)
}

fn text(name: &str, path: &Path, input: impl Read) -> Result<String, CliError> {
    // One byte more than allowed: the parser says that it is too much.
    let mut bytes = Vec::new();
    input.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(CliError::file("read", path))?;
    let cut = bytes.len() > MAX_BYTES;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        // Cut in the middle of a character: too large, whatever the character.
        Err(error) if cut => Ok(String::from_utf8_lossy(error.as_bytes()).into_owned()),
        Err(error) => {
            let valid = error.utf8_error().valid_up_to();
            let line = error.as_bytes().iter().take(valid).filter(|byte| **byte == b'\n').count() + 1;
            let problem = Problem::new("", format!("line {line}: found bytes that are not UTF-8, want text"));
            Err(CliError::Manifest { source_name: name.to_owned(), problems: problem.into() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, content) in files {
            std::fs::write(dir.path().join(name), content).expect("written");
        }
        dir
    }

    fn names(objects: &[Object]) -> Vec<String> {
        objects
            .iter()
            .map(|object| format!("{} {}", object.kind_of().map_or("?", minipod_proto::Kind::name), object.key()))
            .collect()
    }

    #[test]
    fn directories_in_order_and_namespaces() {
        let map = |name: &str| format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\n");
        let node = "apiVersion: v1\nkind: Node\nmetadata: {name: n}\n";
        let dir = files(&[("b.yaml", &map("b")), ("a.yml", &(map("a") + "---\n" + node)), ("notes.txt", "{")]);
        let source = [dir.path().display().to_string()];
        assert_eq!(names(&read(&source, "ns", false).unwrap()), ["ConfigMap ns/a", "Node n", "ConfigMap ns/b"]);
    }

    #[test]
    fn what_cannot_be_read() {
        let other = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a, namespace: other}\n";
        let dir = files(&[("empty.yaml", "# nothing\n"), ("other.yaml", other), ("x.txt", "")]);
        std::fs::write(dir.path().join("latin.yaml"), b"a: b\nc: \xe4\n").expect("written");
        std::fs::create_dir(dir.path().join("none")).expect("made");
        for (file, says) in [
            ("empty.yaml", "no objects"),
            ("other.yaml", "\"other\""),
            ("latin.yaml", "line 2"),
            ("missing.yaml", "missing.yaml"),
            ("none", "no manifests"),
        ] {
            let source = [dir.path().join(file).display().to_string()];
            let error = read(&source, "default", true).expect_err(file).sentence();
            assert!(error.contains(says), "{file}: {error}");
        }
    }
}
