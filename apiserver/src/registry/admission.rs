//! What is added to an object and checked before it is written. Pure but for the look-up of priority classes.

use minipod_proto::{
    Kind, defaults, resources,
    v1::{Object, PodDisruptionBudgetStatus, PodSpec, PodStatus, PriorityClass, Time, object},
    validate,
};

use crate::{
    cache::{Cache, Filter},
    error::ApiError,
};

/// Classes that exist without an object, and their values (Kubernetes' own).
const BUILT_IN_CLASSES: [(&str, i32); 2] =
    [("system-cluster-critical", 2_000_000_000), ("system-node-critical", 2_000_001_000)];

/// Letters of generated names: no vowels, so that no words come out, and nothing that looks like something else.
const NAME_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
/// As many letters are appended to generateName, and so many characters of it are kept.
const SUFFIX: usize = 5;
const STEM_LIMIT: usize = 63 - SUFFIX;

/// Makes a given object one that may be created: defaults, a name, and the fields that the server alone sets.
///
/// # Errors
/// When it is no object, or carries a resourceVersion.
pub fn prepare(object: &mut Object, now: Time) -> Result<Kind, ApiError> {
    let kind = object
        .kind_of()
        .ok_or_else(|| ApiError::Invalid("object: missing, or of a kind that is not known here".into()))?;
    if !object.meta().resource_version.is_empty() {
        let given = &object.meta().resource_version;
        return Err(ApiError::Invalid(format!(
            "metadata.resourceVersion: {given:?}, but a new object has none; leave it empty"
        )));
    }
    defaults::apply(object);
    object.set_type();
    let uid = uuid::Uuid::new_v4();
    if let Some(meta) = object.meta_mut() {
        if meta.name.is_empty() && !meta.generate_name.is_empty() {
            meta.name = generated_name(&meta.generate_name, uid.as_bytes());
        }
        meta.uid = uid.to_string();
        meta.creation_timestamp = Some(now);
        meta.deletion_timestamp = None;
        meta.deletion_grace_period_seconds = None;
        meta.generation = 1;
    }
    match &mut object.kind {
        Some(object::Kind::Pod(pod)) => {
            let qos = resources::qos_class(pod.spec()).map(|class| class.as_str().to_owned());
            pod.status =
                Some(PodStatus { phase: "Pending".into(), qos_class: qos.unwrap_or_default(), ..PodStatus::default() });
        }
        Some(object::Kind::Namespace(namespace)) => {
            namespace.status.get_or_insert_default().phase = "Active".into();
        }
        Some(object::Kind::PodDisruptionBudget(budget)) => budget.status = Some(PodDisruptionBudgetStatus::default()),
        _ => {}
    }
    Ok(kind)
}

fn generated_name(stem: &str, random: &[u8; 16]) -> String {
    let stem: String = stem.chars().take(STEM_LIMIT).collect();
    let letter = |byte: &u8| NAME_LETTERS.get(usize::from(*byte) % NAME_LETTERS.len()).copied().map_or('x', char::from);
    // The first bytes of a random UUID are all random.
    stem + &random.iter().take(SUFFIX).map(letter).collect::<String>()
}

/// All problems of a new object at once.
///
/// # Errors
/// When there are any.
pub fn validate(object: &Object) -> Result<(), ApiError> {
    problems(&validate::create(object))
}

/// All problems of a change at once.
///
/// # Errors
/// When there are any.
pub fn validate_update(old: &Object, new: &Object) -> Result<(), ApiError> {
    problems(&validate::update(old, new))
}

/// The same for a change of a pod's debug containers.
///
/// # Errors
/// When there are any.
pub fn validate_ephemeral(old: &Object, new: &Object) -> Result<(), ApiError> {
    problems(&validate::update_ephemeral(old, new))
}

