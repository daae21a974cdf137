//! Python: wheels are built once and installed on each host without a network; gunicorn, uvicorn, Django, scripts.

use super::command::Candidate;
use super::{Draft, ProjectFacts, one_line};

const VENV: &str = "venv/bin/";

pub(super) fn detect(facts: &ProjectFacts, draft: &mut Draft) {
    let project = Project::read(facts);
    let has_requirements = facts.files.contains_key("requirements.txt");
    let is_python = has_requirements
        || project.is_package
        || ["manage.py", "setup.py", "app.py", "main.py", "wsgi.py"]
            .iter()
            .any(|file| facts.paths.contains(*file));
    if !is_python {
        return;
    }
    draft.program_folder = Some(VENV);
    draft.prepare.push("python3 -m venv venv".to_owned());
    if has_requirements {
        draft.found("requirements.txt: wheels are built once, and installed on each host without a network");
        draft.build.push("python3 -m pip wheel --wheel-dir wheels --requirement requirements.txt".to_owned());
        draft.prepare.push(
            "venv/bin/pip install --no-index --find-links wheels --requirement requirements.txt".to_owned(),
        );
    }
    if let (true, Some(name)) = (project.is_package, &project.name) {
        draft.found(format!("pyproject.toml: the package `{name}` is built as a wheel"));
        draft.build.push("python3 -m pip wheel --wheel-dir wheels .".to_owned());
        draft.prepare.push(format!("venv/bin/pip install --no-index --find-links wheels {name}"));
    }
    match (&project.requires_python, facts.files.get(".python-version")) {
        (Some(versions), _) => draft.runtime("python", versions, "pyproject.toml"),
        (None, Some(version)) => draft.runtime("python", version, ".python-version"),
        (None, None) => {}
    }
    if facts.paths.contains("alembic.ini") {
        draft.found("alembic.ini: migrations run once per rollout");
        draft.migrate = Some("venv/bin/alembic upgrade head".to_owned());
    }
    if facts.paths.contains("manage.py") {
        draft.found("manage.py: Django's migrations run once per rollout");
        draft.migrate = Some("venv/bin/python manage.py migrate --no-input".to_owned());
        if facts
            .files
            .iter()
            .any(|(path, text)| path.ends_with("settings.py") && text.contains("STATIC_ROOT"))
        {
            draft.prepare.push("venv/bin/python manage.py collectstatic --no-input".to_owned());
        }
    }
    draft.usual = application(facts, &project, draft);
}

/// What usually runs such a project.
fn application(facts: &ProjectFacts, project: &Project, draft: &mut Draft) -> Option<Candidate> {
    let mut web = |server: &str, arguments: &str, source: &str| {
        if !project.depends_on(server, facts) {
            draft.found(format!("{server} is not among the dependencies: add it, or state another `run`"));
        }
        Some(Candidate::usual("web", &format!("{VENV}{server} {arguments}"), Some(8000), source))
    };
    if facts.paths.contains("manage.py") {
        let module =
            facts.paths.iter().find_map(|path| path.strip_suffix("/wsgi.py").filter(|it| is_module(it)));
        return match module {
            Some(module) => web(
                "gunicorn",
                &format!("--bind 0.0.0.0:{{port}} {module}.wsgi"),
                "manage.py and wsgi.py (Django)",
            ),
            None => None,
        };
    }
    for file in ["asgi.py", "wsgi.py", "app.py", "main.py"] {
        let Some(text) = facts.files.get(file) else { continue };
        let module = file.trim_end_matches(".py");
        for (constructor, server) in [
            ("FastAPI(", "uvicorn"),
            ("Starlette(", "uvicorn"),
            ("Flask(", "gunicorn"),
            ("Bottle(", "gunicorn"),
        ] {
            let Some(variable) = assigned(text, constructor) else { continue };
            let source = format!("{file}: `{variable} = {constructor}…)`");
            return match server {
                "uvicorn" => {
                    web(server, &format!("{module}:{variable} --host 0.0.0.0 --port {{port}}"), &source)
                }
                _ => web(server, &format!("--bind 0.0.0.0:{{port}} {module}:{variable}"), &source),
            };
        }
    }
    let script = project.scripts.first()?;
    Some(Candidate::usual(script, &format!("{VENV}{script}"), None, "pyproject.toml, [project.scripts]"))
}

/// The top-level variable that holds what a constructor made: `app = Flask(__name__)`.
fn assigned<'a>(text: &'a str, constructor: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (variable, value) = line.split_once('=')?;
        let value = value.trim_start();
        let variable = variable.split(':').next()?.trim_end();
        let is_call = value.starts_with(constructor)
            || value
                .split_once('.')
                .is_some_and(|(module, call)| is_module(module) && call.starts_with(constructor));
        (is_call && is_module(variable)).then_some(variable)
    })
}

fn is_module(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// What `pyproject.toml` says.
#[derive(Default)]
struct Project {
    name: Option<String>,
    is_package: bool,
    requires_python: Option<String>,
    scripts: Vec<String>,
    dependencies: Vec<String>,
}

impl Project {
    fn read(facts: &ProjectFacts) -> Self {
        let Some(table) = facts.files.get("pyproject.toml").and_then(|text| text.parse::<toml::Table>().ok())
        else {
            return Self::default();
        };
        let project = table.get("project").and_then(toml::Value::as_table);
        let poetry = table.get("tool").and_then(|tool| tool.get("poetry")).and_then(toml::Value::as_table);
        let text = |value: Option<&toml::Value>| value.and_then(toml::Value::as_str).map(str::to_owned);
        let keys = |value: Option<&toml::Value>| -> Vec<String> {
            value
                .and_then(toml::Value::as_table)
                .into_iter()
                .flat_map(|table| table.keys().cloned())
                .collect()
        };
        let poetry_dependencies = poetry.and_then(|poetry| poetry.get("dependencies"));
        let listed = project
            .and_then(|project| project.get("dependencies"))
            .and_then(toml::Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(|dependency| dependency.as_str().map(str::to_owned));
        let either = |key| project.and_then(|it| it.get(key)).or_else(|| poetry.and_then(|it| it.get(key)));
        let is_plain = |name: &String| {
            name.starts_with(|c: char| c.is_ascii_alphanumeric())
                && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        };
        let name = text(either("name")).filter(is_plain);
        let mut scripts = keys(either("scripts"));
        scripts.retain(|script| is_plain(script) && super::process_name(script).as_ref() == Some(script));
        Self {
            is_package: name.is_some() && (table.contains_key("build-system") || poetry.is_some()),
            name,
            requires_python: text(project.and_then(|project| project.get("requires-python")))
                .or_else(|| text(poetry_dependencies.and_then(|dependencies| dependencies.get("python"))))
                .map(|versions| one_line(&versions)),
            scripts,
            dependencies: listed.chain(keys(poetry_dependencies)).collect(),
        }
    }

    fn depends_on(&self, package: &str, facts: &ProjectFacts) -> bool {
        let is_it = |line: &str| {
            let name = line.trim().split(|c: char| !(c.is_ascii_alphanumeric() || "._-".contains(c))).next();
            name.is_some_and(|name| name.eq_ignore_ascii_case(package))
        };
        self.dependencies.iter().any(|dependency| is_it(dependency))
            || facts
                .files
                .iter()
                .filter(|(path, _)| path.starts_with("requirements"))
                .any(|(_, text)| text.lines().any(is_it))
    }
}
