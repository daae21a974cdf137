//! Redis: AUTH where there is a password, SELECT where a database is named, PING. All of it is about this connection alone.

use greenlight_model::requirements::ServiceUrl;

use super::{Connection, said};

pub(super) fn log_in(mut on: Connection, url: &ServiceUrl) -> Result<String, String> {
    if let Some(password) = &url.password {
        let mut words = vec!["AUTH"];
        words.extend(url.user.as_deref());
        words.push(password);
        call(&mut on, &words)?;
    }
    if let Some(database) = url.path.as_deref().filter(|path| !path.is_empty()) {
        call(&mut on, &["SELECT", database])?;
    }
    match call(&mut on, &["PING"])?.as_str() {
        "PONG" => Ok("it does".to_owned()),
        other => Err(format!("it answers PING with `{other}`")),
    }
}

/// Sends a command and reads its answer, which is one line.
fn call(on: &mut Connection, words: &[&str]) -> Result<String, String> {
    let mut command = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        command.extend(format!("${}\r\n", word.len()).bytes());
        command.extend(word.bytes());
        command.extend(b"\r\n");
    }
    on.send(&command)?;
    let mut line = Vec::new();
    loop {
        match on.read(1)?[0] {
            b'\n' => break,
            byte => line.push(byte),
        }
    }
    let verb = words.first().copied().unwrap_or_default();
    match line.split_first() {
        Some((b'+', rest)) => Ok(said(rest)),
        Some((b'-', rest)) => Err(format!("it refuses {verb}: {}", said(rest))),
        _ => Err(format!("it does not speak Redis: it answers {verb} with `{}`", said(&line))),
    }
}