/// All of them as one error.
///
/// # Errors
/// When there are any.
pub(super) fn problems<P: ToString>(problems: &[P]) -> Result<(), ApiError> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(ApiError::Invalid(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")))
}

/// Sets spec.priority and spec.preemptionPolicy from the pod's priority class.
///
/// # Errors
/// When there is no such class, or the pod states another priority.
pub fn resolve_priority(object: &mut Object, cache: &Cache) -> Result<(), ApiError> {
    let (entries, _) = cache.list(Kind::PriorityClass, &Filter::everything(Kind::PriorityClass)?);
    let classes: Vec<&PriorityClass> = entries
        .iter()
        .filter_map(|entry| match &entry.object.kind {
            Some(object::Kind::PriorityClass(class)) => Some(class),
            _ => None,
        })
        .collect();
    match &mut object.kind {
        Some(object::Kind::Pod(pod)) => prioritise(pod.spec_mut(), &classes),
        _ => Ok(()),
    }
}

fn prioritise(spec: &mut PodSpec, classes: &[&PriorityClass]) -> Result<(), ApiError> {
    let name = |class: &PriorityClass| class.metadata.as_ref().map(|meta| meta.name.clone()).unwrap_or_default();
    let class = if spec.priority_class_name.is_empty() {
        classes.iter().filter(|class| class.global_default).min_by_key(|class| class.value)
    } else {
        classes.iter().find(|class| name(class) == spec.priority_class_name)
    };
    let (value, policy) = match class {
        Some(class) => {
            spec.priority_class_name = name(class);
            (class.value, class.preemption_policy.as_str())
        }
        None if spec.priority_class_name.is_empty() => (0, ""),
        None => {
            let built_in = BUILT_IN_CLASSES.iter().find(|(name, _)| *name == spec.priority_class_name);
            let missing = || {
                let given = &spec.priority_class_name;
                ApiError::Invalid(format!("spec.priorityClassName: {given:?}: there is no PriorityClass of that name"))
            };
            (built_in.ok_or_else(missing)?.1, "")
        }
    };
    if let Some(given) = spec.priority.filter(|given| *given != value) {
        return Err(ApiError::Invalid(format!(
            "spec.priority: {given}, but the pod's priority class says {value}; leave it empty"
        )));
    }
    spec.priority = Some(value);
    if spec.preemption_policy.is_empty() {
        spec.preemption_policy = if policy.is_empty() { "PreemptLowerPriority".into() } else { policy.to_owned() };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(name: &str, value: i32, default: bool) -> PriorityClass {
        let mut class = PriorityClass { value, global_default: default, ..PriorityClass::default() };
        class.metadata.get_or_insert_default().name = name.into();
        class
    }

    #[test]
    fn priorities() {
        let (low, high) = (class("low", -5, true), class("high", 9, false));
        let all = [&low, &high];
        for (given, stated, classes, want) in [
            ("", None, &all[..], Ok(-5)),
            ("", None, &[][..], Ok(0)),
            ("high", None, &all[..], Ok(9)),
            ("high", Some(9), &all[..], Ok(9)),
            ("high", Some(8), &all[..], Err("spec.priority: 8")),
            ("nope", None, &all[..], Err("spec.priorityClassName: \"nope\"")),
            ("system-node-critical", None, &all[..], Ok(2_000_001_000)),
        ] {
            let mut spec = PodSpec { priority_class_name: given.into(), priority: stated, ..PodSpec::default() };
            let done = prioritise(&mut spec, classes);
            match want {
                Ok(value) => {
                    done.expect(given);
                    assert_eq!(spec.priority, Some(value), "{given}");
                    assert_eq!(spec.preemption_policy, "PreemptLowerPriority");
                }
                Err(text) => assert!(done.expect_err(given).to_string().starts_with(text)),
            }
        }
    }

    #[test]
    fn generated_names_keep_to_a_label() {
        let name = generated_name(&"a".repeat(100), &[7; 16]);
        assert_eq!(name.len(), 63);
        assert!(crate::keys::check_name("name", &name).is_ok());
    }
}
