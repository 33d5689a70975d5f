//! The walk of validation: a path, and the problems found on it.

use std::{collections::HashSet, fmt};

use crate::{
    names::Check,
    problem::{MAX_PROBLEMS, Problem},
};

/// Collects problems; a check names its field relative to where the walk is.
#[derive(Default)]
pub(super) struct Walk {
    path: String,
    pub problems: Vec<Problem>,
}

impl Walk {
    fn join(&self, field: &str) -> String {
        match (self.path.is_empty(), field.is_empty()) {
            (_, true) => self.path.clone(),
            (true, _) => field.to_owned(),
            (false, _) if field.starts_with('[') => format!("{}{field}", self.path),
            _ => format!("{}.{field}", self.path),
        }
    }

    fn push(&mut self, problem: Problem) {
        // One more than is shown, so that it can be told that there are more.
        if self.problems.len() <= MAX_PROBLEMS {
            self.problems.push(problem);
        }
    }

    /// A value is wrong. An empty `field` is the place of the walk itself.
    pub fn bad(&mut self, field: &str, value: impl fmt::Display, wanted: impl fmt::Display) {
        self.push(Problem::found(self.join(field), value.to_string(), wanted));
    }

    /// Something is wrong that has no single value.
    pub fn wrong(&mut self, field: &str, message: impl Into<String>) {
        self.push(Problem::new(self.join(field), message));
    }

    /// A field must be there.
    pub fn missing(&mut self, field: &str, wanted: &str) {
        self.push(Problem::new(self.join(field), format!("is missing: {wanted}")));
    }

    /// Walks into a field.
    pub fn within<T>(&mut self, field: &str, run: impl FnOnce(&mut Walk) -> T) -> T {
        let length = self.path.len();
        self.path = self.join(field);
        let result = run(self);
        self.path.truncate(length);
        result
    }

    /// Walks into each item of a list.
    pub fn each<'a, T: 'a>(
        &mut self,
        field: &str,
        items: impl IntoIterator<Item = &'a T>,
        mut run: impl FnMut(&mut Walk, &'a T),
    ) {
        for (index, item) in items.into_iter().enumerate() {
            self.within(&format!("{field}[{index}]"), |walk| run(walk, item));
        }
    }

    /// A text of a certain form.
    pub fn form(&mut self, field: &str, value: &str, check: fn(&str) -> Check) {
        if let Err(wanted) = check(value) {
            self.bad(field, value, wanted);
        }
    }

    /// A text of a certain form, if it is there.
    pub fn form_if_set(&mut self, field: &str, value: &str, check: fn(&str) -> Check) {
        if !value.is_empty() {
            self.form(field, value, check);
        }
    }

    /// A word of a list; absent is as good (it has a default).
    pub fn word(&mut self, field: &str, value: &str, allowed: &[&str]) {
        if !value.is_empty() {
            self.must_be(field, value, allowed);
        }
    }

    /// A word of a list that must be there.
    pub fn must_be(&mut self, field: &str, value: &str, allowed: &[&str]) {
        if !allowed.contains(&value) {
            self.bad(field, value, format!("want {}", or(allowed)));
        }
    }

    /// A number within bounds.
    pub fn between(&mut self, field: &str, value: i64, least: i64, most: i64) {
        if !(least..=most).contains(&value) {
            self.bad(field, value, format!("want {least} to {most}"));
        }
    }

    /// Names of a list must differ.
    pub fn unique<'a>(&mut self, field: &str, name_field: &str, names: impl IntoIterator<Item = &'a str>) {
        let mut seen = HashSet::new();
        for (index, name) in names.into_iter().enumerate() {
            if !name.is_empty() && !seen.insert(name) {
                let place = if name_field.is_empty() { String::new() } else { format!(".{name_field}") };
                self.bad(&format!("{field}[{index}]{place}"), name, "is there already, want every one once");
            }
        }
    }
}

/// `a, b or c`.
fn or(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

/// An absolute path without `..`.
pub(super) fn absolute(path: &str) -> Check {
    let ok = path.starts_with('/') && !path.split('/').any(|part| part == "..") && !path.contains('\0');
    if ok { Ok(()) } else { Err("want an absolute path without \"..\"") }
}

/// A path below something: relative, without `..`.
pub(super) fn relative(path: &str) -> Check {
    let ok =
        !path.is_empty() && !path.starts_with('/') && !path.split('/').any(|part| part == "..") && !path.contains('\0');
    if ok { Ok(()) } else { Err("want a relative path without \"..\"") }
}

/// An IPv4 or IPv6 address.
pub(super) fn ip(text: &str) -> Check {
    text.parse::<std::net::IpAddr>().map(drop).map_err(|_| "want an IP address such as 10.0.0.1")
}
