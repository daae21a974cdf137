//! greenlight.toml: any text becomes a fleet or errors with places in it, never a panic.

use greenlight_config::{Problem, line_column, parse};

use super::{Target, demand};

pub(super) const TARGET: Target = Target {
    name: "fleet-file",
    about: "greenlight.toml",
    words: &[
        "[service.web]",
        "[service.web.process.web]",
        "[environment.production]",
        "[secrets]",
        "source",
        "git",
        "branch",
        "build",
        "shared",
        "requires",
        "migrate",
        "run",
        "port",
        "health",
        "http",
        "release",
        "hosts.web",
        "host",
        "balancer",
        "haproxy",
        "router",
        "backend",
        "strategy",
        "kind",
        "\"rolling\"",
        "\"blue-green\"",
        "\"halves\"",
        "batch",
        "floor",
        "after",
        "soak",
        "timeouts",
        "standby",
        "\"web[1-10000]\"",
        "\"[1-3]\"",
        "\"px[01-99]-ops\"",
        "\"100%\"",
        "\"101%\"",
        "\"0s\"",
        "\"9999999d\"",
        "\"16EiB\"",
        "\"{port}\"",
        "[[",
        "]]",
        "\"\"\"",
        "'''",
        "1979-05-27T07:32:00Z",
        "inf",
        "{ }",
        "a.b.c.d = 1",
    ],
    make: None,
    mend: None,
    feed,
    bytes_fixed: 8 << 20,
    // Ten thousand hosts are named by a dozen bytes, and the parser's tree is large beside a text of brackets alone.
    bytes_per_byte: 1_024,
};

fn feed(input: &[u8]) -> Result<bool, String> {
    let text = String::from_utf8_lossy(input);
    match parse(&text) {
        Ok(parsed) => {
            in_text(&text, &parsed.warnings)?;
            let again = parse(&text).map_err(|_| "the same text was refused the second time".to_owned())?;
            demand(again == parsed, || "the same text became another fleet".to_owned())?;
            Ok(true)
        }
        Err(problems) => {
            demand(!problems.is_empty(), || "it was refused without an error".to_owned())?;
            in_text(&text, &problems)?;
            Ok(false)
        }
    }
}

fn in_text(text: &str, problems: &[Problem]) -> Result<(), String> {
    for problem in problems {
        demand(text.get(problem.span.clone()).is_some(), || {
            format!("the place {:?} of `{}` is not in the text", problem.span, problem.message)
        })?;
        let (line, _) = line_column(text, problem.span.start);
        demand(line <= text.matches('\n').count() + 1, || format!("there is no line {line}"))?;
        demand(!problem.message.is_empty(), || "an error without words".to_owned())?;
    }
    Ok(())
}
