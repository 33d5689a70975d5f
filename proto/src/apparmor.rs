//! AppArmor profiles as pods named them before there was a field (Kubernetes 1.30 reads both).

use crate::v1::AppArmorProfile;

/// Before the container's name in the annotation's.
pub const ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";

/// What the annotation's values look like.
pub const WANTED: &str = "want runtime/default, unconfined or localhost/PROFILE";

/// The field that an annotation's value stands for.
///
/// # Errors
/// What it should be.
pub fn from_annotation(value: &str) -> Result<AppArmorProfile, &'static str> {
    let (kind, profile) = match value {
        "runtime/default" => ("RuntimeDefault", ""),
        "unconfined" => ("Unconfined", ""),
        _ => ("Localhost", value.strip_prefix("localhost/").filter(|profile| !profile.is_empty()).ok_or(WANTED)?),
    };
    Ok(AppArmorProfile { r#type: kind.to_owned(), localhost_profile: profile.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_are_fields() {
        for (value, wanted) in [
            ("runtime/default", Some(("RuntimeDefault", ""))),
            ("unconfined", Some(("Unconfined", ""))),
            ("localhost/a", Some(("Localhost", "a"))),
            ("localhost//usr/bin/x", Some(("Localhost", "/usr/bin/x"))),
            ("localhost/", None),
            ("localhost", None),
            ("docker/default", None),
            ("", None),
        ] {
            let read = from_annotation(value).ok();
            let read = read.as_ref().map(|read| (read.r#type.as_str(), read.localhost_profile.as_str()));
            assert_eq!(read, wanted, "{value}");
        }
    }
}
