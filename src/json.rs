//! Reads JSON objects as Go's `encoding/json` fills a struct (control-plane spec 2.2, backends spec 1.2), because that is how everyone's network
//! config and lease data were read so far.
//!
//! Names match whatever their case, unknown names are ignored, of duplicates the last one wins, `null` leaves the default,
//! and a number must be an integer written as one. Error texts name the object, the field, and what was found.

use std::fmt;

use serde::de::{Deserializer as _, MapAccess, Visitor};
use serde_json::value::RawValue;

/// How much of a wrong value an error text shows, in characters.
const SHOWN: usize = 40;

/// The fields of one JSON object.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    /// What the object is called in error texts: `Backend`.
    name: &'static str,
    fields: Vec<(String, &'a str)>,
}

impl<'a> Fields<'a> {
    /// Parses `json`, which must be one object; `null` is an empty one.
    pub(crate) fn parse(name: &'static str, json: &'a str) -> Result<Self, String> {
        let mut parser = serde_json::Deserializer::from_str(json);
        let fields = parser
            .deserialize_any(Collect)
            .and_then(|fields| parser.end().map(|()| fields))
            .map_err(|error| {
                // not serde's text, which can hold the whole document
                let (line, column) = (error.line(), error.column());
                format!(
                    "{name} must be a JSON object, got {} (line {line}, column {column})",
                    shown(json)
                )
            })?;
        Ok(Self { name, fields })
    }

    /// An integer.
    pub(crate) fn integer(&self, field: &str) -> Result<Option<i64>, String> {
        self.last(field, "an integer", |json| json.parse().ok())
    }

    /// `true` or `false`.
    pub(crate) fn flag(&self, field: &str) -> Result<Option<bool>, String> {
        self.last(field, "true or false", |json| json.parse().ok())
    }

    /// A string.
    pub(crate) fn text(&self, field: &str) -> Result<Option<String>, String> {
        self.last(field, "a string", |json| serde_json::from_str(json).ok())
    }

    /// The verbatim text of the last value of `field`, `null` included.
    pub(crate) fn raw(&self, field: &str) -> Option<&'a str> {
        let same = |(name, _): &&(String, &'a str)| name.eq_ignore_ascii_case(field);
        self.fields.iter().rfind(same).map(|(_, json)| *json)
    }

    /// The last value of `field`. Every earlier one must be of the right kind as well.
    fn last<T>(
        &self,
        field: &str,
        kind: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, String> {
        let mut found = None;
        for (_, json) in self.fields.iter().filter(|(name, _)| name.eq_ignore_ascii_case(field)) {
            if *json != "null" {
                let value = read(json);
                found = Some(value.ok_or_else(|| self.wrong(field, kind, json))?);
            }
        }
        Ok(found)
    }

    /// A field whose name is none of these, whatever the case.
    pub(crate) fn unknown(&self, known: &[&str]) -> Option<&str> {
        let is_known = |name: &str| known.iter().any(|known| known.eq_ignore_ascii_case(name));
        self.fields.iter().map(|(name, _)| &**name).find(|name| !is_known(name))
    }

    /// The text that refuses `got` as the value of `field`.
    pub(crate) fn wrong(&self, field: &str, kind: &str, got: impl fmt::Display) -> String {
        format!("{}.{field} must be {kind}, got {}", self.name, shown(&got.to_string()))
    }
}

/// The beginning of a text that anyone may have written, fit for a line of a log.
fn shown(text: &str) -> String {
    let printable = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut shown: String = text.chars().take(SHOWN).map(printable).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

/// Collects an object's fields in their order, duplicates included.
struct Collect;

impl<'de> Visitor<'de> for Collect {
    type Value = Vec<(String, &'de str)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut fields = Vec::new();
        while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
            fields.push((name, value.get()));
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(json: &str) -> Fields<'_> {
        Fields::parse("Backend", json).unwrap()
    }

    #[test]
    fn names_match_whatever_their_case_and_the_last_one_wins() {
        let integer = |json: &str| options(json).integer("VNI");
        for json in [
            r#"{"VNI":7}"#,
            r#"{"vni":7}"#,
            r#"{"Vni":7,"x":{"VNI":1}}"#,
            r#"{"VNI":1,"vni":7}"#,
            r#"{"vni":7,"VNI":null}"#,
            r#"{"\u0056NI":7}"#,
            " {\"VNI\" : 7 }\n",
        ] {
            assert_eq!(integer(json), Ok(Some(7)), "{json}");
        }
        for json in ["{}", "null", r#"{"VNI":null}"#, r#"{"VNIX":7}"#] {
            assert_eq!(integer(json), Ok(None), "{json}");
        }
    }

    #[test]
    fn integers_are_written_as_integers() {
        assert_eq!(options(r#"{"n":-5}"#).integer("n"), Ok(Some(-5)));
        for bad in ["1.0", "1e0", "\"1\"", "true", "[]", "{}", "9223372036854775808"] {
            let json = format!(r#"{{"VNI":{bad}}}"#);
            assert_eq!(
                options(&json).integer("VNI"),
                Err(format!("Backend.VNI must be an integer, got {bad}")),
            );
        }
        assert!(
            options(r#"{"VNI":"x","VNI":1}"#).integer("VNI").is_err(),
            "an earlier duplicate is read too"
        );
    }

    #[test]
    fn flags_and_strings() {
        assert_eq!(options(r#"{"gbp":true}"#).flag("GBP"), Ok(Some(true)));
        assert_eq!(options("{}").flag("GBP"), Ok(None));
        for bad in ["1", "\"true\"", "[]"] {
            assert!(options(&format!(r#"{{"GBP":{bad}}}"#)).flag("GBP").is_err(), "{bad}");
        }
        assert_eq!(options(r#"{"m":"a\u0062"}"#).text("M"), Ok(Some("ab".into())));
        assert!(options(r#"{"m":5}"#).text("M").is_err());
    }

    #[test]
    fn only_one_object() {
        for bad in ["", "[]", "5", "\"x\"", "{", "{} {}", r#"{"a":}"#, r#"{"a":1,}"#] {
            let error = Fields::parse("BackendData", bad).unwrap_err();
            assert!(error.starts_with("BackendData must be a JSON object, got "), "{error}");
        }
    }

    #[test]
    fn values_in_messages_are_cut_and_printable() {
        let json = format!(r#"{{"VNI":"{}"}}"#, "é".repeat(10_000));
        let error = options(&json).integer("VNI").unwrap_err();
        assert!(error.len() < 200, "{}", error.len());
        let error = Fields::parse("BackendData", "\"\n[2026] forged line\"").unwrap_err();
        assert!(!error.contains('\n'), "{error}");
    }
}
