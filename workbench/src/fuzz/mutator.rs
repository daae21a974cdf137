//! Makes new inputs out of known ones: by bytes, and by the pieces of which texts consist.
//!
//! Nothing here knows a format. A text is cut into words, numbers, strings and marks, and whatever is nested in brackets is
//! one piece as well; pieces are then swapped, repeated, left out and replaced. So a mutated JSON, TOML or HTTP text is often
//! still one, and reaches what lies behind the parser.

use std::ops::Range;

use crate::chance::Chance;

/// The longest input that is made.
pub(crate) const INPUT_BYTES_MAX: usize = 1 << 20;
/// Changes made to one input: mostly one or two, so that much of it stays valid.
const CHANGES_MAX: usize = 5;
/// How often a piece is repeated at most.
const REPEATS_MAX: usize = 4_096;

/// Numbers at which something ends.
const EXTREMES: [&str; 24] = [
    "0",
    "-1",
    "1",
    "127",
    "128",
    "255",
    "256",
    "65535",
    "65536",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775809",
    "1e308",
    "1e999",
    "0.1",
    "00",
    "0x7f",
];

/// What every text format may meet.
const MARKS: [&str; 30] = [
    "\0",
    "\r\n",
    "\n",
    "\t",
    " ",
    "\"",
    "'",
    "\\",
    "/",
    "..",
    "../",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    ";",
    "=",
    "#",
    "%",
    "null",
    "true",
    "\u{feff}",
    "\u{202e}",
    "é",
    "\u{10ffff}",
    "\\u0000",
    "\\ud800",
    "nan",
];

/// Makes inputs for one target.
pub(crate) struct Mutator<'a> {
    /// Known inputs, at least one.
    pub(crate) corpus: &'a [Vec<u8>],
    /// Words of the format.
    pub(crate) words: &'a [&'a str],
}

impl Mutator<'_> {
    /// A new input.
    pub(crate) fn make(&self, chance: &mut Chance) -> Vec<u8> {
        let mut input = chance.pick(self.corpus).cloned().unwrap_or_default();
        for change in 0..CHANGES_MAX {
            if change > 0 && chance.once_in(2) {
                break;
            }
            if chance.once_in(3) {
                self.change_bytes(&mut input, chance);
            } else {
                self.change_pieces(&mut input, chance);
            }
            input.truncate(INPUT_BYTES_MAX);
        }
        input
    }

    fn change_bytes(&self, input: &mut Vec<u8>, chance: &mut Chance) {
        let place = chance.below(input.len() + 1);
        let range = some_range(input.len(), chance);
        match chance.below(9) {
            0 => {
                if let Some(byte) = input.get_mut(place) {
                    *byte ^= 1 << chance.below(8);
                }
            }
            1 => {
                if let Some(byte) = input.get_mut(place) {
                    *byte = chance.byte();
                }
            }
            2 => {
                let new: Vec<u8> = (0..=chance.below(16)).map(|_| chance.byte()).collect();
                splice(input, place..place, &new);
            }
            3 => splice(input, range, &[]),
            4 => input.truncate(place),
            5 => {
                let times = 1 + chance.below(8);
                let copy = input[range].repeat(times);
                splice(input, place..place, &copy);
            }
            6 => binary_extreme(input, place, chance),
            7 => {
                // The beginning of one and the end of another.
                let other = chance.pick(self.corpus).cloned().unwrap_or_default();
                let from = chance.below(other.len() + 1);
                input.truncate(place);
                input.extend_from_slice(&other[from..]);
            }
            _ => {
                let copy = input[range].to_vec();
                let end = (place + copy.len()).min(input.len());
                splice(input, place..end, &copy);
            }
        }
    }

    fn change_pieces(&self, input: &mut Vec<u8>, chance: &mut Chance) {
        let pieces = pieces(input);
        let (Some(one), Some(other)) = (chance.pick(&pieces).cloned(), chance.pick(&pieces).cloned()) else {
            input.extend_from_slice(self.word(chance).as_bytes());
            return;
        };
        match chance.below(8) {
            // A value where another one is.
            0 => {
                let copy = input[other].to_vec();
                splice(input, one, &copy);
            }
            1 => {
                let (first, second) = if one.start <= other.start { (one, other) } else { (other, one) };
                if first.end <= second.start {
                    let (left, right) = (input[first.clone()].to_vec(), input[second.clone()].to_vec());
                    splice(input, second, &left);
                    splice(input, first, &right);
                }
            }
            2 => splice(input, one, &[]),
            3 => {
                let numbers: Vec<_> =
                    pieces.iter().filter(|piece| input[piece.start].is_ascii_digit()).cloned().collect();
                let place = chance.pick(&numbers).cloned().unwrap_or(one);
                let extreme = chance.pick(&EXTREMES).copied().unwrap_or_default();
                splice(input, place, extreme.as_bytes());
            }
            4 => {
                let word = self.word(chance);
                splice(input, one, word.as_bytes());
            }
            5 => {
                let word = self.word(chance);
                splice(input, one.start..one.start, word.as_bytes());
            }
            6 => {
                let most = if chance.once_in(8) { REPEATS_MAX } else { 8 };
                let times = 1 + chance.below(most);
                let times = times.min(INPUT_BYTES_MAX / one.len().max(1));
                let copy = input[one.clone()].repeat(times);
                splice(input, one.end..one.end, &copy);
            }
            // A piece of another known input.
            _ => {
                let from = chance.pick(self.corpus).cloned().unwrap_or_default();
                if let Some(piece) = chance.pick(&self::pieces(&from)) {
                    splice(input, one, &from[piece.clone()]);
                }
            }
        }
    }

    fn word(&self, chance: &mut Chance) -> String {
        let words = if chance.once_in(3) { &MARKS[..] } else { self.words };
        chance.pick(words).copied().unwrap_or_default().to_owned()
    }
}

