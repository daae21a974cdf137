//! The reader: walks the spanned TOML tree into typed values, notes every problem and goes on.
//!
//! Each type of the language implements [`Read`] once, and that one implementation both reads and describes itself as
//! JSON Schema; the [`table!`] macro does so for tables. Reader and schema thus cannot name different keys.
//!
//! What is wrong in one place never hides or causes a problem in another: a bad value becomes [`Key::Bad`], which later
//! checks leave alone.

use std::ops::{Deref, Range};

use serde_json::{Value, json};
use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use crate::problem::{Problems, suggest};

/// A value of the language.
pub(crate) trait Read: Sized {
    /// What is expected, to stand after "must be": `a whole number`.
    const EXPECTED: &'static str;

    /// Reads a value; what is wrong has been noted when it is none.
    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self>;

    /// Describes itself as JSON Schema.
    fn schema() -> Value;
}

/// A table with fixed keys.
pub(crate) trait Table: Read {
    /// What one such table is called: `a service`.
    const TITLE: &'static str;
    /// What it is for.
    const DESCRIPTION: &'static str;
    /// Its keys, in the order in which they are documented.
    const FIELDS: &'static [Field];
}

/// A key of a table.
pub(crate) struct Field {
    pub(crate) key: &'static str,
    pub(crate) description: &'static str,
    /// A value as one would write it, shown where a wrong one was found; a test reads each.
    pub(crate) example: &'static str,
    pub(crate) required: bool,
    pub(crate) schema: fn() -> Value,
}

/// A value that is written as text.
pub(crate) trait Text: Sized {
    /// What is expected, to stand after "must be": `a duration such as "30s"`.
    const EXPECTED: &'static str;
    /// A regular expression that every valid text matches, for editors.
    const PATTERN: Option<&'static str> = None;
    /// The only texts that are valid, when they can be listed.
    const CHOICES: &'static [&'static str] = &[];

    /// Reads the text.
    fn from_text(text: &str) -> Result<Self, Refusal>;
}

/// Why a text is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) message: String,
    /// What to do; the key's example when absent.
    pub(crate) help: Option<String>,
}

impl Refusal {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), help: None }
    }

    pub(crate) fn help(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: Some(help.into()) }
    }
}

/// A value of the tree, with what messages say about it.
#[derive(Clone, Copy)]
pub(crate) struct Node<'a> {
    /// The key it stands under.
    pub(crate) name: &'a str,
    /// Where that key is written.
    pub(crate) key: &'a Range<usize>,
    pub(crate) value: &'a Spanned<DeValue<'a>>,
    /// How one would write it: `port = 7071`.
    pub(crate) example: Example<'a>,
    /// Whether it is an entry of the array of that name.
    pub(crate) is_entry: bool,
}

/// A key and a value as one would write them.
#[derive(Clone, Copy)]
pub(crate) struct Example<'a> {
    pub(crate) key: &'a str,
    pub(crate) value: &'a str,
}

impl Example<'_> {
    fn help(self) -> Option<String> {
        (!self.value.is_empty()).then(|| format!("for example: `{} = {}`", self.key, self.value))
    }
}

impl Node<'_> {
    /// The place to point at: a table's key, since a table's own extent is its whole section; else the value.
    pub(crate) fn span(&self) -> Range<usize> {
        match self.value.get_ref() {
            DeValue::Table(_) => self.key.clone(),
            _ => self.value.span(),
        }
    }

    /// Notes that the value is of another type than expected.
    pub(crate) fn wrong_type(&self, expected: &str, problems: &mut Problems) {
        let subject = if self.is_entry { "each entry of " } else { "" };
        let actual = match self.value.get_ref() {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "an integer",
            DeValue::Float(_) => "a float",
            DeValue::Boolean(_) => "a boolean",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "an array",
            DeValue::Table(_) => "a table",
        };
        let message = format!("{subject}`{}` must be {expected}, not {actual}", self.name);
        problems.error("wrong-type", &self.span(), message, self.example.help());
    }

    /// Notes that the value is of the right type and still not valid.
    pub(crate) fn bad_value(&self, refusal: Refusal, problems: &mut Problems) {
        let help = refusal.help.or_else(|| self.example.help());
        problems.error("bad-value", &self.span(), refusal.message, help);
    }
}

