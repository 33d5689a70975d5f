use std::time::{Duration, Instant};

use super::{tree::MAX_NODES, *};
use crate::v1::{ConfigMap, Pod};

const REFUSED: &str = include_str!("../../testdata/manifests-refused.txt");

fn refused(text: &str) -> String {
    match parse(text) {
        Ok(objects) => panic!("read as {objects:?}:\n{text}"),
        Err(problems) => problems.to_string(),
    }
}

#[test]
fn refused_manifests() {
    let blocks: Vec<&str> = REFUSED.split("\n=== ").skip(1).collect();
    assert!(blocks.len() > 10);
    for block in blocks {
        let (name, rest) = block.split_once('\n').unwrap();
        let (manifest, expected) = rest.split_once(">>>\n").unwrap();
        assert_eq!(refused(manifest), expected.trim_end(), "{name}");
    }
}

#[test]
fn syntax_is_told_with_its_place() {
    for (text, line) in [
        ("a: [1, 2\n", 2),
        ("a: b\n c: d\n", 2),
        ("a:\n\tb: c", 2),
        ("a: *nowhere", 1),
        ("{\"a\" }}", 0),
        ("a: \"x", 1),
    ] {
        let said = refused(text);
        assert!(!said.contains('\n') && said.contains("not YAML"), "{text:?}: {said}");
        assert!(line == 0 || said.starts_with(&format!("line {line}: ")), "{text:?}: {said}");
    }
}

#[test]
fn several_documents_lists_merges_and_yaml_of_the_old_kind() {
    let text = "
# comment
---
apiVersion: v1
kind: Pod
metadata: {name: a, labels: &labels {app: web}}
spec:
  hostNetwork: yes
  securityContext: {runAsUser: 0x10}
  containers:
    - &c {name: a, image: b, resources: {limits: {cpu: 0.5, memory: 1000}}}
    - {<<: *c, name: !!str 5, image: null}
---
---
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Secret, metadata: {name: s}, data: {a: aGk=, b: }}
- {apiVersion: v1, kind: Namespace, metadata: {name: n, labels: *labels}}
";
    // Anchors end with their document.
    assert!(refused(text).contains("line 19"), "{}", refused(text));
    let objects = parse(&text.replace(", labels: *labels", "")).unwrap();
    let keys: Vec<String> =
        objects.iter().map(|object| format!("{} {}", object.kind_of().unwrap(), object.key())).collect();
    assert_eq!(keys, ["Pod a", "Secret s", "Namespace n"]);
    let spec = objects[0].as_pod().unwrap().spec();
    assert!(spec.host_network);
    assert_eq!(spec.security_context.as_ref().unwrap().run_as_user, Some(16));
    let two = &spec.containers[1];
    assert_eq!((two.name.as_str(), two.image.as_str()), ("5", ""));
    assert_eq!(two.resources.as_ref().unwrap().limits["cpu"], "500m");
    assert_eq!(two.resources.as_ref().unwrap().limits["memory"], "1k");
    assert_eq!(parse("").unwrap(), []);
    assert_eq!(parse("# nothing\n---\n").unwrap(), []);
    assert_eq!(parse("\u{feff}{apiVersion: v1, kind: PodList, items: [{metadata: {name: a}}]}").unwrap()[0].key(), "a");
    let json = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"c"},"data":{"a":"\ud83d\ude00\/"}}"#;
    let Some(object::Kind::ConfigMap(map)) = &parse(json).unwrap()[0].kind else { panic!("a ConfigMap") };
    assert_eq!(map.data["a"], "\u{1f600}/");
}

