//! HAProxy's runtime API (2.2 and newer), over the stats socket.
//!
//! It has state of one process: HAProxy since 2.5 is always one process with threads, which share it. With `nbproc` of
//! older ones every process has a socket of its own and only one would be changed. A reload starts with the
//! configuration's states unless `load-server-state-from-file` is set; the next reading shows it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use greenlight_model::id::HostName;
use greenlight_model::traffic::{Admission, Server, ServerHealth};

use crate::balancer::{DriverProblem, word};
use crate::canary::{CountRow, Counts};
use crate::transport::Transport;

/// Each server of a backend.
pub(crate) async fn read(
    transport: &dyn Transport,
    backend: &str,
) -> Result<BTreeMap<String, Server>, DriverProblem> {
    check_name("backend", backend)?;
    let answer = transport.exchange(&format!("show servers state {backend}\n")).await?;
    if answer.contains("Permission denied") {
        return Err(DriverProblem::NotAdmin);
    }
    if answer.starts_with("Can't find backend") {
        let known = backends(&transport.exchange("show backend\n").await?);
        return Err(DriverProblem::UnknownBackend { backend: backend.to_owned(), known });
    }
    // A frontend may have the same name, and statistics by name would be its own. Only the number is the backend's.
    let Some(id) = backend_id(&answer)? else { return Ok(BTreeMap::new()) };
    // Both in one exchange, so that states and sessions are of the same moment. 4 selects servers, -1 all of them.
    parse(&transport.exchange(&format!("show servers state {backend};show stat {id} 4 -1\n")).await?)
}

/// The number of the backend whose servers are listed; none when it has no servers.
fn backend_id(states: &str) -> Result<Option<u32>, DriverProblem> {
    let mut lines = states.lines().map(str::trim_end).filter(|line| !line.is_empty()).skip(1);
    let Some(header) = lines.next() else {
        return Err(malformed(format!("`{}` is no table of servers", first_line(states))));
    };
    let columns = Columns::of(header.split(' ').skip(1));
    let first = lines.next().map(|line| line.split(' ').collect::<Vec<_>>());
    first.map(|row| columns.number(&row, "be_id")).transpose()
}

/// Sets a server's state.
pub(crate) async fn set(
    transport: &dyn Transport,
    backend: &str,
    server: &str,
    wanted: Admission,
) -> Result<(), DriverProblem> {
    check_name("backend", backend)?;
    check_name("server", server)?;
    let command = format!("set server {backend}/{server} state {}", word(wanted));
    match transport.exchange(&format!("{command}\n")).await?.trim() {
        "" => Ok(()),
        said if said.contains("Permission denied") => Err(DriverProblem::NotAdmin),
        said => Err(DriverProblem::Refused { command, said: first_line(said) }),
    }
}

/// Sets the weights of servers, in one exchange.
pub(crate) async fn set_weights(
    transport: &dyn Transport,
    backend: &str,
    weights: &BTreeMap<String, u32>,
) -> Result<(), DriverProblem> {
    let weights = weights.iter().map(|(server, weight)| (server, weight.to_string()));
    change_weights(transport, backend, weights).await
}

/// What takes a canary's share back: its servers get nothing, the others their usual weights.
pub(crate) fn to_stable<'a>(
    backend: &str,
    canaries: &BTreeSet<&str>,
    servers: impl Iterator<Item = &'a String>,
) -> Result<String, DriverProblem> {
    let usual = |server: &'a String| {
        let weight = if canaries.contains(server.as_str()) { "0" } else { "100%" };
        (server, weight.to_owned())
    };
    weight_command(backend, servers.map(usual)).map(|command| format!("{command}\n"))
}

/// Gives servers the weights of their configuration again.
pub(crate) async fn reset_weights(
    transport: &dyn Transport,
    backend: &str,
    servers: impl Iterator<Item = &String>,
) -> Result<(), DriverProblem> {
    change_weights(transport, backend, servers.map(|server| (server, "100%".to_owned()))).await
}

