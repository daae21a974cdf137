use proptest::prelude::*;

use super::*;

fn facts(directory: &str, files: &[(&str, &str)], paths: &[&str]) -> ProjectFacts {
    let files: BTreeMap<String, String> =
        files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
    for path in files.keys() {
        assert!(wants(path), "{path}");
    }
    let paths = paths.iter().map(|path| (*path).to_owned()).chain(files.keys().cloned()).collect();
    ProjectFacts {
        directory: directory.to_owned(),
        branch: Some("main".to_owned()),
        remote: None,
        paths,
        files,
    }
}

/// Proposes, reads the proposal, and looks for lines in it.
fn check(facts: &ProjectFacts, expected: &[&str]) -> Proposal {
    let proposal = propose(facts);
    let parsed =
        crate::parse(&proposal.text).unwrap_or_else(|problems| panic!("{problems:#?}\n{}", proposal.text));
    assert_eq!(parsed.warnings, [], "{}", proposal.text);
    for line in expected {
        assert!(
            proposal.text.lines().any(|own| own.trim() == *line),
            "no line `{line}` in\n{}",
            proposal.text
        );
    }
    proposal
}

#[test]
fn nothing_known_is_a_file_all_the_same() {
    let proposal = check(
        &facts("My Site", &[], &[]),
        &["[service.my-site]", "hosts.my-site = [\"my-site.example.org\"]"],
    );
    assert!(proposal.findings.iter().any(|finding| finding.starts_with("nothing says which command")));
    check(&ProjectFacts::default(), &["[service.app]", "source = { git = \".\" }"]);
}

#[test]
fn the_service_is_named_after_the_repository() {
    for (remote, name) in [
        ("git@example.org:team/Web.Shop.git", "[service.\"web.shop\"]"),
        ("https://example.org/team/shop/", "[service.shop]"),
        ("///", "[service.checkout]"),
    ] {
        let facts = ProjectFacts { remote: Some(remote.to_owned()), ..facts("checkout", &[], &[]) };
        check(&facts, &[name]);
    }
}

#[test]
fn python_projects() {
    check(
        &facts(
            "shop",
            &[
                ("requirements.txt", "Django==5.0\ngunicorn\n"),
                ("mysite/settings.py", "STATIC_ROOT = 'static'\n"),
                ("mysite/urls.py", "urlpatterns = [path('healthz/', ok)]\n"),
                (".python-version", "3.11.4\n"),
            ],
            &["manage.py", "mysite/wsgi.py", "media/", "db.sqlite3"],
        ),
        &[
            "build = [\"python3 -m pip wheel --wheel-dir wheels --requirement requirements.txt\"]",
            "\"venv/bin/pip install --no-index --find-links wheels --requirement requirements.txt\",",
            "\"venv/bin/python manage.py collectstatic --no-input\",",
            "requires = { python = \">=3.11\" }",
            "migrate = \"venv/bin/python manage.py migrate --no-input\"",
            "run = \"venv/bin/gunicorn --bind 0.0.0.0:{port} mysite.wsgi\"",
            "health = { http = \"/healthz\" }",
            "\"media/\",",
            "\"db.sqlite3\",",
        ],
    );
    let proposal = check(
        &facts(
            "api",
            &[
                (
                    "pyproject.toml",
                    "[build-system]\n[project]\nname = \"api\"\nrequires-python = \">=3.11,<4\"\ndependencies = [\"fastapi\"]\n",
                ),
                ("main.py", "from fastapi import FastAPI\napi = FastAPI()\n@api.get(\"/health\")\n"),
            ],
            &["alembic.ini"],
        ),
        &[
            "run = \"venv/bin/uvicorn main:api --host 0.0.0.0 --port {port}\"",
            "requires = { python = \">=3.11, <4\" }",
            "migrate = \"venv/bin/alembic upgrade head\"",
            "health = { http = \"/health\" }",
            "\"venv/bin/pip install --no-index --find-links wheels api\",",
        ],
    );
    assert!(
        proposal.findings.iter().any(|finding| finding.starts_with("uvicorn is not among the dependencies"))
    );
    check(
        &facts(
            "tool",
            &[(
                "pyproject.toml",
                "[build-system]\n[project]\nname = \"tool\"\n[project.scripts]\ntool = \"tool:main\"\n",
            )],
            &[],
        ),
        &["[service.tool.process.tool]", "run = \"venv/bin/tool\""],
    );
}

#[test]
fn a_procfile_and_units_say_what_runs() {
    check(
        &facts(
            "shop",
            &[
                (
                    "Procfile",
                    "web: gunicorn --bind :$PORT app:app\nworker: python worker.py\nrelease: alembic upgrade head\nbad: x 'y\n",
                ),
                ("requirements.txt", "gunicorn\n"),
                ("Dockerfile", "FROM x\nEXPOSE 5001/tcp\n"),
            ],
            &[],
        ),
        &[
            "run = \"venv/bin/gunicorn --bind :{port} app:app\"",
            "port = 5001",
            "[service.shop.process.worker]",
            "run = \"venv/bin/python worker.py\"",
            "migrate = \"venv/bin/alembic upgrade head\"",
        ],
    );
    let unit = "[Unit]\nDescription=x\n[Service]\nType=simple\nUser=app\nEnvironment=MODE=live \"NAME=a b\" PORT=9000\n\
                WorkingDirectory=/opt/shop\nExecStart=/opt/shop/bin/serve \\\n  --quiet\n";
    check(
        &facts(
            "shop",
            &[("deploy/shop.service", unit), ("deploy/job@.service", "[Service]\nExecStart=x\n")],
            &[],
        ),
        &[
            "[service.shop.process.shop]",
            "run = \"bin/serve --quiet\"",
            "port = 9000",
            "variables = { MODE = \"live\", NAME = \"a b\" }",
            "user = \"app\"",
        ],
    );
}