impl<T: Text> Read for T {
    const EXPECTED: &'static str = T::EXPECTED;

    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self> {
        let DeValue::String(text) = node.value.get_ref() else {
            node.wrong_type(T::EXPECTED, problems);
            return None;
        };
        match checked_text(text) {
            Ok(value) => Some(value),
            Err(refusal) => {
                node.bad_value(refusal, problems);
                None
            }
        }
    }

    fn schema() -> Value {
        let mut schema = json!({ "type": "string" });
        if let Some(pattern) = T::PATTERN {
            schema["pattern"] = json!(pattern);
        }
        if !T::CHOICES.is_empty() {
            schema["enum"] = json!(T::CHOICES);
        }
        schema
    }
}

fn checked_text<T: Text>(text: &str) -> Result<T, Refusal> {
    if text.contains('\0') {
        return Err(Refusal::help("a text cannot hold the character NUL", "leave `\\u0000` out"));
    }
    T::from_text(text)
}

/// A value with its place.
#[derive(Debug, Clone)]
pub(crate) struct At<T> {
    pub(crate) span: Range<usize>,
    pub(crate) value: T,
}

impl<T> Deref for At<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

/// What a table holds under one key.
#[derive(Debug, Default)]
pub(crate) enum Key<T> {
    /// The key is not there.
    #[default]
    Absent,
    /// It is there and its problem has been noted.
    Bad,
    /// It is there.
    Is(At<T>),
}

impl<T> Key<T> {
    pub(crate) fn get(&self) -> Option<&At<T>> {
        match self {
            Self::Is(value) => Some(value),
            Self::Absent | Self::Bad => None,
        }
    }

    pub(crate) fn value(&self) -> Option<&T> {
        self.get().map(|at| &at.value)
    }

    /// Whether the key is not there: false for a bad value too, so that no second problem follows from a first.
    pub(crate) fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }

    pub(crate) fn is_bad(&self) -> bool {
        matches!(self, Self::Bad)
    }
}

impl<T> Key<List<T>> {
    /// The entries that could be read.
    pub(crate) fn items(&self) -> impl Iterator<Item = &At<T>> {
        self.value().into_iter().flat_map(|list| &list.items)
    }
}

impl<K, V> Key<Map<K, V>> {
    /// All entries whose name could be read.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &(At<K>, Key<V>)> {
        self.value().into_iter().flat_map(|map| &map.entries)
    }

    /// Entries whose value could be read too.
    pub(crate) fn good(&self) -> impl Iterator<Item = (&At<K>, &At<V>)> {
        self.value().into_iter().flat_map(Map::good)
    }
}

/// An array.
#[derive(Debug)]
pub(crate) struct List<T> {
    /// The entries that could be read, in order.
    pub(crate) items: Vec<At<T>>,
    /// Whether every entry could be read.
    pub(crate) complete: bool,
}

impl<T: Read> Read for List<T> {
    const EXPECTED: &'static str = "an array";

    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self> {
        let DeValue::Array(array) = node.value.get_ref() else {
            node.wrong_type(Self::EXPECTED, problems);
            return None;
        };
        let mut list = Self { items: Vec::with_capacity(array.len()), complete: true };
        for value in array {
            let entry = Node { key: &value.span(), value, is_entry: true, ..node };
            match T::read(entry, problems) {
                Some(item) => list.items.push(At { span: entry.span(), value: item }),
                None => list.complete = false,
            }
        }
        Some(list)
    }

    fn schema() -> Value {
        json!({ "type": "array", "items": T::schema() })
    }
}

/// One value, or an array of such.
#[derive(Debug)]
pub(crate) struct OneOrMany<T>(pub(crate) List<T>);

impl<T: Read> Read for OneOrMany<T> {
    const EXPECTED: &'static str = T::EXPECTED;

    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self> {
        if matches!(node.value.get_ref(), DeValue::Array(_)) {
            return List::read(node, problems).map(Self);
        }
        let value = T::read(node, problems)?;
        Some(Self(List { items: vec![At { span: node.span(), value }], complete: true }))
    }

    fn schema() -> Value {
        json!({ "anyOf": [T::schema(), List::<T>::schema()] })
    }
}