async fn change_weights(
    transport: &dyn Transport,
    backend: &str,
    weights: impl Iterator<Item = (&String, String)>,
) -> Result<(), DriverProblem> {
    let command = weight_command(backend, weights)?;
    match transport.exchange(&format!("{command}\n")).await?.trim() {
        "" => Ok(()),
        said if said.contains("Permission denied") => Err(DriverProblem::NotAdmin),
        said => Err(DriverProblem::Refused { command, said: first_line(said) }),
    }
}

fn weight_command<'a>(
    backend: &str,
    weights: impl Iterator<Item = (&'a String, String)>,
) -> Result<String, DriverProblem> {
    check_name("backend", backend)?;
    let mut commands = Vec::new();
    for (server, weight) in weights {
        check_name("server", server)?;
        commands.push(format!("set server {backend}/{server} weight {weight}"));
    }
    Ok(commands.join(";"))
}

/// Requests and errors since HAProxy was started or reloaded; `host` tells which host a server is.
pub(crate) async fn counts(
    transport: &dyn Transport,
    backend: &str,
    host: impl Fn(&str) -> Option<HostName>,
) -> Result<Counts, DriverProblem> {
    check_name("backend", backend)?;
    let states = transport.exchange(&format!("show servers state {backend}\n")).await?;
    let rows = match backend_id(&states)? {
        Some(id) => parse_counts(&transport.exchange(&format!("show stat {id} 4 -1\n")).await?, host)?,
        None => Vec::new(),
    };
    let about = transport.exchange("show info\n").await?;
    let number = |name: &str| {
        let line = about.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.and_then(|text| text.trim().parse::<u64>().ok())
            .ok_or_else(|| malformed(format!("`show info` has no {name}")))
    };
    Ok(Counts {
        instance: number("Pid")?,
        elapsed: Duration::from_secs(number("Uptime_sec")?),
        bounds_us: Vec::new(),
        rows,
    })
}

fn parse_counts(
    table: &str,
    host: impl Fn(&str) -> Option<HostName>,
) -> Result<Vec<CountRow>, DriverProblem> {
    let mut lines = table.lines().filter(|line| !line.is_empty());
    let columns = Columns::of(lines.next().unwrap_or_default().trim_start_matches("# ").split(','));
    let mut rows = Vec::new();
    for line in lines {
        let fields = csv_fields(line);
        let row: Vec<&str> = fields.iter().map(String::as_str).collect();
        let Some(host) = host(columns.text(&row, "svname")?) else { continue };
        let mut answers = 0;
        for class in ["hrsp_1xx", "hrsp_2xx", "hrsp_3xx", "hrsp_4xx", "hrsp_5xx", "hrsp_other"] {
            answers += columns.number::<u64>(&row, class)?;
        }
        // An answer that broke off or was none is not among the answers of its class.
        let broken = columns.number::<u64>(&row, "eresp")?;
        rows.push(CountRow {
            host,
            release: None,
            route: EVERY_ROUTE.to_owned(),
            since: 0,
            requests: answers + broken,
            errors: columns.number::<u64>(&row, "hrsp_5xx")? + broken,
            undelivered: columns.number(&row, "econ")?,
            latency: Vec::new(),
            in_flight: Vec::new(),
        });
    }
    Ok(rows)
}

/// What HAProxy itself allows in names; a blank or a semicolon would begin another command.
fn check_name(kind: &'static str, name: &str) -> Result<(), DriverProblem> {
    let is_good = |c: char| c.is_ascii_alphanumeric() || "._:-".contains(c);
    if name.is_empty() || !name.chars().all(is_good) {
        return Err(DriverProblem::BadName { kind, name: name.to_owned() });
    }
    Ok(())
}

/// Bits of `srv_admin_state`. Not among them: 4, which says only that the configuration has `disabled` and stays when
/// the server was enabled since, and 64, which is about its address.
mod admin {
    /// Maintenance: forced, inherited from a tracked server, or because the name does not resolve.
    pub(super) const MAINTENANCE: u32 = 0x01 | 0x02 | 0x20;
    /// Drain: forced, or inherited.
    pub(super) const DRAIN: u32 = 0x08 | 0x10;
}

