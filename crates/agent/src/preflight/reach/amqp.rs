//! AMQP 0-9-1 as far as a login goes: the connection is opened on its virtual host and closed again. No channel is opened.

use greenlight_model::requirements::ServiceUrl;

use super::{Connection, said};

/// Methods of the class `connection`, which is 10.
const START: u16 = 10;
const START_OK: u16 = 11;
const TUNE: u16 = 30;
const TUNE_OK: u16 = 31;
const OPEN: u16 = 40;
const OPEN_OK: u16 = 41;
const CLOSE: u16 = 50;
const CONNECTION: u16 = 10;
/// What ends a frame.
const FRAME_END: u8 = 0xce;

pub(super) fn log_in(mut on: Connection, url: &ServiceUrl) -> Result<String, String> {
    let virtual_host = url.path.as_deref().filter(|path| !path.is_empty()).unwrap_or("/");
    on.send(b"AMQP\x00\x00\x09\x01")?;
    expect(&mut on, START)?;
    let (user, password) =
        (url.user.as_deref().unwrap_or("guest"), url.password.as_deref().unwrap_or("guest"));
    let mut start = Vec::new();
    // Without this wish a broker only closes the connection when it does not like the password.
    let mut capabilities = short("authentication_failure_close")?;
    capabilities.extend([b't', 1]);
    let mut properties = short("capabilities")?;
    properties.push(b'F');
    properties.extend(long(&capabilities)?);
    start.extend(long(&properties)?);
    start.extend(short("PLAIN")?);
    start.extend(long(format!("\0{user}\0{password}").as_bytes())?);
    start.extend(short("en_US")?);
    send(&mut on, START_OK, &start)?;
    // The broker's limits, as it proposes them: two bytes of channels, four of frame size, two of heartbeat.
    let tuned = expect(&mut on, TUNE)?;
    send(&mut on, TUNE_OK, tuned.get(..8).ok_or("its limits are cut short")?)?;
    let mut open = short(virtual_host)?;
    open.extend([0, 0]);
    send(&mut on, OPEN, &open)?;
    expect(&mut on, OPEN_OK)?;
    // 200, no text, no method to blame. The answer is not waited for: we are done.
    send(&mut on, CLOSE, &[0, 200, 0, 0, 0, 0, 0])?;
    Ok("it does".to_owned())
}

fn send(on: &mut Connection, method: u16, arguments: &[u8]) -> Result<(), String> {
    let mut payload = Vec::from(CONNECTION.to_be_bytes());
    payload.extend(method.to_be_bytes());
    payload.extend(arguments);
    // A method on channel 0.
    let mut frame = vec![1, 0, 0];
    frame.extend(long(&payload)?);
    frame.push(FRAME_END);
    on.send(&frame)
}

/// The arguments of the next method, which must be this one. Heartbeats may come between.
fn expect(on: &mut Connection, method: u16) -> Result<Vec<u8>, String> {
    loop {
        let first = on.read(1)?[0];
        if first == b'A' {
            return Err("it speaks another version of AMQP than 0-9-1".to_owned());
        }
        let _channel = on.read_u16()?;
        let size = usize::try_from(on.read_u32()?).map_err(|_| "its frame is too long".to_owned())?;
        let payload = on.read(size)?;
        if on.read(1)?[0] != FRAME_END {
            return Err("it does not speak AMQP: a frame has no end".to_owned());
        }
        match (first, payload.as_slice()) {
            (8, _) => {}
            (1, [0, 10, a, b, arguments @ ..]) => {
                let got = u16::from_be_bytes([*a, *b]);
                if got == method {
                    return Ok(arguments.to_vec());
                }
                if got == CLOSE {
                    return Err(refusal(arguments));
                }
                return Err(format!("it answers with connection method {got} where {method} was due"));
            }
            _ => return Err("it does not speak AMQP as it should".to_owned()),
        }
    }
}

/// What a broker says when it closes: `403 ACCESS_REFUSED - …`.
fn refusal(arguments: &[u8]) -> String {
    match arguments {
        [high, low, length, rest @ ..] => {
            let text = rest.get(..usize::from(*length)).unwrap_or(rest);
            format!("it refuses: {} {}", u16::from_be_bytes([*high, *low]), said(text))
        }
        _ => "it refuses, and does not say why".to_owned(),
    }
}

fn short(text: &str) -> Result<Vec<u8>, String> {
    let length = u8::try_from(text.len()).map_err(|_| "a name is longer than 255 bytes".to_owned())?;
    let mut bytes = vec![length];
    bytes.extend(text.bytes());
    Ok(bytes)
}

fn long(content: &[u8]) -> Result<Vec<u8>, String> {
    let length = u32::try_from(content.len()).map_err(|_| "an argument is too long".to_owned())?;
    let mut bytes = Vec::from(length.to_be_bytes());
    bytes.extend(content);
    Ok(bytes)
}
