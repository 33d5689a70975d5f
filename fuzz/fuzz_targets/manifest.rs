//! What `minictl apply -f` reads: no text makes the reader panic, and what it takes comes out of its own form again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use minipod_proto::{defaults, manifest, validate};

fuzz_target!(|text: &str| {
    let Ok(objects) = manifest::parse(text) else { return };
    for mut object in objects {
        defaults::apply(&mut object);
        let _ = validate::create(&object);
        let Some(kind) = object.kind_of() else { continue };
        let again = minipod_proto::v1::Object::decode_inner(kind, &object.encode_inner()).expect("its own form is read");
        assert_eq!(again, object);
    }
});
