//! The `tojson` filter as chat templates expect it: Python's separators, no escaping for HTML.

use std::io::{self, Write};

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// `value|tojson`, and with `indent`, `sort_keys`, `separators` and `ensure_ascii` as Python has them.
pub fn filter(value: &Value, args: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = args.get("indent")?;
    let separators: Option<Vec<String>> = args.get("separators")?;
    let sorted = args.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let ascii = args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    args.assert_all_used()?;
    let mut value = serde_json::to_value(value).map_err(unwritable)?;
    if sorted {
        value.sort_all_objects();
    }
    let [item, key] = match separators.as_deref() {
        Some([item, key]) => [item.as_str(), key.as_str()],
        _ => [", ", ": "],
    };
    let mut out = Vec::new();
    let written = match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut out, PythonFormatter { item, key })),
    };
    written.map_err(unwritable)?;
    let text = String::from_utf8(out).map_err(unwritable)?;
    Ok(Value::from(if ascii { escaped(&text) } else { text }))
}

fn unwritable(error: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::BadSerialization, error.to_string())
}

/// All but ASCII as `\u` escapes, which only texts within JSON have.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
        }
    }
    out
}

/// What stands between the parts.
struct PythonFormatter<'a> {
    item: &'a str,
    key: &'a str,
}

impl Formatter for PythonFormatter<'_> {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(self.item.as_bytes()) }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(self.item.as_bytes()) }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }
}