/// The pieces of a text: words, numbers, strings in quotes, single marks, and everything from a bracket to its partner.
fn pieces(input: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut open = Vec::new();
    let mut at = 0;
    while let Some(byte) = input.get(at) {
        let start = at;
        at += 1;
        match byte {
            b'"' => {
                while let Some(byte) = input.get(at) {
                    at += if *byte == b'\\' { 2 } else { 1 };
                    if *byte == b'"' {
                        break;
                    }
                }
                at = at.min(input.len());
            }
            b'{' | b'[' => open.push(start),
            b'}' | b']' => found.extend(open.pop().map(|open| open..at)),
            b' ' | b'\n' | b'\r' | b'\t' => continue,
            byte if is_of_word(*byte) => {
                while input.get(at).is_some_and(|byte| is_of_word(*byte)) {
                    at += 1;
                }
            }
            _ => {}
        }
        found.push(start..at);
    }
    // Whole lines are pieces too.
    let mut start = 0;
    for line in input.split_inclusive(|byte| *byte == b'\n') {
        found.push(start..start + line.len());
        start += line.len();
    }
    found
}

fn is_of_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_-.".contains(&byte) || byte >= 0x80
}

fn some_range(length: usize, chance: &mut Chance) -> Range<usize> {
    let start = chance.below(length + 1);
    let longest = if chance.once_in(4) { length } else { 32 };
    let end = (start + chance.below(longest + 1)).min(length);
    start..end
}

/// A length or a count in the binary forms that occur on wires.
fn binary_extreme(input: &mut Vec<u8>, place: usize, chance: &mut Chance) {
    let numbers = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, u64::MAX - 1, u64::MAX];
    let number = chance.pick(&numbers).copied().unwrap_or_default();
    let width = [1, 2, 4, 8][chance.below(4)];
    let bytes = if chance.once_in(2) { number.to_be_bytes() } else { number.to_le_bytes() };
    let part = if chance.once_in(2) { &bytes[8 - width..] } else { &bytes[..width] };
    let end = (place + width).min(input.len());
    splice(input, place.min(end)..end, part);
}

fn splice(input: &mut Vec<u8>, range: Range<usize>, new: &[u8]) {
    if input.len() - range.len() + new.len() <= INPUT_BYTES_MAX {
        input.splice(range, new.iter().copied());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn texts_are_cut_into_pieces() {
        let text = br#"{"a": [1, "b\"c"]} x"#;
        let found: BTreeSet<String> = pieces(text)
            .into_iter()
            .map(|piece| String::from_utf8_lossy(&text[piece]).into_owned())
            .collect();
        for expected in [r#"{"a": [1, "b\"c"]}"#, r#""a""#, r#"[1, "b\"c"]"#, "1", r#""b\"c""#, "x", ","] {
            assert!(found.contains(expected), "{expected} in {found:?}");
        }
        for unfinished in [&br#"{"a\"#[..], b"]]", b"\"", b"", b"[[["] {
            pieces(unfinished);
        }
    }

    #[test]
    fn inputs_differ_and_stay_within_the_limit() {
        let corpus = [br#"{"count": 1, "names": ["a", "b"]}"#.to_vec(), vec![7; INPUT_BYTES_MAX - 1]];
        let mutator = Mutator { corpus: &corpus, words: &["count"] };
        let make = |seed| mutator.make(&mut Chance::new(seed));
        let inputs: BTreeSet<Vec<u8>> = (0..50).map(make).collect();
        assert!(inputs.len() > 30, "{}", inputs.len());
        assert!(inputs.iter().all(|input| input.len() <= INPUT_BYTES_MAX));
        assert_eq!(make(3), make(3));
    }
}
