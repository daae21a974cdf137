//! Writes the proposal: a commented fleet file that a newcomer can read from top to bottom.

use greenlight_model::id::ServiceName;

use super::Draft;
use super::command::Candidate;

/// The text of the fleet file.
pub(super) fn render(
    service: &ServiceName,
    branch: Option<&str>,
    draft: &Draft,
    processes: &[Candidate],
    secrets: &[String],
) -> String {
    let mut page = Page(String::new());
    page.comment("The fleet: what is released, and where it runs. Written by `greenlight init`; now it is yours to change.");
    page.comment("");
    page.comment("  greenlight check               is this file right?");
    page.comment("  greenlight plan production     what would happen, step by step");
    page.comment("  greenlight deploy production   do it");
    page.blank();
    page.service(service, branch, draft);
    page.secrets_of_the_service(secrets);
    for process in processes {
        page.process(service, process);
    }
    if processes.is_empty() {
        page.blank();
        page.comment("What runs. Without a process, the service is files alone.");
        page.comment(&format!("[service.{}.process.web]", key(service.as_str())));
        page.comment("run = \"bin/web --port {port}\"");
        page.comment("port = 8000");
        page.comment("health = \"/health\"");
    }
    page.secret_sources(secrets);
    page.environments(service, branch, processes.iter().any(|process| process.port.is_some()));
    page.0
}

struct Page(String);

impl Page {
    fn line(&mut self, line: &str) {
        self.0.push_str(line);
        self.0.push('\n');
    }

    fn blank(&mut self) {
        self.line("");
    }

    fn comment(&mut self, text: &str) {
        self.line(format!("# {text}").trim_end());
    }

    fn list(&mut self, name: &str, items: &[String]) {
        match items {
            [] => {}
            [item] => self.line(&format!("{name} = [{}]", string(item))),
            _ => {
                self.line(&format!("{name} = ["));
                for item in items {
                    self.line(&format!("    {},", string(item)));
                }
                self.line("]");
            }
        }
    }

    fn service(&mut self, service: &ServiceName, branch: Option<&str>, draft: &Draft) {
        self.comment(
            "What is released: a tree of files, built once from a commit; the same bytes go to every host.",
        );
        self.line(&format!("[service.{}]", key(service.as_str())));
        match branch {
            Some(branch) => self.line(&format!("source = {{ git = \".\", branch = {} }}", string(branch))),
            None => self.line("source = { git = \".\" }"),
        }
        if draft.build.is_empty() {
            self.comment("Steps that run in a clean checkout, each a script for `sh -e`. What they leave there is released.");
            self.comment("build = [\"make\"]");
        } else {
            self.comment("These run in a clean checkout, each a script for `sh -e`. What they leave there is released.");
            self.list("build", &draft.build);
        }
        if !draft.include.is_empty() {
            self.comment("Of the checkout, only this belongs to the release.");
            self.list("include", &draft.include);
        }
        if draft.shared.is_empty() {
            self.comment("Files and directories that outlive releases, such as what users bring; directories end with `/`.");
            self.comment("shared = [\"uploads/\"]");
        } else {
            self.comment(
                "These outlive releases: every release finds the same files there. Directories end with `/`.",
            );
            self.list("shared", &draft.shared);
        }
        if !draft.prepare.is_empty() {
            self.comment(
                "These run on each host in the new release's directory, before anything is switched.",
            );
            self.list("prepare", &draft.prepare);
        }
        self.comment("What a host must have; one that lacks it is found before anything changes.");
        let runtimes: Vec<String> = draft
            .runtimes
            .iter()
            .map(|(name, versions)| format!("{} = {}", key(name), string(versions)))
            .collect();
        if runtimes.is_empty() {
            self.comment("requires = { packages = [\"libpq5\"], disk = \"1GiB\" }");
        } else {
            self.line(&format!("requires = {{ {} }}", runtimes.join(", ")));
        }
        match &draft.migrate {
            Some(migrate) => {
                self.comment("Once per rollout, on one host, before the first is switched. Old and new code both meet its result.");
                self.line(&format!("migrate = {}", string(migrate)));
            }
            None => {
                self.comment(
                    "What changes the database: once per rollout, on one host, before the first is switched.",
                );
                self.comment("migrate = \"bin/migrate\"");
            }
        }
    }

