//! Makes a failing input smaller: what can be left out is left out, what can be plain is made plain.

use crate::Error;

/// Smaller inputs that are tried: each is a process of its own.
const TRIES_MAX: usize = 2_000;
/// What a byte is replaced with when it does not matter.
const PLAIN: u8 = b'0';

/// The smallest input found that still fails.
pub(super) fn shrink(
    mut input: Vec<u8>,
    mut fails: impl FnMut(&[u8]) -> Result<bool, Error>,
) -> Result<Vec<u8>, Error> {
    let mut tries = 0;
    let mut length = input.len().next_power_of_two();
    while length > 0 && tries < TRIES_MAX {
        let mut at = 0;
        while at < input.len() && tries < TRIES_MAX {
            let end = (at + length).min(input.len());
            let smaller = [&input[..at], &input[end..]].concat();
            tries += 1;
            if fails(&smaller)? {
                input = smaller;
            } else {
                at = end;
            }
        }
        length /= 2;
    }
    for at in 0..input.len() {
        if tries >= TRIES_MAX {
            break;
        }
        if input[at] == PLAIN {
            continue;
        }
        let mut plainer = input.clone();
        plainer[at] = PLAIN;
        tries += 1;
        if fails(&plainer)? {
            input = plainer;
        }
    }
    Ok(input)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_matters_stays() {
        let input = b"some text (with a bracket) and more of it".to_vec();
        let has_bracket = |input: &[u8]| Ok(input.contains(&b'(') && input.len() > 2);
        assert_eq!(shrink(input, has_bracket).unwrap(), b"0(0");
    }
}