/// A table whose keys are names.
#[derive(Debug)]
pub(crate) struct Map<K, V> {
    /// The entries that could be read, in the order of the text.
    pub(crate) entries: Vec<(At<K>, Key<V>)>,
    /// Whether every key could be read.
    pub(crate) complete: bool,
}

impl<K, V> Default for Map<K, V> {
    fn default() -> Self {
        Self { entries: Vec::new(), complete: true }
    }
}

impl<K, V> Map<K, V> {
    /// Entries whose value could be read.
    pub(crate) fn good(&self) -> impl Iterator<Item = (&At<K>, &At<V>)> + Clone {
        self.entries.iter().filter_map(|(key, value)| Some((key, value.get()?)))
    }
}

impl<K: Text, V: Read> Read for Map<K, V> {
    const EXPECTED: &'static str = "a table";

    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self> {
        let DeValue::Table(table) = node.value.get_ref() else {
            node.wrong_type(Self::EXPECTED, problems);
            return None;
        };
        let mut map = Self::default();
        for (key, value) in in_text_order(table) {
            let span = key.span();
            // A value is read even under a bad name: its own problems are worth knowing now.
            let entry = Node { name: key.get_ref(), key: &span, value, is_entry: false, ..node };
            let value = read_key(entry, problems);
            match checked_text::<K>(key.get_ref()) {
                Ok(name) => map.entries.push((At { span, value: name }, value)),
                Err(refusal) => {
                    problems.error("bad-name", &span, refusal.message, refusal.help);
                    map.complete = false;
                }
            }
        }
        Some(map)
    }

    fn schema() -> Value {
        let mut schema = json!({ "type": "object", "additionalProperties": V::schema() });
        if let Some(pattern) = K::PATTERN {
            schema["propertyNames"] = json!({ "pattern": pattern });
        }
        schema
    }
}

/// A value that may be written short: `health = "/health"` for `health = { http = "/health" }`.
pub(crate) trait Shorthand: Table {
    /// What the short form is.
    type Short: Text;
    /// The whole for the short form.
    fn from_short(short: At<Self::Short>) -> Self;
}

/// The short or the whole form of a value.
#[derive(Debug)]
pub(crate) struct Short<T>(pub(crate) T);

impl<T: Shorthand> Read for Short<T> {
    const EXPECTED: &'static str = T::EXPECTED;

    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self> {
        match node.value.get_ref() {
            DeValue::String(_) => {
                let value = <T::Short as Read>::read(node, problems)?;
                Some(Self(T::from_short(At { span: node.span(), value })))
            }
            _ => T::read(node, problems).map(Self),
        }
    }

    fn schema() -> Value {
        json!({ "anyOf": [<T::Short as Read>::schema(), T::schema()] })
    }
}

/// A whole number between two bounds.
pub(crate) fn read_integer(
    node: Node<'_>,
    expected: &str,
    bounds: std::ops::RangeInclusive<u32>,
    problems: &mut Problems,
) -> Option<u32> {
    let DeValue::Integer(integer) = node.value.get_ref() else {
        node.wrong_type(expected, problems);
        return None;
    };
    let number = integer_value(integer).filter(|number| bounds.contains(number));
    if number.is_none() {
        let message = format!(
            "`{}` must be a whole number from {} to {}, not {integer}",
            node.name,
            bounds.start(),
            bounds.end()
        );
        node.bad_value(Refusal::new(message), problems);
    }
    number
}

fn integer_value(integer: &DeInteger<'_>) -> Option<u32> {
    u32::from_str_radix(integer.as_str(), integer.radix()).ok()
}

/// A table with fixed keys, being read.
pub(crate) struct TableReader<'a> {
    table: &'a DeTable<'a>,
}

impl<'a> TableReader<'a> {
    /// Begins to read a table; notes another type, unknown keys and missing ones.
    pub(crate) fn open<T: Table>(node: Node<'a>, problems: &mut Problems) -> Option<Self> {
        let DeValue::Table(table) = node.value.get_ref() else {
            node.wrong_type(T::EXPECTED, problems);
            return None;
        };
        for (key, _) in table {
            if !T::FIELDS.iter().any(|field| field.key == key.get_ref()) {
                unknown_key::<T>(key.get_ref(), &key.span(), problems);
            }
        }
        for field in T::FIELDS {
            if field.required && !table.contains_key(field.key) {
                let example = Example { key: field.key, value: field.example };
                let message = format!("{} needs `{}`", T::TITLE, field.key);
                problems.error("missing-key", &node.span(), message, example.help());
            }
        }
        Some(Self { table })
    }

