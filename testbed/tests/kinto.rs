//! The main job on real parts: kinto, an application that is not ours, goes from 17.0.0 to 26.5.0 and back on three hosts
//! over ssh, behind HAProxy, with PostgreSQL and its migrations, while clients read and write.
//!
//! Proven, once rolling and then blue-green, on hosts under systemd and under supervisord: no request fails, every write
//! that was acknowledged is there afterwards, HAProxy never serves from fewer hosts than the floor, and the database's
//! password is nowhere but where it belongs. The second time, both releases are on the hosts already. The first run downloads kinto's wheels with pip, as the machine is configured;
//! later ones find them in the bed's cache directory.
//!
//! Each connection that writes has a collection of its own: kinto itself refuses two writes to one collection in the
//! same millisecond, with or without a rollout.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(clippy::print_stdout, reason = "the numbers are what the test is for")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use greenlight_testbed::http::Request;
use greenlight_testbed::{
    Bed, HaProxy, Init, Load, LoadHandle, LoadReport, Postgres, Project, VersionSource, cache_directory,
    greenlight_binary, output_of, run,
};
use serde_json::Value;

const HOSTS: [(&str, Init); 3] =
    [("web1", Init::Systemd), ("web2", Init::Supervisord), ("web3", Init::Systemd)];
const PORT: u16 = 8000;
const JSON: &str = "application/json";

/// Connections that write, each into a collection of its own.
const WRITERS: usize = 3;
/// What kinto on two cores answers with ease while three hosts install packages.
const WRITES_PER_SECOND: u32 = 4;
const READS_PER_SECOND: u32 = 15;
const VERSIONS_PER_SECOND: u32 = 5;
/// A client's patience. Beyond it a request has failed.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Requests of each connection after a rollout has ended, which must not fail either.
const REQUESTS_AFTER: u64 = 20;
const REQUESTS_DEADLINE: Duration = Duration::from_secs(60);
/// Between two looks at HAProxy and at the arguments of all processes.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);

struct Version {
    name: &'static str,
    requirements: &'static str,
    /// The version of its tables, as kinto counts them.
    schema: &'static str,
}

const OLD: Version =
    Version { name: "17.0.0", requirements: include_str!("kinto/requirements-17.0.0.txt"), schema: "22" };
const NEW: Version =
    Version { name: "26.5.0", requirements: include_str!("kinto/requirements-26.5.0.txt"), schema: "26" };

