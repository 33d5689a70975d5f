//! Makes the Rust types from `proto/minipod/v1/*.proto`: prost messages and tonic services, serde attributes that give the objects
//! of core.proto exactly the Kubernetes JSON form, and the static schema that strict manifest reading walks.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use prost::Message;
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

const CORE: &str = "minipod/v1/core.proto";
const API: &str = "minipod/v1/api.proto";
const PACKAGE: &str = ".minipod.v1";

/// Messages that are a scalar in JSON; their serde implementations are in `src/scalar.rs`.
const SCALARS: &[&str] = &["Time", "MicroTime", "IntOrString"];

/// Names that snake case would mangle (`pod_i_ps`).
const RUST_NAMES: &[(&str, &str)] = &[("podIPs", "pod_ips"), ("hostIPs", "host_ips"), ("podCIDRs", "pod_cidrs")];

/// Fields that hold a quantity, or quantities by resource name.
const QUANTITIES: &[&str] = &[
    "ResourceRequirements.limits",
    "ResourceRequirements.requests",
    "ResourceFieldSelector.divisor",
    "EmptyDirVolumeSource.sizeLimit",
    "PodSpec.overhead",
    "PodStatus.allocatedResources",
    "ContainerStatus.allocatedResources",
    "NodeStatus.capacity",
    "NodeStatus.allocatable",
];

/// Fields that Kubernetes prints even when they are empty.
const ALWAYS: &[&str] = &[
    "PodSpec.containers",
    "PodList.items",
    "Container.name",
    "EphemeralContainer.name",
    "ContainerPort.containerPort",
    "EnvVar.name",
    "ObjectFieldSelector.fieldPath",
    "ResourceFieldSelector.resource",
    "ConfigMapKeySelector.key",
    "SecretKeySelector.key",
    "ContainerResizePolicy.resourceName",
    "ContainerResizePolicy.restartPolicy",
    "ContainerRestartRule.action",
    "ContainerRestartRuleOnExitCodes.operator",
    "VolumeMount.name",
    "VolumeMount.mountPath",
    "VolumeDevice.name",
    "VolumeDevice.devicePath",
    "HTTPHeader.name",
    "HTTPHeader.value",
    "GRPCAction.port",
    "SleepAction.seconds",
    "SeccompProfile.type",
    "AppArmorProfile.type",
    "Sysctl.name",
    "Sysctl.value",
    "Volume.name",
    "HostPathVolumeSource.path",
    "KeyToPath.key",
    "KeyToPath.path",
    "DownwardAPIVolumeFile.path",
    "ProjectedVolumeSource.sources",
    "HostAlias.ip",
    "PodReadinessGate.conditionType",
    "PodSchedulingGate.name",
    "PodOS.name",
    "PodIP.ip",
    "HostIP.ip",
    "PodCondition.type",
    "PodCondition.status",
    "Taint.key",
    "Taint.effect",
    "NodeSelector.nodeSelectorTerms",
    "NodeSelectorRequirement.key",
    "NodeSelectorRequirement.operator",
    "PreferredSchedulingTerm.weight",
    "WeightedPodAffinityTerm.weight",
    "PodAffinityTerm.topologyKey",
    "TopologySpreadConstraint.maxSkew",
    "TopologySpreadConstraint.topologyKey",
    "TopologySpreadConstraint.whenUnsatisfiable",
    "LabelSelectorRequirement.key",
    "LabelSelectorRequirement.operator",
    "OwnerReference.apiVersion",
    "OwnerReference.kind",
    "OwnerReference.name",
    "OwnerReference.uid",
    "PriorityClass.value",
    "PodDisruptionBudgetStatus.disruptionsAllowed",
    "PodDisruptionBudgetStatus.currentHealthy",
    "PodDisruptionBudgetStatus.desiredHealthy",
    "PodDisruptionBudgetStatus.expectedPods",
    "Condition.type",
    "Condition.status",
    "Condition.reason",
    "Condition.message",
    "ContainerStatus.name",
    "ContainerStatus.ready",
    "ContainerStatus.restartCount",
    "ContainerStatus.image",
    "ContainerStatus.imageID",
    "ContainerStateTerminated.exitCode",
    "NodeCondition.type",
    "NodeCondition.status",
    "NodeAddress.type",
    "NodeAddress.address",
    "NodeSystemInfo.machineID",
    "NodeSystemInfo.systemUUID",
    "NodeSystemInfo.bootID",
    "NodeSystemInfo.kernelVersion",
    "NodeSystemInfo.osImage",
    "NodeSystemInfo.containerRuntimeVersion",
    "NodeSystemInfo.kubeletVersion",
    "NodeSystemInfo.kubeProxyVersion",
    "NodeSystemInfo.operatingSystem",
    "NodeSystemInfo.architecture",
    "ContainerImage.names",
    "Event.reportingComponent",
    "Event.reportingInstance",
];

