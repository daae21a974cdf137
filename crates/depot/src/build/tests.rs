//! Building from real repositories.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use super::*;
use crate::commits_between;
use crate::testing::{Node, Project, build_at, git, look, service};

fn paths(project: &Project, release: &Release) -> String {
    let manifest = project.depot().manifest(release.id).unwrap();
    manifest.entries.into_keys().collect::<Vec<_>>().join(" ")
}

/// Builds and returns what happened.
fn events(
    project: &Project,
    service: &Service,
    label: Option<&str>,
    cancel: &AtomicBool,
    on_event: &mut dyn FnMut(&BuildEvent),
) -> (Result<Release, BuildError>, Vec<BuildEvent>) {
    let mut events = Vec::new();
    let request = BuildRequest {
        service,
        project: &project.path(),
        revision: None,
        label,
        built_by: "ada@desk",
        now: Timestamp::UNIX_EPOCH,
        cancel,
    };
    let result = build(&project.depot(), &request, &mut |event| {
        on_event(&event);
        events.push(event);
    });
    (result, events)
}

fn printed(events: &[BuildEvent]) -> Vec<&str> {
    let lines = events.iter().filter_map(|event| match event {
        BuildEvent::Line { text } => Some(text.as_str()),
        _ => None,
    });
    lines.collect()
}

#[test]
fn the_same_commit_steps_and_tree_give_the_same_release() {
    let project = Project::new(&[("app.py", Node::File(b"1")), ("run", Node::Executable(b"#!/bin/sh\n"))]);
    let service = service(&["mkdir -p static/empty", "echo css > static/x.css"]);
    let first = build_at(&project, &service, None, 0).unwrap();
    assert_eq!(paths(&project, &first), "app.py run static/empty static/x.css");
    assert_eq!((first.files, first.bytes), (3, 15));
    assert_eq!((first.branch.as_deref(), first.subject.as_str()), (Some("main"), "first"));
    assert_eq!(first.commit, project.git(&["rev-parse", "HEAD"]));
    assert!(first.commit.starts_with(&first.label), "{}", first.label);

    // Another time, another checkout: the same release, as it was.
    assert_eq!(build_at(&project, &service, None, 60).unwrap(), first);
    assert_eq!(project.depot().releases().unwrap(), std::slice::from_ref(&first));
    let other = Service {
        build: vec!["mkdir -p static/empty; echo css > static/x.css".to_owned()],
        ..service.clone()
    };
    assert_ne!(build_at(&project, &other, None, 0).unwrap().id, first.id);
    project.commit("second", &[]);
    let second = build_at(&project, &service, None, 0).unwrap();
    assert_ne!(second.id, first.id);
    let depot = project.depot();
    assert_eq!(depot.manifest(second.id).unwrap(), depot.manifest(first.id).unwrap());
    assert_eq!(crate::disk::names(&depot.path().join("tmp")).unwrap(), [] as [&str; 0]);
}

#[test]
fn what_was_built_before_is_known_without_building() {
    let project = Project::new(&[("a", Node::File(b"1")), ("b", Node::File(b"1"))]);
    let service = service(&["true"]);
    let before = |service: &Service, revision| {
        built_before(&project.depot(), service, &project.path(), revision).unwrap().map(|release| release.id)
    };
    assert_eq!(before(&service, None), None);
    let first = build_at(&project, &service, None, 0).unwrap();
    assert_eq!(before(&service, None), Some(first.id));
    let others = [
        Service { name: "api".parse().unwrap(), ..service.clone() },
        Service { build: Vec::new(), ..service.clone() },
        Service { exclude: vec!["b".to_owned()], ..service.clone() },
        Service { exclude: vec!["none".to_owned()], ..service.clone() },
    ];
    assert!(others.iter().all(|other| before(other, None).is_none()));
    // Another choice of files that comes to the same tree is the same release; the last way to it is remembered.
    assert_eq!(build_at(&project, &others[3], None, 0).unwrap(), first);
    assert_eq!(before(&others[3], None), Some(first.id));
    project.commit("second", &[]);
    assert_eq!(before(&others[3], None), None);
    assert_eq!(before(&others[3], Some("HEAD~1")), Some(first.id));
    assert!(built_before(&project.depot(), &service, &project.path(), Some("nowhere")).is_err());
}

