//! The images of the example tomcat-war.
//!
//! - `minipod.local/tomcat`: Debian's Tomcat and headless Java runtime, laid out as Debian does it, and nothing to serve.
//! - `minipod.local/sample`: busybox and `/sample.war`, a web application of one page.
//!
//! About 51 MB are fetched and 190 MB kept in `target/images`, once: they are made again only when what is written here changes.

use super::{Layer, SHELL, archive, busybox_rootfs, copy, dir, link, make_dir, program, shared_libraries, write};
use crate::{run, setup};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Of the layout below, which the constants do not show.
const LAYOUT: &str = "1";

/// Debian's start script in one line: no shell in the image, and the runtime is the process that gets the signals. A container with two
/// processors and little memory starts fastest with the small collector and the quick compiler.
const PROCESS: &str = r#""Entrypoint":["/usr/bin/java","-XX:+UseSerialGC","-XX:TieredStopAtLevel=1","-XX:-UsePerfData","-Xmx96m","-Djava.io.tmpdir=/tmp","-Dcatalina.home=/usr/share/tomcat10","-Dcatalina.base=/var/lib/tomcat10","-cp","/usr/share/tomcat10/bin/bootstrap.jar:/usr/share/tomcat10/bin/tomcat-juli.jar","org.apache.catalina.startup.Bootstrap","start"],"WorkingDir":"/var/lib/tomcat10","User":"tomcat""#;

/// One connector; the applications are read from their archives, so that a volume that shows them can be read-only.
const SERVER_XML: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<Server port="-1">
  <Service name="Catalina">
    <Connector port="8080" protocol="HTTP/1.1" maxThreads="8" minSpareThreads="2"/>
    <Engine name="Catalina" defaultHost="localhost">
      <Host name="localhost" appBase="webapps" unpackWARs="false" autoDeploy="false"/>
    </Engine>
  </Service>
</Server>
"#;

const PASSWD: &str = "root:x:0:0:root:/:/bin/false\ntomcat:x:8080:8080:Tomcat:/var/lib/tomcat10:/bin/false\n";
const GROUP: &str = "root:x:0:\ntomcat:x:8080:\n";

/// Of the sample: Tomcat serves the page under the application's own address only if it has read this.
const WEB_XML: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<web-app xmlns="https://jakarta.ee/xml/ns/jakartaee" version="5.0">
  <display-name>sample</display-name>
  <welcome-file-list>
    <welcome-file>hello.txt</welcome-file>
  </welcome-file-list>
</web-app>
"#;

const PAGE: &str = "hello from a war that an init container brought\n";

/// Of Debian's packages: documentation, and what only a compiler or another kind of heap needs.
const LEFT_OUT: [&str; 4] = ["usr/share/doc", "usr/share/man", "usr/share/maven-repo", "usr/lib/debug"];
const LEFT_OUT_OF_JAVA: [&str; 2] = ["lib/ct.sym", "lib/server/classes_nocoops.jsa"];

/// Builds both images unless they are there and were made by the same recipe.
///
/// # Errors
/// When a package cannot be fetched, or the disk refuses.
pub fn build() -> Result<(), String> {
    let archives = [dir().join("tomcat.oci.tar"), dir().join("sample.oci.tar")];
    let stamp = dir().join("tomcat.recipe");
    let recipe = [LAYOUT, PROCESS, SERVER_XML, PASSWD, GROUP, WEB_XML, PAGE].concat();
    if archives.iter().all(|file| file.is_file()) && fs::read_to_string(&stamp).is_ok_and(|made_by| made_by == recipe) {
        return Ok(());
    }
    run::step("build the images minipod.local/tomcat and minipod.local/sample");
    let work = dir().join(format!("work-tomcat-{}", std::process::id()));
    let built = tomcat(&work, &archives[0]).and_then(|()| sample(&work, &archives[1]));
    let cleaned = fs::remove_dir_all(&work).map_err(|e| format!("remove {}: {e}", work.display()));
    built.and(cleaned).and_then(|()| write(&stamp, &recipe))
}

