//! pause brings its own entry point and needs no library at all.
fn main() {
    // One segment: code and what little it reads share a page.
    for argument in
        ["-nostartfiles", "-nostdlib", "-static", "-Wl,--build-id=none", "-no-pie", "-Wl,-z,noseparate-code"]
    {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    println!("cargo:rerun-if-changed=build.rs");
}