#[test]
fn kinto_goes_there_and_back_rolling_and_blue_green() {
    let mut site = Site::up();
    site.set_strategy(r#"{ kind = "rolling", batch = 1, floor = 2 }"#);
    let old = site.build(&OLD);
    let new = site.build(&NEW);
    site.roll(&["deploy", "production", OLD.name], &old);
    site.expect_schema(&OLD);
    site.create_collections();

    let load = UnderLoad::start(&site);
    site.there_and_back(&load, &old, &new, 2);
    site.set_strategy(r#"{ kind = "blue-green", floor = 1 }"#);
    site.there_and_back(&load, &old, &new, 1);
    let load = load.stop();
    let (acknowledged, found) = site.count_writes(&load.writes);

    println!("\nkinto {} -> {} -> {}, rolling and then blue-green", OLD.name, NEW.name, OLD.name);
    site.print_phases();
    load.print();
    println!("  writes acknowledged {acknowledged}, found {found}");

    for (what, report) in load.rows() {
        assert_eq!(report.failed, 0, "{what}: {:#?}", report.reasons);
    }
    assert_eq!(acknowledged, found, "writes are missing after the way back");
    assert!(acknowledged > 100, "{acknowledged} writes prove little");
    let answered: BTreeSet<&str> = load.versions.versions.keys().map(String::as_str).collect();
    assert_eq!(answered, BTreeSet::from([old.commit.as_str(), new.commit.as_str()]));
    site.expect_password_only_where_it_belongs();
    site.bed.down().unwrap();
}

/// A release that was built.
struct Built {
    id: String,
    commit: String,
}

/// The bed, the project, and what was seen of them.
struct Site {
    bed: Bed,
    /// Its fleet file, without a strategy.
    fleet: String,
    project: Project,
    postgres: Postgres,
    haproxy: HaProxy,
    /// Everything that greenlight printed.
    transcript: String,
    phases: Vec<(String, f64)>,
}

impl Site {
    fn up() -> Self {
        let bed = HOSTS
            .into_iter()
            .fold(Bed::builder("kinto"), |bed, (name, init)| bed.host(name, init))
            .host("lb", Init::None)
            .host("db", Init::None)
            .up()
            .unwrap();
        let postgres = bed.postgres("db").unwrap();
        let servers: String = HOSTS
            .iter()
            .map(|(name, _)| format!("    server {name} {}:{PORT}\n", bed.host(name).address()))
            .collect();
        let haproxy = bed.haproxy("lb", &[include_str!("kinto/haproxy.cfg"), &servers].concat()).unwrap();

        // Where an operator would keep it: outside the project, for nobody else to read.
        let secret = bed.home().join("database-url");
        write_private(&secret, &format!("{}\n", postgres.url()));
        write_private(&password_file(&bed), postgres.password());

        let version = "import sys; print('%d.%d' % sys.version_info[:2])";
        let python = bed.host(HOSTS[0].0).run("python3", &["-c", version]).unwrap();
        // The operator's own settings for pip, which the build steps go by.
        let wheels =
            [&OLD, &NEW].map(|version| format!("    {}\n", wheels(version, python.trim()).display()));
        fs::create_dir_all(bed.home().join(".config/pip")).unwrap();
        let settings = format!("[global]\nno-index = true\nfind-links =\n{}", wheels.concat());
        fs::write(bed.home().join(".config/pip/pip.conf"), settings).unwrap();

        let project = Project::new().unwrap();
        let fleet = include_str!("kinto/greenlight.toml")
            .replace("@PYTHON@", python.trim())
            .replace("@SECRET@", secret.to_str().unwrap());
        project.write("kinto.ini", include_str!("kinto/kinto.ini")).unwrap();
        project.write(".gitignore", ".greenlight/\n").unwrap();
        Self { bed, fleet, project, postgres, haproxy, transcript: String::new(), phases: Vec::new() }
    }

    fn set_strategy(&self, strategy: &str) {
        self.project.write("greenlight.toml", &self.fleet.replace("@STRATEGY@", strategy)).unwrap();
    }

    /// Goes to the new release and back, under load, with never fewer hosts serving than the floor.
    fn there_and_back(&mut self, load: &UnderLoad, old: &Built, new: &Built, floor: usize) {
        let serving = self.roll(&["deploy", "production", NEW.name], new);
        assert!(serving >= floor, "HAProxy served from {serving} hosts; the floor is {floor}");
        self.expect_schema(&NEW);
        load.wait();
        let (acknowledged, found) = self.count_writes(&load.write_reports());
        assert_eq!(acknowledged, found, "writes are missing after the way forward");
        let serving = self.roll(&["rollback", "production"], old);
        assert!(serving >= floor, "HAProxy served from {serving} hosts; the floor is {floor}");
        load.wait();
    }

    /// Commits a version and builds it, in the machine's own network.
    fn build(&mut self, version: &Version) -> Built {
        self.project.write("requirements.txt", version.requirements).unwrap();
        self.project.commit(&format!("Run kinto {}", version.name)).unwrap();
        let mut command = self.bed.machine_command(greenlight_binary().unwrap());
        command.args(["build", "kinto", "--label", version.name, "--json", "--verbose"]);
        command.current_dir(self.project.path());
        let began = Instant::now();
        let output = output_of(&mut command).unwrap();
        let built = self.ended(&format!("build {}", version.name), began, &output);
        let text = |name: &str| built["release"][name].as_str().unwrap().to_owned();
        Built { id: text("id"), commit: text("commit") }
    }

    /// Runs a rollout, which must end well with this release on every host, and returns the least number of hosts
    /// that HAProxy served from meanwhile.
    fn roll(&mut self, arguments: &[&str], release: &Built) -> usize {
        let arguments = [arguments, &["--json", "--verbose"]].concat();
        let mut command = self.project.greenlight(&self.bed, &arguments).unwrap();
        let title = arguments[..arguments.len() - 2].join(" ");
        let seen = Mutex::new(Seen::default());
        let began = Instant::now();
        let output = under_watch(&seen, &self.haproxy, self.postgres.password(), || output_of(&mut command));
        let ended = self.ended(&title, began, &output.unwrap());
        for (host, init) in HOSTS {
            assert_eq!(ended["running"][format!("{host}/kinto")], release.id.as_str(), "{ended:#}");
            let address = SocketAddr::from((self.bed.host(host).address(), PORT));
            let answer = self.bed.get(address, "/v1/__version__").unwrap().text();
            assert!(answer.contains(&release.commit), "{host} answers {answer}");
            self.expect_manager(host, init);
        }
        self.note_phases(ended["rollout"].as_str().unwrap());
        let seen = seen.into_inner().unwrap();
        assert!(seen.saw_application, "the watch on arguments sees no process of the hosts");
        assert_eq!(seen.leaks, BTreeSet::new(), "the password was an argument of a program");
        seen.fewest_serving.unwrap()
    }

    /// Takes in what a greenlight command printed, and its JSON. It must have ended with 0.
    fn ended(&mut self, title: &str, began: Instant, output: &Output) -> Value {
        self.phases.push((title.to_owned(), began.elapsed().as_secs_f64()));
        let (result, progress) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        self.transcript.extend([&*result, &*progress]);
        assert!(output.status.success(), "{title} ended with {}:\n{progress}\n{result}", output.status);
        serde_json::from_str(&result).unwrap()
    }

    /// Reads from the records how long the parts of a rollout took, from the first that began to the last that ended.
    fn note_phases(&mut self, rollout: &str) {
        let arguments = ["history", "--rollout", rollout, "--json"];
        let printed = run(&mut self.project.greenlight(&self.bed, &arguments).unwrap()).unwrap();
        self.transcript.push_str(&printed);
        let history: Value = serde_json::from_str(&printed).unwrap();
        let mut ends: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
        for record in history["records"].as_array().unwrap() {
            let Some(action) = record["body"]["action"]["do"].as_str() else { continue };
            let phase = match action {
                "stage" => "stage on all hosts",
                "migrate" => "migrate",
                "drain" | "activate" | "confirm" | "admit" => "switch all hosts",
                _ => continue,
            };
            let at = seconds_of_day(record["at"].as_str().unwrap());
            ends.entry(phase).or_insert((at, at)).1 = at;
        }
        for phase in ["stage on all hosts", "migrate", "switch all hosts"] {
            if let Some((first, last)) = ends.get(phase) {
                // Over midnight the day begins anew.
                self.phases.push((format!("  {phase}"), (last - first).rem_euclid(86_400.0)));
            }
        }
    }

    /// The process runs under the host's own manager, and not beside it.
    fn expect_manager(&self, host: &str, init: Init) {
        let (program, arguments, expected) = match init {
            Init::Systemd => ("systemctl", ["is-active", "greenlight-kinto-web.service"], "active"),
            _ => ("supervisorctl", ["status", "greenlight-kinto-web"], "RUNNING"),
        };
        let state = self.bed.host(host).run(program, &arguments).unwrap();
        assert!(state.contains(expected), "{host}: {state}");
    }

    fn expect_schema(&self, version: &Version) {
        let sql = "SELECT max(value::integer) FROM metadata WHERE name = 'storage_schema_version'";
        assert_eq!(self.postgres.query(sql).unwrap().trim(), version.schema, "after kinto {}", version.name);
    }

    fn address(&self) -> SocketAddr {
        (self.haproxy.host().address(), 80).into()
    }

    fn create_collections(&self) {
        let mut paths = vec!["/v1/buckets/bed".to_owned(), collection("seed"), record("seed", 0)];
        paths.extend((0..WRITERS).map(|writer| collection(&writer_name(writer))));
        for path in paths {
            let answer = self.bed.request(self.address(), &Request::put(&path, JSON, "{}")).unwrap();
            assert_eq!(answer.status, 201, "{path}: {}", answer.text());
        }
    }

    /// How many writes were acknowledged, and how many of those are there, as they were written.
    fn count_writes(&self, reports: &[LoadReport]) -> (usize, usize) {
        let (mut acknowledged, mut found) = (0, 0);
        for (writer, report) in reports.iter().enumerate() {
            let path = format!("{}/records", collection(&writer_name(writer)));
            let answer = self.bed.get(self.address(), &path).unwrap();
            assert_eq!(answer.status, 200, "{}", answer.text());
            let listed: Value = serde_json::from_slice(&answer.body).unwrap();
            let there: BTreeSet<(String, u64)> = listed["data"]
                .as_array()
                .unwrap()
                .iter()
                .map(|record| (record["id"].as_str().unwrap().to_owned(), record["number"].as_u64().unwrap()))
                .collect();
            acknowledged += report.written.len();
            let is_there = |number: &&u64| there.contains(&(record_id(**number), **number));
            found += report.written.iter().filter(is_there).count();
        }
        (acknowledged, found)
    }

    /// Searches what greenlight printed, what it keeps, and the disks of all hosts.
    fn expect_password_only_where_it_belongs(&self) {
        let password = self.postgres.password();
        assert!(!self.transcript.contains(password), "greenlight printed the password");
        let records = self.project.path().join(".greenlight/records.sqlite");
        assert!(records.is_file(), "there are no records to search");
        assert_eq!(self.files_with_password(&[self.project.path().to_owned()]), Vec::<PathBuf>::new());
        for host in self.bed.hosts() {
            let root = host.root_path().unwrap();
            let places = ["etc", "home", "root", "run", "srv", "tmp", "usr/local", "var/log", "var/tmp"];
            let found = self.files_with_password(&places.map(|place| root.join(place)));
            for path in &found {
                let mode = fs::metadata(path).unwrap().mode();
                assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", path.display());
            }
            // The search itself would find it.
            let runs_kinto = HOSTS.iter().any(|(name, _)| *name == host.name());
            assert_eq!(!found.is_empty(), runs_kinto, "{}: {found:?}", host.name());
        }
    }

    fn files_with_password(&self, places: &[PathBuf]) -> Vec<PathBuf> {
        let mut command = Command::new("grep");
        command.args(["--recursive", "--files-with-matches", "--fixed-strings", "--devices=skip", "--null"]);
        command.arg("--file").arg(password_file(&self.bed)).args(places);
        let output = output_of(&mut command).unwrap();
        // 1 says that there is none. A process that ends meanwhile takes its files below /run along.
        assert!(output.status.code().is_some_and(|code| code <= 1), "{output:?}");
        let found = output.stdout.split(|byte| *byte == 0).filter(|path| !path.is_empty());
        found.map(|path| PathBuf::from(String::from_utf8_lossy(path).into_owned())).collect()
    }

    fn print_phases(&self) {
        for (phase, seconds) in &self.phases {
            println!("  {phase:<40} {seconds:>7.1} s");
        }
    }
}

/// The load: clients that read, that ask for the version, and that write.
struct UnderLoad {
    reads: LoadHandle,
    versions: LoadHandle,
    writes: Vec<LoadHandle>,
}

/// What came of it.
struct Outcome {
    reads: LoadReport,
    versions: LoadReport,
    writes: Vec<LoadReport>,
}

impl UnderLoad {
    fn start(site: &Site) -> Self {
        let load = || Load::to(site.address()).timeout(ANSWER_TIMEOUT);
        let seed = record("seed", 0);
        let writer = |writer: usize| {
            let name = writer_name(writer);
            load().connections(1).per_second(WRITES_PER_SECOND).requests(move |number| {
                let body = format!(r#"{{"data": {{"number": {number}}}}}"#);
                Request::put(&record(&name, number), JSON, body)
            })
        };
        Self {
            reads: load()
                .connections(3)
                .per_second(READS_PER_SECOND)
                .requests(move |_| Request::get(&seed))
                .start(&site.bed),
            versions: load()
                .connections(1)
                .per_second(VERSIONS_PER_SECOND)
                .version(VersionSource::Field("commit".into()))
                .requests(|_| Request::get("/v1/__version__"))
                .start(&site.bed),
            writes: (0..WRITERS).map(|number| writer(number).start(&site.bed)).collect(),
        }
    }

    /// Returns when every kind of request has been answered for a while longer.
    fn wait(&self) {
        for handle in [&self.reads, &self.versions].into_iter().chain(&self.writes) {
            handle.wait_for(REQUESTS_AFTER, REQUESTS_DEADLINE).unwrap();
        }
    }

    fn write_reports(&self) -> Vec<LoadReport> {
        self.writes.iter().map(LoadHandle::report).collect()
    }

    fn stop(self) -> Outcome {
        Outcome {
            reads: self.reads.stop().unwrap(),
            versions: self.versions.stop().unwrap(),
            writes: self.writes.into_iter().map(|handle| handle.stop().unwrap()).collect(),
        }
    }
}

impl Outcome {
    fn rows(&self) -> Vec<(String, &LoadReport)> {
        let mut rows = vec![("reads".to_owned(), &self.reads), ("versions".to_owned(), &self.versions)];
        rows.extend(self.writes.iter().enumerate().map(|(writer, report)| (writer_name(writer), report)));
        rows
    }

    fn print(&self) {
        println!(
            "  {:<12} {:>9} {:>7} {:>10} {:>10} {:>10}",
            "load", "requests", "failed", "median ms", "p99 ms", "max ms"
        );
        let (mut requests, mut failed) = (0, 0);
        for (what, report) in self.rows() {
            let LoadReport { median_ms, p99_ms, max_ms, .. } = report;
            let (asked, lost) = (report.requests, report.failed);
            println!("  {what:<12} {asked:>9} {lost:>7} {median_ms:>10.1} {p99_ms:>10.1} {max_ms:>10.1}");
            requests += asked;
            failed += lost;
        }
        println!("  {:<12} {requests:>9} {failed:>7}   in {:.1} s", "all", self.reads.seconds);
    }
}

/// What was seen during a rollout.
#[derive(Default)]
struct Seen {
    /// Command lines with the password in them.
    leaks: BTreeSet<String>,
    /// Whether a process of the hosts was among those looked at.
    saw_application: bool,
    /// The least number of servers that HAProxy had up and in use.
    fewest_serving: Option<usize>,
}

/// Does something while HAProxy and all processes, those on the hosts included, are looked at again and again.
fn under_watch<T>(seen: &Mutex<Seen>, haproxy: &HaProxy, password: &str, act: impl FnOnce() -> T) -> T {
    std::thread::scope(|scope| {
        let (stop, stopped) = channel::<()>();
        let watch = scope.spawn(move || {
            loop {
                let states = haproxy.server_states("kinto").unwrap();
                let serving = states.iter().filter(|(_, state)| state == "UP").count();
                let mut seen = seen.lock().unwrap();
                seen.fewest_serving = Some(seen.fewest_serving.map_or(serving, |before| before.min(serving)));
                for line in command_lines() {
                    seen.saw_application |= line.contains("venv/bin/kinto");
                    if line.contains(password) {
                        seen.leaks.insert(line);
                    }
                }
                drop(seen);
                // Neither gives a signal when it changes.
                if stopped.recv_timeout(WATCH_INTERVAL) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        });
        let result = act();
        drop(stop);
        watch.join().unwrap();
        result
    })
}

/// The arguments of every process on the machine, those inside the hosts included.
fn command_lines() -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    // One that has ended meanwhile has no arguments left.
    let lines = processes.filter_map(|path| fs::read(path.join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).collect()
}

/// The directory with a version's wheels, downloaded when this machine has not done it before.
fn wheels(version: &Version, python: &str) -> PathBuf {
    let key = blake3::hash([python, version.requirements].concat().as_bytes()).to_hex();
    let directory = cache_directory().join(format!("kinto-wheels-{}-{}", version.name, &key[..12]));
    if directory.is_dir() {
        return directory;
    }
    // Under another name until it is complete.
    let partial = cache_directory().join(format!("partial-kinto-wheels-{}", version.name));
    fs::create_dir_all(&partial).unwrap();
    let requirements = partial.join("requirements.txt");
    fs::write(&requirements, version.requirements).unwrap();
    run(Command::new("python3")
        .args(["-m", "pip", "download", "--quiet", "--only-binary", ":all:", "--python-version", python])
        .arg("--dest")
        .arg(&partial)
        .arg("--requirement")
        .arg(&requirements))
    .unwrap();
    fs::rename(&partial, &directory).unwrap();
    directory
}

/// A file with nothing but the password, to search by: as an argument it would be seen.
fn password_file(bed: &Bed) -> PathBuf {
    bed.home().join("password")
}

fn write_private(path: &Path, content: &str) {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap();
    file.write_all(content.as_bytes()).unwrap();
}

fn writer_name(writer: usize) -> String {
    format!("writer{}", writer + 1)
}

fn collection(name: &str) -> String {
    format!("/v1/buckets/bed/collections/{name}")
}

fn record(name: &str, number: u64) -> String {
    format!("{}/records/{}", collection(name), record_id(number))
}

fn record_id(number: u64) -> String {
    format!("number-{number}")
}

/// The seconds since midnight of a time such as `2026-11-21T02:54:31.778961445Z`.
fn seconds_of_day(time: &str) -> f64 {
    let clock = time.split_once('T').unwrap().1.trim_end_matches('Z');
    clock.split(':').fold(0.0, |seconds, part| seconds * 60.0 + part.parse::<f64>().unwrap())
}
