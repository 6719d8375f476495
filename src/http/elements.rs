//! Splits a stream of JSON documents as it arrives, so that a list of 5,000 leases never exists as one text.
//!
//! Of each document the elements of one array (such as `kvs`, or `node` / `nodes`) come out one by one, each whole; the
//! document itself comes out at its end with that array emptied. Only nesting and strings are understood here; what is
//! inside an element is the caller's to parse, and so is the rest of the document.

use std::fmt;

/// Deepest nesting outside an element. A document of ours has five levels.
const DEEPEST: usize = 64;
/// Longest document without its elements, in bytes.
const LONGEST_DOCUMENT: usize = 1 << 20;

/// What comes out.
#[derive(Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// One element of the array, verbatim.
    Element(&'a [u8]),
    /// A document is complete: this is it, with the array emptied.
    Document(&'a [u8]),
}

/// The stream cannot be JSON of the expected kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ElementsError {
    /// A bracket, brace or comma where none can be, or text outside any document.
    NotJson,
    /// An element or document is longer than allowed.
    TooLong,
    /// Nested deeper than any answer of a store.
    TooDeep,
    /// The stream ended within a document.
    CutOff,
}

impl fmt::Display for ElementsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotJson => "the answer is not JSON",
            Self::TooLong => "the answer has a part that is too long",
            Self::TooDeep => "the answer is nested too deeply",
            Self::CutOff => "the answer was cut off",
        })
    }
}

impl std::error::Error for ElementsError {}

/// An open object or array.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Level {
    /// An object. `on_path` when its name is the next on the path, so that a value in it may be the array.
    Object {
        on_path: bool,
    },
    Array,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Text {
    /// Not in a string.
    Outside,
    Inside,
    /// After a backslash.
    Escaped,
}

/// The splitter.
#[derive(Debug)]
pub struct Elements {
    path: &'static [&'static str],
    max_element: usize,
    levels: Vec<Level>,
    text: Text,
    /// The document so far, without elements.
    document: Vec<u8>,
    /// Where in `document` the last string began, after its quote.
    string_at: usize,
    /// The last string was a name, and it is the next on the path.
    matched: bool,
    /// Depth inside the element that is being read: 0 between elements.
    element_depth: usize,
    in_array: bool,
    element: Vec<u8>,
}