#[test]
fn a_label_is_given_or_described() {
    let project = Project::new(&[("a", Node::File(b"1"))]);
    project.git(&["tag", "v1"]);
    project.commit("second", &[("a", Node::File(b"2"))]);
    let service = service(&[]);
    let described = build_at(&project, &service, None, 0).unwrap();
    assert!(described.label.starts_with("v1-1-g"), "{}", described.label);
    let never = AtomicBool::new(false);
    let (labelled, _) = events(&project, &service, Some("v2"), &never, &mut |_| {});
    assert_eq!(labelled.unwrap(), Release { label: "v2".to_owned(), ..described });
    assert_eq!(build_at(&project, &service, None, 9).unwrap().label, "v2");
    for bad in ["", "latest", "a b", "a\n", &"x".repeat(129)] {
        let (refused, _) = events(&project, &service, Some(bad), &never, &mut |_| {});
        assert!(matches!(refused, Err(BuildError::Label { .. })), "{bad:?}");
    }
}

#[test]
fn the_users_repository_is_not_touched() {
    let project = Project::new(&[("a", Node::File(b"1")), ("gone", Node::File(b"1"))]);
    crate::testing::write_tree(&project.path(), &[("a", Node::File(b"edited")), ("new", Node::File(b"x"))]);
    fs::remove_file(project.path().join("gone")).unwrap();
    let before = look(&project.path());
    let never = AtomicBool::new(false);
    let service = service(&["echo built > a", "git commit -q --allow-empty -m x || true", "git tag stray"]);
    let (release, events) = events(&project, &service, None, &never, &mut |_| {});
    assert_eq!(paths(&project, &release.unwrap()), "a gone");
    assert!(events.contains(&BuildEvent::Uncommitted { files: 2 }), "{events:?}");
    assert_eq!(look(&project.path()), before);
}

#[test]
fn revisions_are_found_or_refused() {
    let project = Project::new(&[("a", Node::File(b"1"))]);
    let first = project.git(&["rev-parse", "HEAD"]);
    project.git(&["tag", "-a", "v1", "-m", "one"]);
    project.git(&["branch", "old"]);
    let second = project.commit("second", &[("a", Node::File(b"2"))]);
    // A tag of the same name as a branch must not hide the branch that the fleet file names.
    project.git(&["tag", "side"]);
    project.git(&["checkout", "--quiet", "-b", "side"]);
    let third = project.commit("third", &[("a", Node::File(b"3"))]);
    project.git(&["checkout", "--quiet", "main"]);
    let mut service = service(&[]);
    for (revision, commit, branch) in [
        (None, &second, Some("main")),
        (Some("v1"), &first, None),
        (Some("old"), &first, Some("old")),
        (Some(&first[..8]), &first, None),
        (Some(first.as_str()), &first, None),
        (Some("HEAD~1"), &first, None),
        (Some("refs/heads/side"), &third, Some("side")),
    ] {
        let repository =
            Repository::open(&project.depot(), &service.source, &project.path(), revision).unwrap();
        let found = repository.resolve(&service.source, revision).unwrap();
        assert_eq!((&found.commit, found.branch.as_deref()), (commit, branch), "{revision:?}");
    }
    service.source.branch = Some("side".to_owned());
    assert_eq!(build_at(&project, &service, None, 0).unwrap().commit, third);
    for (revision, says) in [
        ("nowhere", "`nowhere` is not a commit, branch or tag of "),
        ("--upload-pack=touch /tmp/x", "cannot be a revision"),
        ("", "cannot be a revision"),
        ("HEAD:a", "is not a commit"),
        (&"0".repeat(40), "is not a commit"),
    ] {
        let error = build_at(&project, &service, Some(revision), 0).unwrap_err().to_string();
        assert!(error.contains(says), "{revision}: {error}");
    }
    service.source.git = "../nowhere".to_owned();
    let error = build_at(&project, &service, None, 0).unwrap_err().to_string();
    assert!(error.contains("nowhere is not in a git repository"), "{error}");
    service.source.git = "--upload-pack=x:y".to_owned();
    assert!(build_at(&project, &service, None, 0).is_err());
}

