//! `init`: what it writes passes `check`, and it overwrites nothing.

use crate::site::Site;

/// A kind of project, its files, and what is to be in what is written.
type Project = (&'static str, &'static [(&'static str, &'static str)], &'static str);

#[test]
fn what_it_writes_passes_check_in_every_kind_of_project() {
    let projects: [Project; 6] = [
        ("nothing", &[], "[service."),
        (
            "python",
            &[
                ("requirements.txt", "gunicorn==22.0.0\n"),
                ("Procfile", "web: gunicorn --bind 0.0.0.0:$PORT app:app\nworker: python3 worker.py\n"),
                ("app.py", "def app(environ, start): ...\n"),
            ],
            "worker",
        ),
        (
            "node",
            &[(
                "package.json",
                r#"{"name": "shop", "scripts": {"start": "node server.js", "build": "tsc"}}"#,
            )],
            "npm",
        ),
        (
            "cargo",
            &[
                ("Cargo.toml", "[package]\nname = \"pump\"\nversion = \"0.1.0\"\nedition = \"2024\"\n"),
                ("src/main.rs", "fn main() {}\n"),
            ],
            "cargo build",
        ),
        (
            "django",
            &[
                ("manage.py", "import django\n"),
                ("requirements.txt", "django==5.1\ngunicorn\n"),
                ("shop/wsgi.py", "application = None\n"),
                ("shop/settings.py", "STATIC_ROOT = 'static'\n"),
            ],
            "migrate",
        ),
        (
            "units",
            &[("deploy/pump.service", "[Service]\nExecStart=/usr/bin/python3 -m pump\nUser=pump\n")],
            "pump",
        ),
    ];
    for (kind, files, expected) in projects {
        let site = Site::empty();
        for (name, text) in files {
            site.write(name, text);
        }
        let shown = site.run(&["init", "--print"]).exits(0);
        assert!(!site.path("greenlight.toml").exists(), "{kind}");
        site.run(&["init"]).exits(0).says(&["wrote ", "greenlight check"]);
        let text = site.read("greenlight.toml");
        assert_eq!(shown.stdout, text, "{kind}");
        assert!(text.contains(expected), "{kind} has no {expected}:\n{text}");
        site.run(&["check"]).exits(0);
    }
}

#[test]
fn a_file_that_is_there_stays_as_it_is() {
    let site = Site::empty();
    site.write("greenlight.toml", "# mine\n");
    site.run(&["init"]).exits(2).says(&["is there already; nothing was changed", "init --print"]);
    assert_eq!(site.read("greenlight.toml"), "# mine\n");
    let site = Site::empty();
    assert_eq!(site.run(&["init", "--json"]).exits(0).json()["command"], "init");
}