/// The route of what is not counted by route; the built-in router has the same word.
const EVERY_ROUTE: &str = "other";

/// Bit of `srv_check_state`: checks are configured and run.
const CHECK_ENABLED: u32 = 0x04;

fn parse(answer: &str) -> Result<BTreeMap<String, Server>, DriverProblem> {
    let Some(split) = answer.find("# pxname,") else {
        return Err(malformed(format!("`{}` is no table of servers", first_line(answer))));
    };
    let (states, statistics) = answer.split_at(split);
    let statistics = parse_statistics(statistics)?;
    let mut lines = states.lines().map(str::trim_end).filter(|line| !line.is_empty());
    match lines.next() {
        Some("1") => {}
        other => return Err(malformed(format!("a table of servers of version {other:?} is not known"))),
    }
    let columns = Columns::of(lines.next().unwrap_or_default().split(' ').skip(1));
    let mut servers = BTreeMap::new();
    for line in lines {
        let row: Vec<&str> = line.split(' ').collect();
        let name = columns.text(&row, "srv_name")?;
        let Some(numbers) = statistics.get(name) else {
            return Err(malformed(format!("server `{name}` has no statistics")));
        };
        let server = server(
            columns.number(&row, "srv_admin_state")?,
            columns.number(&row, "srv_op_state")?,
            columns.number(&row, "srv_check_state")?,
            Weights {
                now: columns.number(&row, "srv_uweight")?,
                normal: columns.number(&row, "srv_iweight")?,
            },
            numbers,
        )?;
        if servers.insert(name.to_owned(), server).is_some() {
            return Err(malformed(format!("server `{name}` is there twice")));
        }
    }
    Ok(servers)
}

fn server(
    admin_state: u32,
    operational_state: u32,
    check_state: u32,
    weights: Weights,
    numbers: &Statistics,
) -> Result<Server, DriverProblem> {
    let admission = if admin_state & admin::MAINTENANCE != 0 {
        Admission::Maintenance
    } else if admin_state & admin::DRAIN != 0 {
        Admission::Drain
    } else {
        Admission::Ready
    };
    // A server whose checks have not passed since HAProxy began to check it (a start, the end of maintenance), or have
    // failed fewer times than it takes to be down, is in operation below full health: that is not known to be up.
    let is_doubtful = check_state & CHECK_ENABLED != 0 && numbers.is_below_full_health;
    let health = match operational_state {
        0 if check_state & CHECK_ENABLED != 0 && numbers.is_rising => ServerHealth::Checking,
        0 => ServerHealth::Down,
        // 1 is in operation and within its slow start: it takes requests, though not yet its whole share.
        1 | 2 if is_doubtful => ServerHealth::Checking,
        1 | 2 => ServerHealth::Up,
        // It asked for no new requests (`http-check disable-on-404`).
        3 => ServerHealth::Down,
        other => return Err(malformed(format!("operational state {other} is not known"))),
    };
    let (weight, normal_weight) = (weights.now, weights.normal);
    Ok(Server { admission, health, sessions: numbers.sessions, weight, normal_weight })
}

/// A server's weight now, and by the configuration.
#[derive(Clone, Copy)]
struct Weights {
    now: u32,
    normal: u32,
}

/// What the statistics add to a server's state.
struct Statistics {
    sessions: u64,
    is_below_full_health: bool,
    is_rising: bool,
}