/// Whatever kind of repository stands beside the fleet file, the same commit gives the same release.
#[test]
fn every_kind_of_repository_is_a_source() {
    let project = Project::new(&[
        ("app/a", Node::File(b"1")),
        (".gitattributes", Node::File(b"app/a export-ignore\n")),
    ]);
    project.git(&["tag", "v1"]);
    project.commit("second", &[("app/b", Node::File(b"2")), ("deploy/greenlight.toml", Node::File(b""))]);
    let plain = project.path();
    let beside = |name: &str| project.directory.path().join(name);
    let url = format!("file://{}", plain.display());
    git(&plain, &["clone", "--quiet", "--bare", ".", "../bare"]);
    git(&plain, &["worktree", "add", "--quiet", "--detach", "../worktree"]);
    git(&plain, &["clone", "--quiet", "--depth=1", &url, "../shallow"]);
    git(&beside("shallow"), &["checkout", "--quiet", "--detach"]);
    git(&beside("shallow"), &["branch", "--quiet", "-D", "main"]);

    let steps = ["git describe --tags > version || echo none > version"];
    let mut service = service(&steps);
    service.source.directory = Some("app".to_owned());
    let expected = build_at(&project, &service, None, 0).unwrap();
    assert_eq!(paths(&project, &expected), "a b version");
    for source in ["deploy", "../bare", "../worktree", &url] {
        service.source.git = source.to_owned();
        let release = build_at(&project, &service, None, 0).unwrap();
        assert_eq!(release.id, expected.id, "{source}");
    }
    // A shallow clone lacks the tag, which the build step sees; the commit is there, also as its origin's branch.
    service.source.git = "../shallow".to_owned();
    service.source.branch = Some("main".to_owned());
    let shallow = build_at(&project, &service, None, 0).unwrap();
    assert_eq!((&shallow.commit, shallow.branch.as_deref()), (&expected.commit, Some("main")));

    service.source.directory = Some("deploy/..".to_owned());
    assert!(build_at(&project, &service, None, 0).is_ok());
    for outside in ["..", "nowhere", "/etc", "app/a"] {
        service.source.directory = Some(outside.to_owned());
        let error = build_at(&project, &service, None, 0).unwrap_err().to_string();
        assert!(error.contains(&format!("has no directory `{outside}`")), "{error}");
    }
}

#[test]
fn a_remote_repository_is_fetched_when_it_must_be() {
    let project = Project::new(&[("a", Node::File(b"1"))]);
    let mut service = service(&[]);
    service.source.git = format!("file://{}", project.path().display());
    let first = build_at(&project, &service, None, 0).unwrap();
    assert_eq!(first.branch, None);
    let second = project.commit("second", &[("a", Node::File(b"2"))]);
    assert_eq!(build_at(&project, &service, Some("main"), 0).unwrap().commit, second);
    let repository = project.depot().repository(&service.source, &project.path()).unwrap();
    assert_eq!(commits_between(&repository, &first.commit, &second).unwrap().len(), 1);

    // A commit that is here already needs no server.
    fs::rename(project.path(), project.directory.path().join("moved")).unwrap();
    assert_eq!(build_at(&project, &service, Some(&first.commit), 0).unwrap().id, first.id);
    let error = build_at(&project, &service, Some("main"), 0).unwrap_err().to_string();
    assert!(error.contains("git fetch failed"), "{error}");
}

#[test]
fn steps_run_clean_and_what_they_print_is_kept() {
    let project = Project::new(&[("app/a", Node::File(b"1"))]);
    let mut service = service(&["pwd; cat; env", "printf 'half'; printf 'err\\n' >&2"]);
    service.source.directory = Some("app".to_owned());
    let never = AtomicBool::new(false);
    let (release, events) = events(&project, &service, None, &never, &mut |_| {});
    let release = release.unwrap();
    let lines = printed(&events);
    assert!(lines[0].ends_with("/app"), "{lines:?}");
    assert!(!lines[0].starts_with(project.directory.path().to_str().unwrap()), "{lines:?}");
    assert!(!Path::new(lines[0]).exists(), "the checkout is gone");
    let names: Vec<&str> = lines.iter().filter_map(|line| Some(line.split_once('=')?.0)).collect();
    for name in ["PATH", "HOME", "LANG", "GREENLIGHT_COMMIT", "GREENLIGHT_SERVICE", "SOURCE_DATE_EPOCH"] {
        assert!(names.contains(&name), "{names:?}");
    }
    // What cargo sets for this very test stands for everything that a developer's shell has.
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some() && !names.contains(&"CARGO_MANIFEST_DIR"));
    assert!(lines.contains(&"half") && lines.contains(&"err"), "{lines:?}");
    let log = fs::read_to_string(project.depot().log(release.id)).unwrap();
    assert!(log.starts_with("$ pwd; cat; env\n") && log.contains("half\n"), "{log}");
}