impl Elements {
    /// Splits along `path`, which has at least one name. No element may be longer than `max_element` bytes.
    pub fn new(path: &'static [&'static str], max_element: usize) -> Self {
        Self {
            path,
            max_element,
            levels: Vec::new(),
            text: Text::Outside,
            document: Vec::new(),
            string_at: 0,
            matched: false,
            element_depth: 0,
            in_array: false,
            element: Vec::new(),
        }
    }

    /// Takes the next piece of the stream, of any length.
    ///
    /// # Errors
    /// The stream is not what it should be; nothing more comes of it.
    pub fn push(
        &mut self,
        bytes: &[u8],
        out: &mut dyn FnMut(Item<'_>),
    ) -> Result<(), ElementsError> {
        let mut rest = bytes;
        while let Some((byte, tail)) = rest.split_first() {
            if self.in_array {
                rest = self.push_element(rest, out)?;
            } else {
                self.push_document(*byte, out)?;
                rest = tail;
            }
        }
        Ok(())
    }

    /// Did the stream end where a document ended?
    ///
    /// # Errors
    /// [`ElementsError::CutOff`] if not.
    pub fn finish(&self) -> Result<(), ElementsError> {
        if self.levels.is_empty() && self.document.is_empty() {
            Ok(())
        } else {
            Err(ElementsError::CutOff)
        }
    }

    /// Inside the array: collects one element, or finds the array's end. Returns what it has not read.
    fn push_element<'a>(
        &mut self,
        bytes: &'a [u8],
        out: &mut dyn FnMut(Item<'_>),
    ) -> Result<&'a [u8], ElementsError> {
        for (at, byte) in bytes.iter().enumerate() {
            match self.text {
                Text::Escaped => self.text = Text::Inside,
                Text::Inside => match byte {
                    b'\\' => self.text = Text::Escaped,
                    b'"' => self.text = Text::Outside,
                    _ => {}
                },
                Text::Outside => match byte {
                    b'"' => self.text = Text::Inside,
                    b'{' | b'[' => self.element_depth += 1,
                    b'}' | b']' if self.element_depth > 0 => self.element_depth -= 1,
                    b',' | b']' if self.element_depth == 0 => {
                        self.collect(&bytes[..at])?;
                        let element = self.element.trim_ascii();
                        if !element.is_empty() {
                            out(Item::Element(element));
                        }
                        self.element.clear();
                        if *byte == b']' {
                            self.in_array = false;
                            self.levels.pop();
                            self.document.push(b']');
                        }
                        return Ok(&bytes[at + 1..]);
                    }
                    b'}' => return Err(ElementsError::NotJson),
                    _ => {}
                },
            }
        }
        self.collect(bytes)?;
        Ok(&[])
    }

    fn collect(&mut self, bytes: &[u8]) -> Result<(), ElementsError> {
        if self.element.len() + bytes.len() > self.max_element {
            return Err(ElementsError::TooLong);
        }
        self.element.extend_from_slice(bytes);
        Ok(())
    }

    /// Outside the array: one byte of the document.
    fn push_document(
        &mut self,
        byte: u8,
        out: &mut dyn FnMut(Item<'_>),
    ) -> Result<(), ElementsError> {
        if self.levels.is_empty() && byte.is_ascii_whitespace() {
            return Ok(());
        }
        if self.document.len() == LONGEST_DOCUMENT {
            return Err(ElementsError::TooLong);
        }
        self.document.push(byte);
        match self.text {
            Text::Escaped => self.text = Text::Inside,
            Text::Inside if byte == b'\\' => self.text = Text::Escaped,
            Text::Inside => {
                if byte == b'"' {
                    self.text = Text::Outside;
                    self.matched = self.is_next_name();
                }
            }
            Text::Outside => match byte {
                b'"' if !self.levels.is_empty() => {
                    self.text = Text::Inside;
                    self.string_at = self.document.len();
                }
                b'{' => {
                    // the outermost object is where the path begins
                    let on_path = self.levels.is_empty() || self.matched;
                    self.open(Level::Object { on_path })?;
                }
                b'[' if !self.levels.is_empty() => {
                    self.in_array = self.matched && self.names_matched() == self.path.len();
                    self.open(Level::Array)?;
                }
                b'}' | b']' => self.close(byte, out)?,
                // a colon keeps the match for the value that follows
                b':' => {}
                byte if byte.is_ascii_whitespace() => {}
                _ if self.levels.is_empty() => return Err(ElementsError::NotJson),
                _ => self.matched = false,
            },
        }
        Ok(())
    }

    fn open(&mut self, level: Level) -> Result<(), ElementsError> {
        if self.levels.len() == DEEPEST {
            return Err(ElementsError::TooDeep);
        }
        self.levels.push(level);
        self.matched = false;
        Ok(())
    }

    fn close(&mut self, byte: u8, out: &mut dyn FnMut(Item<'_>)) -> Result<(), ElementsError> {
        self.matched = false;
        match (self.levels.pop(), byte) {
            (Some(Level::Object { .. }), b'}') | (Some(Level::Array), b']') => {}
            _ => return Err(ElementsError::NotJson),
        }
        if self.levels.is_empty() {
            out(Item::Document(&self.document));
            self.document.clear();
        }
        Ok(())
    }

    /// How many names of the path the open objects stand for, the one matched last included.
    fn names_matched(&self) -> usize {
        let on_path = |level: &&Level| **level == Level::Object { on_path: true };
        self.levels.iter().take_while(on_path).count()
    }

    /// Is the string that just ended the next name on the path, in an object that is on it?
    fn is_next_name(&self) -> bool {
        let depth = self.names_matched();
        let name = &self.document[self.string_at..self.document.len() - 1];
        depth == self.levels.len()
            && self.path.get(depth - 1).is_some_and(|next| next.as_bytes() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Split = (Vec<String>, Vec<String>);

    fn split(path: &'static [&'static str], pieces: &[&[u8]]) -> Result<Split, ElementsError> {
        let mut elements = Elements::new(path, 1000);
        let (mut found, mut documents) = (vec![], vec![]);
        for piece in pieces {
            elements.push(piece, &mut |item| match item {
                Item::Element(text) => found.push(String::from_utf8_lossy(text).into_owned()),
                Item::Document(text) => documents.push(String::from_utf8_lossy(text).into_owned()),
            })?;
        }
        elements.finish()?;
        Ok((found, documents))
    }

    #[test]
    fn elements_and_the_rest() {
        for (path, text, elements, document) in [
            (
                &["kvs"][..],
                r#"{"header":{"revision":"7"},"kvs":[{"a":[1,2]},{"b":"]},\"{"}],"count":"2"}"#,
                &[r#"{"a":[1,2]}"#, r#"{"b":"]},\"{"}"#][..],
                r#"{"header":{"revision":"7"},"kvs":[],"count":"2"}"#,
            ),
            (
                &["node", "nodes"],
                r#"{"node":{"key":"/x","nodes":[1, "two" ,[3]]}}"#,
                &["1", "\"two\"", "[3]"],
                r#"{"node":{"key":"/x","nodes":[]}}"#,
            ),
            (&["kvs"], r#"{"kvs":[]}"#, &[], r#"{"kvs":[]}"#),
            (&["kvs"], r#"{"error":"x","code":5}"#, &[], r#"{"error":"x","code":5}"#),
            // the name elsewhere is not the array meant
            (
                &["kvs"],
                r#"{"a":{"kvs":[1]},"b":"kvs","c":[2]}"#,
                &[],
                r#"{"a":{"kvs":[1]},"b":"kvs","c":[2]}"#,
            ),
            (&["kvs"], r#"{"kvs":{"kvs":[1]}}"#, &[], r#"{"kvs":{"kvs":[1]}}"#),
            (
                &["a", "b"],
                r#"{"b":[1],"a":{"c":{"b":[2]},"b":[3]}}"#,
                &["3"],
                r#"{"b":[1],"a":{"c":{"b":[2]},"b":[]}}"#,
            ),
            (&["kvs"], r#"{"kvs":7,"x":[1]}"#, &[], r#"{"kvs":7,"x":[1]}"#),
        ] {
            assert_eq!(
                split(path, &[text.as_bytes()]),
                Ok((
                    elements.iter().map(ToString::to_string).collect(),
                    vec![document.to_string()]
                )),
                "{text}"
            );
        }
    }

    #[test]
    fn any_cutting_gives_the_same() {
        let text = br#" {"result":{"events":[{"k":"\\\"["},{"k":{}}],"h":{"r":"1"}}}
            {"result":{"events":[]}} {"result":{"created":true}}"#;
        let whole = split(&["result", "events"], &[text]).unwrap();
        assert_eq!((whole.0.len(), whole.1.len()), (2, 3));
        for cut in 1..text.len() {
            assert_eq!(
                split(&["result", "events"], &[&text[..cut], &text[cut..]]),
                Ok(whole.clone())
            );
        }
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(split(&["result", "events"], &bytes), Ok(whole));
    }

    #[test]
    fn what_is_no_stream_of_documents_is_refused() {
        for (text, error) in [
            ("<html>", ElementsError::NotJson),
            ("]", ElementsError::NotJson),
            ("{]", ElementsError::NotJson),
            ("{\"kvs\":[}", ElementsError::NotJson),
            ("[1]", ElementsError::NotJson),
            ("{\"a\":", ElementsError::CutOff),
            ("{\"kvs\":[1", ElementsError::CutOff),
            ("7", ElementsError::NotJson),
        ] {
            assert_eq!(split(&["kvs"], &[text.as_bytes()]), Err(error), "{text}");
        }
        assert_eq!(
            split(&["kvs"], &["{\"a\":[".repeat(100).as_bytes()]),
            Err(ElementsError::TooDeep)
        );
        let long = format!("{{\"kvs\":[\"{}\"]}}", "x".repeat(1001));
        assert_eq!(split(&["kvs"], &[long.as_bytes()]), Err(ElementsError::TooLong));
        let long = format!("{{\"x\":\"{}\"}}", "x".repeat(LONGEST_DOCUMENT));
        assert_eq!(split(&["kvs"], &[long.as_bytes()]), Err(ElementsError::TooLong));
    }

    #[test]
    fn agrees_with_a_parser_on_mutated_documents() {
        let seed =
            br#"{"h":{"r":"1"},"kvs":[{"key":"a\"b","v":[1,{"x":2}]},{"key":"c"}],"count":"2"}"#;
        let mut state = 5u32;
        let mut agreed = 0;
        for _ in 0..20_000 {
            let mut bytes = seed.to_vec();
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let [high, low, value, _] = state.to_be_bytes();
            let at = usize::from(u16::from_be_bytes([high, low])) % bytes.len();
            bytes[at] = value;
            let ours = split(&["kvs"], &[&bytes]);
            let Ok(theirs) = serde_json::from_slice::<serde_json::Value>(&bytes) else { continue };
            let (elements, documents) = ours.unwrap();
            if let Some(kvs) = theirs.get("kvs").and_then(|kvs| kvs.as_array()) {
                let parsed: Vec<serde_json::Value> =
                    elements.iter().map(|e| serde_json::from_str(e).unwrap()).collect();
                assert_eq!(&parsed, kvs);
                agreed += 1;
            }
            assert_eq!(documents.len(), 1);
        }
        assert!(agreed > 100);
    }
}