/// Fields that few objects have and that are large: without a box those that do not have them pay for their size all the same, in every
/// state of every pod that a cache holds.
const BOXED: &[&str] = &[
    "Container.livenessProbe",
    "Container.readinessProbe",
    "Container.startupProbe",
    "Container.lifecycle",
    "Container.securityContext",
    "EphemeralContainer.livenessProbe",
    "EphemeralContainer.readinessProbe",
    "EphemeralContainer.startupProbe",
    "EphemeralContainer.lifecycle",
    "EphemeralContainer.securityContext",
    "PodSpec.affinity",
    "PodSpec.dnsConfig",
    "PodSpec.resources",
    "PodStatus.resources",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-env-changed=PROTOC");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut set = descriptors(&out);

    let mut bare = set.clone();
    bare.file.iter_mut().for_each(|file| file.source_code_info = None);
    fs::write(out.join("descriptors.bin"), bare.encode_to_vec()).expect("write descriptors.bin");

    let core = set.file.iter().find(|file| file.name() == CORE).expect("core.proto is compiled").clone();
    check_tables(&core.message_type);
    fs::write(out.join("schema.rs"), schema(&core.message_type)).expect("write schema.rs");

    set.file.iter_mut().flat_map(|file| &mut file.message_type).for_each(rename_fields);
    let mut builder = tonic_prost_build::configure().btree_map(".").bytes(".");
    for message in core.message_type.iter().filter(|message| !SCALARS.contains(&message.name())) {
        builder = builder.message_attribute(
            format!("{PACKAGE}.{}", message.name()),
            "#[derive(serde::Serialize, serde::Deserialize)] #[serde(default, deny_unknown_fields)]",
        );
        for field in &message.field {
            let path = format!("{PACKAGE}.{}.{}", message.name(), rust_name(field.name()));
            builder = builder.field_attribute(&path, serde_attribute(message, field));
            if BOXED.contains(&format!("{}.{}", message.name(), field.name()).as_str()) {
                builder = builder.boxed(&path);
            }
        }
    }
    builder.compile_fds(set).expect("generate the types");
}

/// Runs protoc over the files that exist.
fn descriptors(out: &Path) -> FileDescriptorSet {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let protoc = env::var_os("PROTOC").unwrap_or_else(|| "protoc".into());
    let file = out.join("protoc.bin");
    let mut command = Command::new(&protoc);
    command.arg("--include_imports").arg("--include_source_info");
    command.arg(format!("--descriptor_set_out={}", file.display())).arg(format!("-I{}", root.display()));
    command.args([CORE, API].iter().filter(|name| root.join(name).exists()));
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => fail(&format!(
            "cannot run {}: {error}; install it with `apt-get install protobuf-compiler` or set PROTOC to its path",
            protoc.to_string_lossy()
        )),
    };
    if !output.status.success() {
        fail(&format!("protoc refuses the .proto files:\n{}", String::from_utf8_lossy(&output.stderr)));
    }
    let bytes = fs::read(&file).expect("protoc wrote its output");
    FileDescriptorSet::decode(bytes.as_slice()).expect("protoc writes a FileDescriptorSet")
}

/// Ends the build with a message instead of a panic with a backtrace hint.
fn fail(message: &str) -> ! {
    eprintln!("minipod-proto: {message}");
    std::process::exit(1)
}

/// A typing error in a table above must not go unnoticed.
fn check_tables(messages: &[DescriptorProto]) {
    for entry in QUANTITIES.iter().chain(ALWAYS).chain(BOXED) {
        let (message, field) = entry.split_once('.').expect("Message.field");
        let known = messages.iter().any(|m| m.name() == message && m.field.iter().any(|f| f.name() == field));
        if !known {
            fail(&format!("build.rs lists {entry}, which core.proto does not have"));
        }
    }
}

fn rust_name(field: &str) -> &str {
    RUST_NAMES.iter().find(|(name, _)| *name == field).map_or(field, |(_, rust)| rust)
}