#[test]
fn limits() {
    assert!(refused(&" ".repeat(MAX_BYTES + 1)).contains("larger than 3 MiB"));
    for (open, inner) in [("[", ""), ("{a: ", ""), ("- ", "x"), ("? ", "x"), ("{\"a\":", ""), ("[", "]")] {
        for count in [MAX_DEPTH + 1, 200_000] {
            let said = refused(&(open.repeat(count) + inner));
            let expected = if open == "? " { "a key must be text" } else { "nested more than 64 deep" };
            assert!(said.contains(expected), "{open:?} {count}: {said}");
        }
    }
    let deep = format!("{{\"a\":{}1{}}}", "[".repeat(MAX_DEPTH), "]".repeat(MAX_DEPTH));
    assert!(refused(&deep).contains("nested more than 64 deep"), "{}", refused(&deep));
    assert!(refused(&"---\na\n".repeat(MAX_DOCUMENTS + 1)).contains("more than 1000 documents"));
    assert!(refused(&format!("[{}]", "a,".repeat(MAX_NODES + 1))).contains("more than 500000 values"));
    // Nine levels of nine aliases each: 387 million values, if one made them.
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..9 {
        let alias = format!("*a{}", level - 1);
        bomb += &format!("a{level}: &a{level} [{}]\n", [alias.as_str(); 9].join(", "));
    }
    let began = Instant::now();
    assert!(refused(&bomb).contains("aliases counted"), "{}", refused(&bomb));
    let mut text_bomb = format!("a: &a {}\nb:\n", "x".repeat(100_000));
    text_bomb += &"- *a\n".repeat(1000);
    assert!(refused(&text_bomb).contains("aliases counted"));
    // Chains of aliases do not pass the depth either.
    let mut chain = "a0: &a0 [x]\n".to_owned();
    (1..100).for_each(|level| chain += &format!("a{level}: &a{level} [*a{}]\n", level - 1));
    assert!(refused(&chain).contains("nested more than 64 deep"));
    assert!(began.elapsed() < Duration::from_secs(20), "a bomb costs time: {:?}", began.elapsed());
}

