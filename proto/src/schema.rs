//! The shape of every object, made from the descriptors of core.proto at build time.

/// A JSON object with known fields.
#[derive(Debug)]
pub struct Message {
    /// Name in core.proto, for example `PodSpec`.
    pub name: &'static str,
    /// In the order of declaration.
    pub fields: &'static [Field],
}

/// One field of a [`Message`].
#[derive(Debug)]
pub struct Field {
    /// JSON name.
    pub name: &'static str,
    /// How many values it holds.
    pub cardinality: Cardinality,
    /// What each value is.
    pub value: Value,
}

/// How many values a field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cardinality {
    /// One value.
    One,
    /// A JSON array.
    List,
    /// A JSON object with free keys.
    Map,
}

/// What a value is in JSON.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub enum Value {
    String,
    Bool,
    Int32,
    Int64,
    /// Base64 text.
    Bytes,
    /// A string or a number.
    Quantity,
    /// RFC 3339.
    Time,
    /// RFC 3339 with microseconds.
    MicroTime,
    IntOrString,
    Message(&'static Message),
}

include!(concat!(env!("OUT_DIR"), "/schema.rs"));

/// The message of that name.
pub fn message(name: &str) -> Option<&'static Message> {
    MESSAGES.iter().copied().find(|message| message.name == name)
}

impl Message {
    /// The field with that JSON name.
    pub fn field(&self, name: &str) -> Option<&'static Field> {
        self.fields.iter().find(|field| field.name == name)
    }
}
