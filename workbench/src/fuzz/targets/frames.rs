//! The frames between controller and agent, with the messages in them: a frame or a typed error, the same whether it is
//! read with or without waiting, and what was read is written as it was understood.

use greenlight_link::frame::{Frame, FrameError, read_frame, read_frame_async, write_frame};

use super::{Target, demand};

pub(super) const TARGET: Target = Target {
    name: "frames",
    about: "what controller and agent send each other",
    words: &[
        "\"greeting\"",
        "\"request\"",
        "\"event\"",
        "\"reply\"",
        "\"observe\"",
        "\"preflight\"",
        "\"claim\"",
        "\"unclaim\"",
        "\"stage\"",
        "\"smoke\"",
        "\"migrate\"",
        "\"activate\"",
        "\"confirm\"",
        "\"prune\"",
        "\"Ok\"",
        "\"Err\"",
        "\"done\"",
        "\"missing\"",
        "\"spec\"",
        "\"id\"",
        "\"protocol\"",
        "\"manifest\"",
        "\"entries\"",
        "\"secrets\"",
        "\"guard\"",
        "\"../../etc/passwd\"",
    ],
    make: None,
    mend: Some(mend),
    feed,
    bytes_fixed: 1 << 20,
    bytes_per_byte: 256,
};

fn feed(input: &[u8]) -> Result<bool, String> {
    let mut plain = input;
    let mut waiting = input;
    let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(|error| error.to_string())?;
    let mut is_understood = false;
    loop {
        let before = plain.len();
        let read = read_frame(&mut plain);
        let read_waiting = runtime.block_on(read_frame_async(&mut waiting));
        demand(words(&read) == words(&read_waiting), || {
            format!("read as {}, and {} when waiting", words(&read), words(&read_waiting))
        })?;
        let Ok(Some(frame)) = read else { return Ok(is_understood) };
        is_understood = true;
        demand(plain.len() < before, || "a frame of no bytes".to_owned())?;
        let mut written = Vec::new();
        write_frame(&mut written, &frame).map_err(|error| format!("it cannot be written again: {error}"))?;
        let again =
            read_frame(&mut written.as_slice()).map_err(|error| format!("not read again: {error}"))?;
        demand(again.as_ref() == Some(&frame), || format!("{frame:?} was read again as {again:?}"))?;
    }
}

fn words(read: &Result<Option<Frame>, FrameError>) -> String {
    match read {
        Ok(frame) => format!("{frame:?}"),
        Err(error) => error.to_string(),
    }
}

/// Puts the length of what follows into the first frame.
fn mend(input: &mut [u8]) {
    const LENGTH_BYTES: usize = 4;
    if let Some(length) = input.len().checked_sub(LENGTH_BYTES)
        && let Ok(length) = u32::try_from(length)
    {
        input[..LENGTH_BYTES].copy_from_slice(&length.to_be_bytes());
    }
}