fn parse_statistics(table: &str) -> Result<BTreeMap<String, Statistics>, DriverProblem> {
    let mut lines = table.lines().filter(|line| !line.is_empty());
    let header = lines.next().unwrap_or_default().trim_start_matches("# ");
    let columns = Columns::of(header.split(','));
    let mut servers = BTreeMap::new();
    for line in lines {
        let fields = csv_fields(line);
        let row: Vec<&str> = fields.iter().map(String::as_str).collect();
        // Absent for a server that is not checked.
        let optional = |name| match columns.text(&row, name)? {
            "" => Ok(None),
            _ => columns.number::<u32>(&row, name).map(Some),
        };
        let health = (optional("check_health")?, optional("check_rise")?, optional("check_fall")?);
        let (is_below_full_health, is_rising) = match health {
            (Some(health), Some(rise), Some(fall)) => {
                // One passed check of an operating server brings it to this; it starts at `rise`.
                let full = rise.saturating_add(fall).saturating_sub(1);
                (health < full, health > 0)
            }
            _ => (false, false),
        };
        // Requests in its hands and those queued for it. An idle connection that is kept for reuse is counted apart
        // (`srv_icur`), and one that is only kept open by the client belongs to no server: neither holds a drain up.
        let sessions = columns.number::<u64>(&row, "scur")?.saturating_add(columns.number(&row, "qcur")?);
        let name = columns.text(&row, "svname")?.to_owned();
        servers.insert(name, Statistics { sessions, is_below_full_health, is_rising });
    }
    Ok(servers)
}

/// Columns by name: their order and number differ between versions.
struct Columns<'a>(BTreeMap<&'a str, usize>);

impl<'a> Columns<'a> {
    fn of(header: impl Iterator<Item = &'a str>) -> Self {
        Self(header.enumerate().map(|(index, name)| (name.trim(), index)).collect())
    }

    fn text<'r>(&self, row: &[&'r str], name: &str) -> Result<&'r str, DriverProblem> {
        let index = self.0.get(name).ok_or_else(|| malformed(format!("there is no column {name}")))?;
        row.get(*index).copied().ok_or_else(|| malformed(format!("a line ends before its column {name}")))
    }

    fn number<T: std::str::FromStr>(&self, row: &[&str], name: &str) -> Result<T, DriverProblem> {
        let text = self.text(row, name)?;
        text.parse().map_err(|_| malformed(format!("`{text}` in column {name} is not a whole number")))
    }
}

/// The fields of a line of CSV; a field with commas or quotes in it stands in quotes, which are doubled inside.
fn csv_fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut is_quoted = false;
    let mut characters = line.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '"' if is_quoted && characters.peek() == Some(&'"') => {
                characters.next();
                if let Some(field) = fields.last_mut() {
                    field.push('"');
                }
            }
            '"' => is_quoted = !is_quoted,
            ',' if !is_quoted => fields.push(String::new()),
            other => {
                if let Some(field) = fields.last_mut() {
                    field.push(other);
                }
            }
        }
    }
    fields
}

/// The names in the answer to `show backend`, sorted.
fn backends(answer: &str) -> Vec<String> {
    let lines = answer.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut names: Vec<String> = lines.map(str::to_owned).collect();
    names.sort();
    names
}

fn malformed(why: String) -> DriverProblem {
    DriverProblem::Malformed { why }
}

