//! An agent for the tests of the link: it speaks the protocol over its standard streams and does on demand what real
//! agents do at their worst. What it is to do stands in the first word of a command.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it belongs to the tests"
)]

use std::collections::HashMap;
use std::io::{BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use greenlight_link::frame::{Encoding, Frame, read_frame, write_frame};
use greenlight_link::message::{AgentError, Event, Message, PROTOCOL_VERSION, Reply, Request, Stream};
use greenlight_model::action::Blame;
use greenlight_model::host::HostFacts;

type Out = Arc<Mutex<std::io::Stdout>>;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() != Some("agent") {
        eprintln!("the test agent wants to be called with `agent`");
        return ExitCode::from(64);
    }
    match std::env::var("TEST_AGENT").as_deref() {
        Ok("mute") => {
            let mut rest = Vec::new();
            std::io::stdin().read_to_end(&mut rest).unwrap();
            return ExitCode::SUCCESS;
        }
        Ok("loader") => {
            eprintln!("agent: /lib/libc.so.6: version `GLIBC_2.99' not found (required by agent)");
            return ExitCode::from(1);
        }
        Ok("chatty") => println!("Hello! This is not a frame."),
        _ => {}
    }
    let protocol = match std::env::var("TEST_AGENT").as_deref() {
        Ok("newer") => PROTOCOL_VERSION + 1,
        _ => PROTOCOL_VERSION,
    };
    let facts = HostFacts {
        hostname: "test".to_owned(),
        os: "Test".to_owned(),
        architecture: std::env::consts::ARCH.to_owned(),
        machine_id: None,
        // The variables' names: what a local agent inherits is tested with it.
        user: std::env::vars().map(|(name, _)| name).collect::<Vec<_>>().join(" "),
        is_root: false,
        managers: Vec::new(),
        agent_version: std::env::current_exe().unwrap().display().to_string(),
    };
    let out: Out = Arc::new(Mutex::new(std::io::stdout()));
    send(&out, &Message::Greeting { protocol, facts });
    serve(&out);
    ExitCode::SUCCESS
}

fn serve(out: &Out) {
    let mut input = BufReader::new(std::io::stdin());
    let mut held: HashMap<String, u64> = HashMap::new();
    let mut stages: HashMap<u64, Stage> = HashMap::new();
    while let Some(frame) = read_frame(&mut input).unwrap() {
        match frame {
            Frame::Message(Message::Request { id, request }) => match *request {
                Request::Exec { argv, .. } => {
                    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
                    execute(out, &mut held, id, &argv);
                }
                Request::Stage { release, .. } => {
                    // A socket on which the test allows each object.
                    let pace =
                        (!release.label.is_empty()).then(|| UnixStream::connect(&release.label).unwrap());
                    stages.insert(id, Stage { pace, commit: release.commit, ..Stage::default() });
                }
                Request::Socket { input, .. } => reply(out, id, Ok(Reply::Output(input))),
                other => panic!("the test agent does not know {other:?}"),
            },
            Frame::Data { id, hash, encoding, has_more, data } => {
                let Some(stage) = stages.get_mut(&id) else { continue };
                stage.parcel.extend(data);
                if has_more {
                    continue;
                }
                let parcel = std::mem::take(&mut stage.parcel);
                assert_eq!(blake3::hash(&parcel).as_bytes(), hash.as_bytes());
                if encoding == Encoding::Manifest {
                    let count: u32 = String::from_utf8(parcel).unwrap().parse().unwrap();
                    let objects = match (stage.commit.as_str(), count) {
                        ("foreign", _) => vec![(count, 1)],
                        (_, 0) => Vec::new(),
                        _ => vec![(0, 1), (1, count - 1)],
                    };
                    event(out, id, Event::Missing { objects, bases: std::collections::BTreeMap::new() });
                    continue;
                }
                stage.objects += 1;
                stage.bytes += parcel.len();
                if let Some(pace) = &mut stage.pace {
                    pace.write_all(b".").unwrap();
                    pace.read_exact(&mut [0]).unwrap();
                }
                if stage.commit.parse() == Ok(stage.objects) {
                    stages.remove(&id);
                    reply(out, id, Err(error("the disk is full")));
                }
            }
            Frame::EndOfData { id } => {
                let Some(stage) = stages.remove(&id) else { continue };
                reply(
                    out,
                    id,
                    Ok(Reply::Output(format!("{} objects, {} bytes", stage.objects, stage.bytes))),
                );
            }
            Frame::Message(other) => panic!("a controller does not send {other:?}"),
        }
    }
}

#[derive(Default)]
struct Stage {
    pace: Option<UnixStream>,
    /// What is to happen.
    commit: String,
    /// What has arrived of the one under way.
    parcel: Vec<u8>,
    objects: usize,
    bytes: usize,
}

fn execute(out: &Out, held: &mut HashMap<String, u64>, id: u64, argv: &[&str]) {
    match argv {
        ["echo", words @ ..] => {
            for word in words {
                event(out, id, line(word));
            }
            reply(out, id, Ok(Reply::Exited { code: Some(0) }));
        }
        // Waits for the `release` of its name.
        ["hold", name] => {
            held.insert((*name).to_owned(), id);
            event(out, id, line("held"));
        }
        ["release", name] => {
            if let Some(waiting) = held.remove(*name) {
                reply(out, waiting, Ok(Reply::Exited { code: Some(7) }));
            }
            reply(out, id, Ok(Reply::Done));
        }
        ["large", bytes] => {
            reply(out, id, Ok(Reply::Output("x".repeat(bytes.parse().unwrap()))));
        }
        ["lines", count] => {
            for number in 0..count.parse().unwrap() {
                event(out, id, line(&format!("{number}")));
            }
            reply(out, id, Ok(Reply::Exited { code: Some(0) }));
        }
        ["refuse"] => reply(out, id, Err(error("it is not to be"))),
        ["die", last_words] => {
            event(out, id, line("dying"));
            eprintln!("{last_words}");
            std::process::exit(3);
        }
        ["die-inside-a-frame"] => {
            out.lock().unwrap().write_all(&[0, 0, 1, 0, 1, b'{']).unwrap();
            out.lock().unwrap().flush().unwrap();
            std::process::exit(4);
        }
        ["babble"] => {
            out.lock().unwrap().write_all(b"this is no frame at all").unwrap();
            out.lock().unwrap().flush().unwrap();
        }
        other => panic!("the test agent does not know {other:?}"),
    }
}

fn line(text: &str) -> Event {
    Event::Line { process: None, stream: Stream::Stdout, text: text.to_owned() }
}

fn error(message: &str) -> AgentError {
    AgentError { message: message.to_owned(), blame: Blame::Host, output: Vec::new() }
}

fn event(out: &Out, id: u64, event: Event) {
    send(out, &Message::Event { id, event });
}

fn reply(out: &Out, id: u64, result: Result<Reply, AgentError>) {
    send(out, &Message::Reply { id, result });
}

fn send(out: &Out, message: &Message) {
    let mut out = out.lock().unwrap();
    // A controller that is gone is the end of the test.
    if write_frame(&mut *out, &Frame::Message(message.clone()))
        .and(out.flush().map_err(greenlight_link::frame::FrameError::Write))
        .is_err()
    {
        std::process::exit(0);
    }
}
