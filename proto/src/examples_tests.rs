//! Every example of deploy/examples goes the whole way of a manifest.

use crate::{
    defaults,
    manifest::{parse, to_json, to_yaml},
    validate,
};

#[test]
fn examples_parse_default_validate_and_come_back() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/examples");
    let mut count = 0;
    for entry in std::fs::read_dir(dir).expect("deploy/examples is there") {
        let path = entry.expect("a directory entry").path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("read an example");
        let mut objects = parse(&text).unwrap_or_else(|problems| panic!("{}:\n{problems}", path.display()));
        assert!(!objects.is_empty(), "{}", path.display());
        for object in &mut objects {
            defaults::apply(object);
            assert_eq!(validate::create(object), [], "{}", path.display());
            assert_eq!(parse(&to_yaml(object)).as_deref(), Ok(std::slice::from_ref(object)));
            assert_eq!(parse(&to_json(object)).as_deref(), Ok(std::slice::from_ref(object)));
        }
        count += 1;
    }
    assert!(count >= 5, "only {count} examples");
}