    /// Reads a table whose other keys the caller sees to.
    pub(crate) fn over(table: &'a DeTable<'a>) -> Self {
        Self { table }
    }

    /// Reads what is under one key.
    pub(crate) fn key<T: Read>(
        &self,
        key: &'static str,
        example: &'static str,
        problems: &mut Problems,
    ) -> Key<T> {
        let Some((name, value)) = self.table.get_key_value(key) else { return Key::Absent };
        let example = Example { key, value: example };
        read_key(Node { name: key, key: &name.span(), value, example, is_entry: false }, problems)
    }
}

fn read_key<T: Read>(node: Node<'_>, problems: &mut Problems) -> Key<T> {
    match T::read(node, problems) {
        Some(value) => Key::Is(At { span: node.span(), value }),
        None => Key::Bad,
    }
}

fn unknown_key<T: Table>(key: &str, span: &Range<usize>, problems: &mut Problems) {
    let own = T::FIELDS.iter().map(|field| field.key);
    let help = match crate::problem::nearest(key, own.clone()) {
        Some(nearest) => Some(format!("did you mean `{nearest}`?")),
        None => match crate::language::home_of(key) {
            Some(home) => Some(format!("`{key}` is a key of {home}")),
            None => suggest(key, "its keys are", own),
        },
    };
    problems.error("unknown-key", span, format!("`{key}` is not a key of {}", T::TITLE), help);
}

/// The entries of a table as they stand in the text; the tree sorts them by name.
pub(crate) fn in_text_order<'a, 'i>(
    table: &'a DeTable<'i>,
) -> Vec<(&'a Spanned<std::borrow::Cow<'i, str>>, &'a Spanned<DeValue<'i>>)> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

/// The JSON Schema of a table with fixed keys.
pub(crate) fn table_schema<T: Table>() -> Value {
    let mut properties = serde_json::Map::new();
    for field in T::FIELDS {
        let mut schema = (field.schema)();
        schema["description"] = json!(plain(field.description));
        properties.insert(field.key.to_owned(), schema);
    }
    let required: Vec<_> = T::FIELDS.iter().filter(|field| field.required).map(|field| field.key).collect();
    let mut schema = json!({
        "type": "object",
        "description": plain(T::DESCRIPTION),
        "properties": properties,
        "additionalProperties": false,
    });
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}

/// A doc comment as running text.
fn plain(doc: &str) -> String {
    doc.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Declares a table of the language: the struct, how it is read and its schema, from one list of keys.
///
/// Each key is written `name: Type = "example",` with its description as a doc comment; `name [required]: …` must be there.
macro_rules! table {
    (
        $(#[doc = $doc:literal])*
        $name:ident, $title:literal, {
            $( $(#[doc = $field_doc:literal])* $field:ident $([$required:ident])? : $type:ty = $example:literal, )*
        }
    ) => {
        $(#[doc = $doc])*
        #[derive(Debug, Default)]
        pub(crate) struct $name {
            $( $(#[doc = $field_doc])* pub(crate) $field: $crate::read::Key<$type>, )*
        }

        impl $crate::read::Table for $name {
            const TITLE: &'static str = $title;
            const DESCRIPTION: &'static str = concat!($($doc, "\n"),*);
            const FIELDS: &'static [$crate::read::Field] = &[$( $crate::read::Field {
                key: stringify!($field),
                description: concat!($($field_doc, "\n"),*),
                example: $example,
                required: !<[&str]>::is_empty(&[$(stringify!($required))?]),
                schema: <$type as $crate::read::Read>::schema,
            }, )*];
        }

        impl $crate::read::Read for $name {
            const EXPECTED: &'static str = "a table";

            fn read(
                node: $crate::read::Node<'_>,
                problems: &mut $crate::problem::Problems,
            ) -> Option<Self> {
                let table = $crate::read::TableReader::open::<Self>(node, problems)?;
                Some(Self { $( $field: table.key(stringify!($field), $example, problems), )* })
            }

            fn schema() -> serde_json::Value {
                $crate::read::table_schema::<Self>()
            }
        }
    };
}
pub(crate) use table;