fn tomcat(work: &Path, to: &Path) -> Result<(), String> {
    let (packages, root) = (work.join("packages"), work.join("tomcat"));
    make_dir(&packages)?;
    make_dir(&root)?;
    let java = setup::java_package()?;
    let mut names = setup::TOMCAT_CONTENT.to_vec();
    names.push(&java);
    setup::fetch(&names, &packages)?;
    for package in entries(&packages)? {
        run::output(Command::new("dpkg-deb").arg("--extract").arg(&package).arg(&root))?;
    }
    java_rootfs(&root)?;
    for place in LEFT_OUT {
        remove(&root.join(place))?;
    }
    // What the package's installation would do: the configuration in its place, directories that Tomcat may write to.
    for file in entries(&root.join("usr/share/tomcat10/etc"))? {
        copy(&file, &root.join("etc/tomcat10").join(file.file_name().unwrap_or_default()))?;
    }
    write(&root.join("etc/tomcat10/server.xml"), SERVER_XML)?;
    write(&root.join("etc/passwd"), PASSWD)?;
    write(&root.join("etc/group"), GROUP)?;
    for place in ["tmp", "var/cache/tomcat10", "var/log/tomcat10"] {
        let place = root.join(place);
        make_dir(&place)?;
        fs::set_permissions(&place, fs::Permissions::from_mode(0o1777))
            .map_err(|e| format!("chmod {}: {e}", place.display()))?;
    }
    let layer = Layer::pack(&root, &work.join("tomcat.tar"))?;
    archive("minipod.local/tomcat:latest", &[&layer], PROCESS, &work.join("tomcat-layout"), to)
}

/// The C libraries that the runtime needs, a short way to its program, and less of what nobody uses.
fn java_rootfs(root: &Path) -> Result<(), String> {
    let all = entries(&root.join("usr/lib/jvm"))?;
    let home = all.iter().find(|home| home.join("bin/java").is_file() && !home.is_symlink());
    let home = home.ok_or("the Java package has no /usr/lib/jvm/*/bin/java")?;
    for file in [home.join("bin/java"), home.join("lib/server/libjvm.so")] {
        // Its own are found beside it.
        for library in shared_libraries(&file)?.iter().filter(|library| !library.starts_with(root)) {
            copy(library, &root.join(library.strip_prefix("/").unwrap_or(library)))?;
        }
    }
    for file in LEFT_OUT_OF_JAVA {
        remove(&home.join(file))?;
    }
    make_dir(&root.join("usr/bin"))?;
    let inside = home.strip_prefix(root.join("usr")).unwrap_or(home);
    link(&format!("../{}/bin/java", inside.display()), &root.join("usr/bin/java"))
}

fn sample(work: &Path, to: &Path) -> Result<(), String> {
    let base = work.join("busybox");
    busybox_rootfs(&base, &program("busybox")?)?;
    let (content, root) = (work.join("war"), work.join("sample"));
    make_dir(&content.join("WEB-INF"))?;
    make_dir(&root)?;
    let files = [("WEB-INF/web.xml", WEB_XML), ("hello.txt", PAGE)];
    for (name, text) in files {
        write(&content.join(name), text)?;
    }
    let names = files.map(|(name, _)| name);
    // The oldest time that zip knows, in every time zone: the same bytes again for the same files.
    run::output(Command::new("touch").args(["--date=1980-01-01T00:00:00Z"]).args(names).current_dir(&content))?;
    let mut zip = Command::new("zip");
    zip.args(["-q", "-X"]).arg(root.join("sample.war")).args(names).env("TZ", "UTC").current_dir(&content);
    run::output(&mut zip)?;
    let base = Layer::pack(&base, &work.join("busybox.tar"))?;
    let war = Layer::pack(&root, &work.join("sample.tar"))?;
    archive("minipod.local/sample:latest", &[&base, &war], SHELL, &work.join("sample-layout"), to)
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let listed = fs::read_dir(dir).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    listed.map_err(|e| format!("list {}: {e}", dir.display()))
}

/// Removes a file or a directory with all that is in it, if it is there.
fn remove(place: &Path) -> Result<(), String> {
    let done = if place.is_dir() { fs::remove_dir_all(place) } else { fs::remove_file(place) };
    match done {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("remove {}: {e}", place.display())),
        _ => Ok(()),
    }
}