#[test]
fn patches() {
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {a: b, c: d}}\nspec: {containers: [{name: a, image: b}]}\n";
    let pod = parse(text).unwrap().remove(0);
    let said = |patch: &str| match merge_patch(&pod, patch.as_bytes()) {
        Ok(object) => to_json(&object).split_whitespace().collect::<String>(),
        Err(problems) => format!("error: {problems}"),
    };
    let meta = |labels: &str, rest: &str| {
        format!(
            r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"p"{labels}}},"spec":{{{rest}"containers":[{{"name":"a","image":"b"}}]}}}}"#
        )
    };
    assert_eq!(said("{}"), meta(r#","labels":{"a":"b","c":"d"}"#, ""));
    assert_eq!(said(r#"{"metadata":{"labels":{"a":null,"e":"f"}}}"#), meta(r#","labels":{"c":"d","e":"f"}"#, ""));
    assert_eq!(said(r#"{"metadata":{"labels":null}}"#), meta("", ""));
    let two = merge_patch(&pod, br#"{"spec":{"containers":[{"name":"z"}],"nodeSelector":{"x":"y"}}}"#).unwrap();
    assert_eq!(two.as_pod().unwrap().spec().containers[0].name, "z");
    for (patch, expected) in [
        ("[]", "error: the patch is a list, want a JSON object"),
        ("{", "error: line 1: not JSON: found the end, want a key in double quotes"),
        (r#"{"a":1}"#, "error: line 1: a: unknown field of Pod"),
        (
            r#"{"spec":{"hostNetwork":"x"}}"#,
            "error: line 1: spec.hostNetwork: found the text \"x\", want true or false",
        ),
        (r#"{"spec":{"hostPID":true,"hostPID":false}}"#, "error: line 1: spec.hostPID: duplicate key, first on line 1"),
        (r#"{"kind":"Node"}"#, "error: kind: cannot be changed by a patch: want Pod"),
        (r#"{"apiVersion":null}"#, "error: apiVersion: cannot be changed by a patch: want v1"),
        (
            r#"{"spec":{"hostnameOverride":"h"}}"#,
            "error: line 1: spec.hostnameOverride: known to Kubernetes, not supported by minipod: use hostname",
        ),
    ] {
        assert_eq!(said(patch), expected, "{patch}");
    }
    assert!(merge_patch(&pod, b"\xff").unwrap_err().to_string().contains("not UTF-8 at byte 0"));
}

fn back(object: &Object) {
    let mut typed = object.clone();
    typed.set_type();
    let yaml = to_yaml(object);
    let again = parse(&yaml).unwrap_or_else(|problems| panic!("{problems}\n{yaml}"));
    assert_eq!(again, [typed.clone()], "{yaml}");
    assert_eq!(parse(&to_json(object)).unwrap(), [typed]);
}

#[test]
fn texts_of_every_kind_come_back() {
    let texts = [
        "",
        " ",
        "a",
        "yes",
        "null",
        "~",
        "5",
        "0x1",
        "1e3",
        "12:30:45",
        "2026-01-01",
        "1_000",
        ".5",
        "-",
        "- a",
        "a: b",
        "a #b",
        "#a",
        "a:",
        "'",
        "\"",
        "\\",
        "a\nb",
        "a\nb\n",
        "a\n\nb\n\n",
        "\na",
        " a\nb",
        "a\n b\n",
        "a\n  \nb",
        "a\tb\n\tc\n",
        "a \nb \n",
        "\r\n",
        "a\rb\n",
        "\u{0}",
        "\u{7f}\u{85}\u{a0}",
        "\u{2028}x\ny",
        "\u{feff}a\nb",
        "ä\nö\n",
        "\u{1f600}",
        "%a",
        "@a",
        "`a",
        "!a",
        "&a",
        "*a",
        "|",
        ">",
        "[a",
        "{a",
        "---",
        "...",
        "--- a\nb",
        "a\n---\nb\n",
        "a\n...\nb",
        "<<",
        "=",
        "? a",
        "a, b",
        "0",
        "00",
        "0o7",
        "true",
        "On",
        "n",
        "1Gi",
        "100m",
        "1.5.2",
        "a\n#b\n",
        "#!/bin/sh\nexit 0\n",
    ];
    let data = texts.iter().enumerate().map(|(index, text)| (format!("k{index}"), (*text).to_owned()));
    let map = ConfigMap { data: data.collect(), ..ConfigMap::default() };
    back(&map.into());
    let keys = texts.iter().map(|text| ((*text).to_owned(), "v".to_owned()));
    back(&ConfigMap { data: keys.collect(), ..ConfigMap::default() }.into());
    let mut pod = Pod::default();
    let container =
        crate::v1::Container { args: texts.iter().map(|text| (*text).to_owned()).collect(), ..Default::default() };
    pod.spec_mut().containers.push(container);
    back(&pod.into());
}

/// xorshift64*: the same run every time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }
}

/// Pieces that make a parser stumble.
const PIECES: [&str; 56] = [
    "apiVersion: v1\n",
    "kind: Pod\n",
    "kind: List\n",
    "metadata:\n",
    "  name: a\n",
    "spec:\n",
    "  containers:\n",
    "  - name: b\n",
    "items:\n",
    "- ",
    "? ",
    ": ",
    ":",
    "\n",
    " ",
    "\t",
    "  ",
    "#",
    "---\n",
    "...\n",
    "%YAML 1.2\n",
    "%TAG ! x\n",
    "&a ",
    "*a",
    "&a",
    "!",
    "!!str ",
    "!!int",
    "!<x>",
    "|\n",
    ">-\n",
    "|2\n",
    "'",
    "\"",
    "\\",
    "\\x4",
    "\\ud83d",
    "[",
    "]",
    "{",
    "}",
    ",",
    "<<: ",
    "null",
    "yes",
    "0x",
    "1e999",
    "\u{0}",
    "\u{feff}",
    "\u{85}",
    "\u{2028}",
    "ä",
    "\u{1f600}",
    "\r",
    "\r\n",
    "-",
];

#[test]
fn no_input_makes_it_panic() {
    let mut random = Random(0x6d69_6e69_706f_6421);
    for _ in 0..60_000 {
        let length = 1 + random.below(24);
        let text: String = (0..length).map(|_| PIECES[random.below(PIECES.len())]).collect();
        let _ = parse(&text);
        let _ = merge_patch(&Object::empty(Kind::Pod), text.as_bytes());
    }
    // A good manifest with bytes torn out, doubled and turned.
    let good = include_str!("../../../deploy/examples/shared-data.yaml").as_bytes();
    for _ in 0..4_000 {
        let mut bytes = good.to_vec();
        for _ in 0..=random.below(6) {
            let place = random.below(bytes.len());
            match random.below(3) {
                0 => drop(bytes.remove(place)),
                1 => bytes.insert(place, bytes[random.below(bytes.len())]),
                _ => bytes[place] = random.below(128) as u8,
            }
        }
        let _ = parse(&String::from_utf8_lossy(&bytes));
    }
}

#[test]
fn random_texts_come_back() {
    let mut random = Random(7);
    for _ in 0..20_000 {
        let length = random.below(10);
        let text: String = (0..length).map(|_| PIECES[random.below(PIECES.len())]).collect();
        let map = ConfigMap { data: [("k".to_owned(), text)].into(), ..ConfigMap::default() };
        back(&map.into());
    }
}
