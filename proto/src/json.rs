//! What the serde attributes of the generated types refer to.

/// Numbers are absent in JSON when they are zero.
pub(crate) fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A quantity: canonical text; a plain number is accepted on input. Text that is no quantity stays as it is, for validation to report.
pub(crate) mod quantity {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &str, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(value)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
        super::QuantityText::deserialize(deserializer).map(|text| text.0)
    }
}

/// Quantities by resource name.
pub(crate) mod quantity_map {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &BTreeMap<String, String>, serializer: S) -> Result<S::Ok, S::Error> {
        value.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<String, String>, D::Error> {
        let map = BTreeMap::<String, super::QuantityText>::deserialize(deserializer)?;
        Ok(map.into_iter().map(|(name, text)| (name, text.0)).collect())
    }
}

/// Values as base64 (RFC 4648, with padding).
pub(crate) mod bytes_map {
    use std::collections::BTreeMap;

    use bytes::Bytes;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(value: &BTreeMap<String, Bytes>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(value.iter().map(|(name, bytes)| (name, crate::base64::encode(bytes))))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, Bytes>, D::Error> {
        let map = BTreeMap::<String, String>::deserialize(deserializer)?;
        let decode = |(name, text): (String, String)| match crate::base64::decode(&text) {
            Some(bytes) => Ok((name, Bytes::from(bytes))),
            None => Err(D::Error::custom(format!("{name}: not base64"))),
        };
        map.into_iter().map(decode).collect()
    }
}

use crate::quantity::canonical;

struct QuantityText(String);

impl<'de> serde::Deserialize<'de> for QuantityText {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = QuantityText;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a quantity such as 100m, 1.5 or 64Mi")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<QuantityText, E> {
                Ok(QuantityText(canonical(text)))
            }
            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<QuantityText, E> {
                Ok(QuantityText(canonical(&number.to_string())))
            }
            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<QuantityText, E> {
                Ok(QuantityText(canonical(&number.to_string())))
            }
            fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<QuantityText, E> {
                Ok(QuantityText(canonical(&number.to_string())))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}