#[test]
fn node_rust_ruby_and_make() {
    check(
        &facts(
            "site",
            &[(
                "package.json",
                r#"{"engines":{"node":"^20.1"},"scripts":{"build":"x","start":"node server.js"}}"#,
            )],
            &["package-lock.json"],
        ),
        &[
            "\"npm ci\",",
            "\"npm run build\",",
            "requires = { node = \">=20.1\" }",
            "run = \"node server.js\"",
            "port = 3000",
        ],
    );
    check(
        &facts(
            "api",
            &[("Cargo.toml", "[package]\nname = \"api\"\n"), ("src/main.rs", "use axum::Router;\n")],
            &["Cargo.lock", "templates/"],
        ),
        &[
            "build = [\"cargo build --release --locked\"]",
            "\"target/release/api\",",
            "\"templates/**\",",
            "run = \"target/release/api\"",
            "port = 8080",
        ],
    );
    check(
        &facts(
            "shop",
            &[
                ("Gemfile", "source 'x'\nruby '3.2.2'\ngem 'rails'\ngem \"puma\"\n"),
                ("config/routes.rb", "get \"up\" => \"rails/health#show\"\n"),
            ],
            &["storage/", "app/assets/"],
        ),
        &[
            "\"bundle exec rails assets:precompile\",",
            "requires = { ruby = \">=3.2\" }",
            "migrate = \"bundle exec rails db:migrate\"",
            "run = \"bundle exec puma --port {port}\"",
            "health = { http = \"/up\" }",
            "shared = [\"storage/\"]",
        ],
    );
    check(
        &facts("book", &[("Makefile", "CSS := x\n.PHONY: css\njs css: src\n\tmake x\nall: css\n")], &[]),
        &["build = [\"make css js\"]"],
    );
}

#[test]
fn secrets_are_proposed_by_name_and_never_by_value() {
    let proposal = check(
        &facts(
            "api",
            &[(".env.example", "DATABASE_URL=postgres://planted\nLOG=info\nexport API_TOKEN=planted\n")],
            &[],
        ),
        &["# secrets = [\"DATABASE_URL\", \"API_TOKEN\"]", "# [secret.DATABASE_URL]"],
    );
    assert!(!proposal.text.contains("planted"));
}

#[test]
fn every_comment_that_is_a_line_of_the_language_is_right() {
    let facts = facts("api", &[("Procfile", "web: bin/web $PORT\n")], &[]);
    let text = propose(&facts).text;
    // What a newcomer gets by taking the `#` away, tables that prose surrounds included.
    let is_toml = |line: &&str| {
        let bare = line.trim_start_matches("# ");
        bare.starts_with('[') || bare.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '))
    };
    let uncommented: Vec<&str> = text
        .lines()
        .filter(is_toml)
        .map(|line| line.trim_start_matches("# "))
        // An alternative to the line above it.
        .filter(|line| !line.contains("instead of `age`"))
        .collect();
    let parsed = crate::parse(&uncommented.join("\n"))
        .unwrap_or_else(|problems| panic!("{problems:#?}\n{uncommented:#?}"));
    assert_eq!(parsed.fleet.environments.len(), 2);
    assert_eq!(parsed.fleet.secrets.len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a project's files hold, the proposal can be read.
    #[test]
    fn any_project_gets_a_file_that_is_read(
        directory in ".*",
        branch in proptest::option::of(".*"),
        remote in proptest::option::of(".*"),
        procfile in proptest::collection::vec(("[a-z /.@{}-]{0,9}", r#"[a-z0-9 $'"\\{}:=;|&#<>PORT_-]{0,40}"#), 0..5),
        unit in r#"[a-zA-Z0-9 $'"\\{}:=%/\n-]{0,80}"#,
        requirement in ".{0,20}",
        name in ".{0,20}",
        start in r#"(node )?[a-z0-9 $'"{}:=&-]{0,30}"#,
        path in ".{0,20}",
    ) {
        let procfile: String = procfile.iter().map(|(name, command)| format!("{name}: {command}\n")).collect();
        let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
        let pyproject = format!(
            "build-system = {{}}\n[project]\nname = {0}\nrequires-python = {1}\n[project.scripts]\n\"a b\" = \"x\"\n",
            quoted(&name), quoted(&requirement)
        );
        let package = serde_json::json!({ "engines": { "node": requirement }, "scripts": { "start": start } });
        let all = [
            ("Procfile", procfile),
            ("deploy/x.service", format!("[Service]\nUser={name}\nEnvironment={unit}\nExecStart={unit}")),
            ("pyproject.toml", pyproject),
            ("package.json", package.to_string()),
            ("Cargo.toml", format!("[[bin]]\nname = {}\n", quoted(&name))),
            ("Gemfile", format!("ruby {requirement}\n")),
            (".env.example", unit),
        ];
        // All at once, and each by itself, since one kind of project hides what another would propose.
        for chosen in std::iter::once(&all[..]).chain(all.chunks(1)) {
            let files: BTreeMap<String, String> =
                chosen.iter().map(|(path, text)| ((*path).to_owned(), text.clone())).collect();
            let paths = files.keys().cloned().chain([path.clone(), format!("{path}.db"), "media/".to_owned()]).collect();
            let facts = ProjectFacts {
                directory: directory.clone(), branch: branch.clone(), remote: remote.clone(), paths, files,
            };
            let proposal = propose(&facts);
            let parsed = crate::parse(&proposal.text);
            prop_assert!(parsed.is_ok(), "{:#?}\n{}", parsed, proposal.text);
            for finding in &proposal.findings {
                prop_assert!(!finding.contains('\n'), "{finding:?}");
            }
        }
    }
}
