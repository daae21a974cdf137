//! A host's ledger: read as it was written, or refused; never begun anew.

use greenlight_agent::parse_ledger;

use super::{Target, demand};

pub(super) const TARGET: Target = Target {
    name: "ledger",
    about: "a host's ledger",
    words: &[
        "\"version\"",
        "\"generation\"",
        "\"content\"",
        "\"rollout\"",
        "\"active\"",
        "\"previous\"",
        "\"last_good\"",
        "\"confirmed\"",
        "\"claim\"",
        "\"guard\"",
        "\"history\"",
        "\"expires_at\"",
        "\"switched\"",
        "\"proven\"",
        "\"turned_back\"",
        "\"9999-12-31T23:59:59Z\"",
        "\"-009999-01-01T00:00:00Z\"",
        "\"2026-11-21T04:55:00Z\"",
    ],
    make: None,
    mend: None,
    feed,
    bytes_fixed: 1 << 20,
    bytes_per_byte: 256,
};

fn feed(input: &[u8]) -> Result<bool, String> {
    let Ok(ledger) = parse_ledger(input) else { return Ok(false) };
    let written = serde_json::to_vec(&ledger).map_err(|error| format!("it cannot be written: {error}"))?;
    let again = parse_ledger(&written).map_err(|error| format!("as it was written it {error}"))?;
    demand(again == ledger, || format!("{ledger:?} was read again as {again:?}"))?;
    Ok(true)
}