fn first_line(text: &str) -> String {
    /// Enough to recognise it.
    const CHARS_MAX: usize = 200;
    text.trim().lines().next().unwrap_or("nothing").chars().take(CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As HAProxy 2.6 prints them, with the states in question put in and the columns that do not matter left out.
    fn read_one(
        admin: u32,
        operational: u32,
        check_state: u32,
        health: &str,
    ) -> Result<Server, DriverProblem> {
        let answer = format!(
            "1\n# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight srv_check_state\n\
             3 web 1 web1 10.0.0.1 {operational} {admin} 7 9 {check_state}\n\n\
             # pxname,svname,qcur,qmax,scur,smax,status,last_chk,check_rise,check_fall,check_health,\n\
             web,web1,1,0,2,0,UP,\"a \"\"b\"\", c\",{health},\n\n"
        );
        parse(&answer).map(|servers| servers["web1"])
    }

    #[test]
    fn states_are_read_by_their_bits() {
        use Admission::{Drain, Maintenance, Ready};
        use ServerHealth::{Checking, Down, Up};
        for (what, admin, operational, check_state, health, expected) in [
            ("up and checked", 0, 2, 6, "2,3,4", (Ready, Up)),
            ("a check under way", 0, 2, 7, "2,3,4", (Ready, Up)),
            ("not checked", 0, 2, 0, ",,", (Ready, Up)),
            ("just started, no check passed yet", 0, 2, 6, "2,3,2", (Ready, Checking)),
            ("going down", 0, 2, 6, "2,3,3", (Ready, Checking)),
            ("down", 0, 0, 6, "2,3,0", (Ready, Down)),
            ("going up", 0, 0, 6, "2,3,1", (Ready, Checking)),
            ("slow start", 0, 1, 6, "2,3,4", (Ready, Up)),
            ("disabled by a 404", 0, 3, 6, "2,3,4", (Ready, Down)),
            ("drained by hand", 8, 2, 6, "2,3,4", (Drain, Up)),
            ("drained with what it tracks", 16, 2, 0, ",,", (Drain, Up)),
            ("maintenance by hand", 1, 0, 14, "2,3,0", (Maintenance, Down)),
            ("maintenance with what it tracks", 2, 0, 0, ",,", (Maintenance, Down)),
            ("disabled in the configuration", 5, 0, 0, ",,", (Maintenance, Down)),
            ("disabled there and enabled since", 4, 2, 0, ",,", (Ready, Up)),
            ("its name does not resolve", 32, 0, 0, ",,", (Maintenance, Down)),
            ("maintenance and drain", 9, 0, 0, ",,", (Maintenance, Down)),
        ] {
            let server = read_one(admin, operational, check_state, health).unwrap();
            assert_eq!((server.admission, server.health), expected, "{what}");
            assert_eq!((server.sessions, server.weight), (3, 7), "{what}");
        }
    }

    #[test]
    fn answers_of_another_kind_are_refused() {
        assert!(read_one(0, 9, 0, ",,").is_err());
        assert!(read_one(0, 2, 0, "x,,").is_err());
        let state =
            "1\n# be_id be_name srv_id srv_name srv_op_state srv_admin_state srv_uweight srv_check_state\n";
        let statistics = "# pxname,svname,qcur,scur,check_rise,check_fall,check_health,\n";
        for (answer, expected) in [
            (String::new(), "`nothing` is no table of servers"),
            ("Unknown command: show\n".to_owned(), "`Unknown command: show` is no table"),
            (format!("2\n{statistics}"), "version Some(\"2\") is not known"),
            (format!("{state}3 web 1 web1 2 0 1 0\n{statistics}"), "`web1` has no statistics"),
            (
                format!("{state}3 web 1 web1 2 0\n{statistics}web,web1,0,0,,,,\n"),
                "ends before its column srv_check_state",
            ),
            (
                format!("{state}3 web 1 web1 2 0 1 -1\n{statistics}web,web1,0,0,,,,\n"),
                "`-1` in column srv_check_state",
            ),
            (format!("{state}# pxname,svname,\nweb,web1,\n"), "there is no column check_health"),
        ] {
            let error = parse(&answer).unwrap_err().to_string();
            assert!(error.contains(expected), "{answer}\nbecame {error}");
        }
        assert!(parse(&format!("{state}{statistics}")).unwrap().is_empty());
    }

    #[test]
    fn a_backend_is_known_by_its_number() {
        let header = "1\n# be_id be_name srv_id srv_name\n";
        assert_eq!(backend_id(&format!("{header}3 web 1 web1\n3 web 2 web2\n\n")).unwrap(), Some(3));
        assert_eq!(backend_id(header).unwrap(), None);
        assert!(backend_id("Unknown command\n").is_err());
        assert!(backend_id(&format!("{header}x web 1 web1\n")).is_err());
    }

    #[test]
    fn names_cannot_become_commands() {
        for bad in ["", "web;shutdown sessions", "web 1", "web\nquit", "a/b"] {
            assert!(check_name("backend", bad).is_err(), "{bad}");
        }
        assert!(check_name("server", "ol-web3.example.org:80").is_ok());
    }
}