#[test]
fn a_failing_step_says_what_it_said() {
    let project = Project::new(&[("a", Node::File(b"1"))]);
    let service = service(&["true", "seq 30; false; echo not reached", "echo neither"]);
    let error = build_at(&project, &service, None, 0).unwrap_err();
    let BuildError::StepFailed { number, of, how, last, log, .. } = &error else { panic!("{error}") };
    assert_eq!((*number, *of, how.as_str()), (2, 3, "exit code 1"));
    assert_eq!(last.first().map(String::as_str), Some("11"));
    assert_eq!(last.last().map(String::as_str), Some("30"));
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("$ true\n") && log.ends_with("\n29\n30\n"), "{log}");
    assert_eq!(project.depot().releases().unwrap(), []);
    let killed = Service { build: vec!["kill -9 $$".to_owned()], ..service };
    let error = build_at(&project, &killed, None, 0).unwrap_err().to_string();
    assert!(error.contains("killed by signal 9"), "{error}");
}

/// Reads a pipe whose writers are to be gone: what hangs here is a process that survived.
fn assert_no_writer(pipe: &Path, open: &mut File) {
    rustix::fs::fcntl_setfl(&*open, rustix::fs::OFlags::RDONLY).unwrap();
    let mut written = String::new();
    open.read_to_string(&mut written).unwrap();
    assert_eq!(written, "held\n", "{}", pipe.display());
}

fn pipe(project: &Project) -> (PathBuf, File) {
    let pipe = project.directory.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let open = OpenOptions::new().read(true).custom_flags(nonblocking).open(&pipe).unwrap();
    (pipe, open)
}

#[test]
fn nothing_that_a_step_started_survives_it() {
    let project = Project::new(&[("a", Node::File(b"1"))]);
    let (pipe, mut open) = pipe(&project);
    // The process in the background inherits the pipe, and both outputs.
    let step = format!("exec 3> '{}'; echo held >&3; sleep 1000 &", pipe.display());
    build_at(&project, &service(&[&step]), None, 0).unwrap();
    assert_no_writer(&pipe, &mut open);
}

#[test]
fn a_cancelled_build_stops_and_leaves_nothing_running() {
    let project = Project::new(&[("a", Node::File(b"1"))]);
    let (pipe, mut open) = pipe(&project);
    let step = format!("exec 3> '{}'; echo held >&3; echo under way; sleep 1000", pipe.display());
    let cancel = AtomicBool::new(false);
    let (result, _) = events(&project, &service(&[&step]), None, &cancel, &mut |event| {
        if *event == (BuildEvent::Line { text: "under way".to_owned() }) {
            cancel.store(true, Ordering::Relaxed);
        }
    });
    assert!(matches!(result, Err(BuildError::Cancelled)), "{result:?}");
    assert_no_writer(&pipe, &mut open);
    let depot = project.depot();
    assert_eq!(depot.releases().unwrap(), []);
    assert_eq!(crate::disk::names(&depot.path().join("tmp")).unwrap(), [] as [&str; 0]);
    // Cancelled while packing, when no step is there to be stopped.
    let cancel = AtomicBool::new(false);
    let (result, _) = events(&project, &service(&[]), None, &cancel, &mut |event| {
        if *event == BuildEvent::Packing {
            cancel.store(true, Ordering::Relaxed);
        }
    });
    assert!(matches!(result, Err(BuildError::Cancelled)), "{result:?}");
}

#[test]
fn an_empty_tree_is_no_release() {
    let project = Project::new(&[("a", Node::File(b"1"))]);
    let error = build_at(&project, &service(&["rm a"]), None, 0).unwrap_err();
    assert!(matches!(error, BuildError::Empty { .. }), "{error}");
    let error = build_at(&project, &service(&["ln -s /etc/passwd b"]), None, 0).unwrap_err().to_string();
    assert!(error.contains("b: it is a link to an absolute path"), "{error}");
}

#[test]
fn the_change_log_lists_what_is_new() {
    let project = Project::new(&[("a", Node::File(b"1"))]);
    let from = project.git(&["rev-parse", "HEAD"]);
    project.commit("second: with \u{e9} and \"quotes\"", &[]);
    let to = project.commit("third", &[]);
    let commits = commits_between(&project.path(), &from, &to).unwrap();
    let found: Vec<(&str, &str)> =
        commits.iter().map(|commit| (commit.author.as_str(), commit.subject.as_str())).collect();
    assert_eq!(found, [("Ada", "third"), ("Ada", "second: with \u{e9} and \"quotes\"")]);
    assert_eq!(commits[0].hash, to);
    assert_eq!(commits_between(&project.path(), &to, &from).unwrap(), []);
    assert!(matches!(commits_between(&project.path(), "--output=x", &to), Err(GitError::Invalid { .. })));
    assert!(matches!(commits_between(&project.path(), &"0".repeat(40), &to), Err(GitError::Failed { .. })));
}