    fn secrets_of_the_service(&mut self, secrets: &[String]) {
        self.comment("Secrets that the processes read from their environment; where each comes from stands further below.");
        let names: Vec<String> = match secrets {
            [] => vec![string("DATABASE_URL")],
            _ => secrets.iter().map(|name| string(name)).collect(),
        };
        self.comment(&format!("secrets = [{}]", names.join(", ")));
    }

    fn process(&mut self, service: &ServiceName, process: &Candidate) {
        self.blank();
        self.comment(
            "What runs, under the host's own manager. No shell is involved; `{port}` stands for the port.",
        );
        self.line(&format!("[service.{}.process.{}]", key(service.as_str()), key(&process.name)));
        self.line(&format!("run = {}", string(&process.run)));
        if let Some(port) = process.port {
            self.line(&format!("port = {port}"));
            self.comment("`http` answers 2xx when the process is healthy. `release`, where there is such a path, names the");
            self.comment("release that answers, so that an old process that would not go away is found.");
            match &process.health {
                Some(path) => self.line(&format!("health = {{ http = {} }}", string(path))),
                None => self.comment("health = { http = \"/health\", release = \"/version\" }"),
            }
        }
        if !process.variables.is_empty() {
            let variables: Vec<String> = process
                .variables
                .iter()
                .map(|(name, value)| format!("{} = {}", key(name), string(value)))
                .collect();
            self.line(&format!("variables = {{ {} }}", variables.join(", ")));
        }
        if let Some(user) = &process.user {
            self.line(&format!("user = {}", string(user)));
        }
    }

    fn secret_sources(&mut self, secrets: &[String]) {
        let name = secrets.first().map_or("DATABASE_URL", String::as_str);
        self.blank();
        self.comment("Where a secret comes from: a line of an age-encrypted file in the repository, or what a command prints.");
        self.comment(&format!("[secret.{}]", key(name)));
        self.comment("age = \"secrets.age\"");
        self.comment("command = \"pass show database-url\"   # instead of `age`");
    }

    fn environments(&mut self, service: &ServiceName, branch: Option<&str>, has_port: bool) {
        let service_key = key(service.as_str());
        self.blank();
        self.comment("Where it is tried first.");
        self.comment("[environment.staging]");
        self.comment(&format!("hosts.{service_key} = [\"{service}.staging.example.org\"]"));
        self.blank();
        self.comment(
            "Where it runs. A host is anything that `ssh NAME` reaches; `web[1-4]` is four of them.",
        );
        self.line("[environment.production]");
        if let Some(branch) = branch {
            self.comment("Pushes to this branch go here.");
            self.line(&format!("branch = {}", string(branch)));
        }
        self.line(&format!("hosts.{service_key} = [{}]", string(&placeholder_host(service))));
        self.comment("The user for ssh, when it is not the one that your ssh configuration says.");
        self.comment("user = \"deploy\"");
        if has_port {
            self.comment("What sends requests to the hosts: each is taken out before it changes, and let back in when it answers.");
            self.comment(&format!(
                "balancer = {{ haproxy = \"lb1:/run/haproxy/admin.sock\", backend = \"{service}\" }}"
            ));
        }
        self.comment(
            "How many change at once (`batch`), and how many must keep serving meanwhile (`floor`).",
        );
        self.comment("strategy = { kind = \"rolling\", batch = 1, floor = \"50%\" }");
        self.comment("Only what has run on staging for a day.");
        self.comment("after = { environment = \"staging\", soak = \"1d\" }");
    }
}

/// The host to be replaced by real ones.
fn placeholder_host(service: &ServiceName) -> String {
    format!("{service}.example.org")
}

/// A text as a TOML string.
fn string(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// A name as a TOML key.
fn key(name: &str) -> String {
    let is_bare = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if is_bare { name.to_owned() } else { string(name) }
}