/// Changes the names that only the generated Rust sees.
fn rename_fields(message: &mut DescriptorProto) {
    for field in &mut message.field {
        field.name = Some(rust_name(field.name()).to_owned());
    }
}

/// What a field is in JSON.
struct Shape {
    list: bool,
    map: bool,
    optional: bool,
    quantity: bool,
    kind: Type,
    message: String,
}

fn shape(message: &DescriptorProto, field: &FieldDescriptorProto) -> Shape {
    let quantity = QUANTITIES.contains(&format!("{}.{}", message.name(), field.name()).as_str());
    let list = field.label() == Label::Repeated;
    let entry = message.nested_type.iter().find(|nested| {
        nested.options.as_ref().is_some_and(|options| options.map_entry())
            && field.type_name() == format!("{PACKAGE}.{}.{}", message.name(), nested.name())
    });
    let value = entry.map_or(field, |entry| &entry.field[1]);
    let name = value.type_name().rsplit('.').next().unwrap_or_default().to_owned();
    Shape {
        list: list && entry.is_none(),
        map: entry.is_some(),
        optional: field.proto3_optional(),
        quantity,
        kind: value.r#type(),
        message: name,
    }
}

fn serde_attribute(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let shape = shape(message, field);
    let mut parts = vec![format!("rename = \"{}\"", field.name())];
    if !ALWAYS.contains(&format!("{}.{}", message.name(), field.name()).as_str()) {
        parts.push(format!("skip_serializing_if = \"{}\"", empty_test(&shape)));
    }
    let with = match (&shape.kind, shape.quantity, shape.map) {
        (_, true, true) => Some("crate::json::quantity_map"),
        (_, true, false) => Some("crate::json::quantity"),
        (Type::Bytes, _, true) => Some("crate::json::bytes_map"),
        (Type::Bytes, _, false) => fail(&format!("no JSON form for bytes field {}", field.name())),
        _ => None,
    };
    if let Some(with) = with {
        parts.push(format!("with = \"{with}\""));
    }
    format!("#[serde({})]", parts.join(", "))
}

fn empty_test(shape: &Shape) -> &'static str {
    match shape.kind {
        _ if shape.list => "Vec::is_empty",
        _ if shape.map => "std::collections::BTreeMap::is_empty",
        Type::Message => "Option::is_none",
        _ if shape.optional => "Option::is_none",
        Type::String => "String::is_empty",
        Type::Bool => "std::ops::Not::not",
        _ => "crate::json::is_zero",
    }
}

/// Rust source of the static schema (the types are in src/schema.rs).
fn schema(messages: &[DescriptorProto]) -> String {
    let mut text = String::new();
    for message in messages.iter().filter(|message| !SCALARS.contains(&message.name())) {
        text += &format!("static {}: Message = Message {{ name: {:?}, fields: &[\n", ident(message), message.name());
        for field in &message.field {
            let shape = shape(message, field);
            let cardinality = match (shape.list, shape.map) {
                (true, _) => "List",
                (_, true) => "Map",
                _ => "One",
            };
            text += &format!(
                "    Field {{ name: {:?}, cardinality: Cardinality::{cardinality}, value: {} }},\n",
                field.name(),
                value_type(&shape)
            );
        }
        text += "] };\n";
    }
    text += "/// All messages of core.proto that are JSON objects.\npub static MESSAGES: &[&Message] = &[\n";
    for message in messages.iter().filter(|message| !SCALARS.contains(&message.name())) {
        text += &format!("    &{},\n", ident(message));
    }
    text + "];\n"
}

fn ident(message: &DescriptorProto) -> String {
    format!("M_{}", message.name().to_uppercase())
}

fn value_type(shape: &Shape) -> String {
    match shape.kind {
        Type::Message if SCALARS.contains(&shape.message.as_str()) => format!("Value::{}", shape.message),
        Type::Message => format!("Value::Message(&M_{})", shape.message.to_uppercase()),
        Type::String if shape.quantity => "Value::Quantity".into(),
        Type::String => "Value::String".into(),
        Type::Bool => "Value::Bool".into(),
        Type::Int32 => "Value::Int32".into(),
        Type::Int64 => "Value::Int64".into(),
        Type::Bytes => "Value::Bytes".into(),
        other => fail(&format!("core.proto uses {other:?}, which has no JSON form here")),
    }
}
