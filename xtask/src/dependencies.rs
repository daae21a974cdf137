//! What comes in from outside: licences, banned crates and sources as `deny.toml` has them, and how many.
//!
//! This enforces in every run, from `cargo metadata` alone, the part of `deny.toml` that decides over a crate.
//! cargo-deny reads the licence files too; see `cargo xtask deny`.

use std::collections::BTreeSet;

use serde::Deserialize;

use crate::{Error, cargo, workspace_root};

/// The most packages that a build for one platform may consist of. Each is one more to trust and to wait for.
const PACKAGES_MAX: usize = 400;

#[derive(Debug, Deserialize)]
struct Rules {
    graph: Graph,
    licenses: Licenses,
    bans: Bans,
}

#[derive(Debug, Deserialize)]
struct Graph {
    targets: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Bans {
    deny: Vec<Ban>,
}

#[derive(Debug, Deserialize)]
struct Ban {
    name: String,
    reason: String,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    version: String,
    /// Absent for the workspace's own.
    source: Option<String>,
    license: Option<String>,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    req: String,
    path: Option<String>,
}

/// Each line names a package and what it breaks; empty when all is in order.
pub(crate) fn check() -> Result<Vec<String>, Error> {
    let path = workspace_root().join("deny.toml");
    let text = std::fs::read_to_string(&path).map_err(Error::system("read deny.toml"))?;
    let rules: Rules =
        toml::from_str(&text).map_err(|error| Error::Refused(format!("deny.toml: {error}")))?;
    let mut problems = Vec::new();
    for target in &rules.graph.targets {
        let output = cargo()
            .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", target])
            .output()
            .map_err(Error::system("start cargo metadata"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(Error::Refused(format!("cargo metadata for {target}: {}", said.trim())));
        }
        let metadata: Metadata = serde_json::from_slice(&output.stdout)
            .map_err(|error| Error::system("read what cargo metadata says")(error.into()))?;
        let count = metadata.packages.len();
        if count > PACKAGES_MAX {
            problems.push(format!("{target}: {count} packages; at most {PACKAGES_MAX}"));
        }
        problems.extend(metadata.packages.iter().flat_map(|package| judge(package, &rules)));
        problems.extend(registries(&metadata.packages));
    }
    problems.sort();
    problems.dedup();
    Ok(problems)
}

/// All packages come from one registry, the one that cargo uses by itself: a second one is named in a manifest or a
/// setting, and is a mistake.
fn registries(packages: &[Package]) -> Option<String> {
    let sources: BTreeSet<&str> = packages
        .iter()
        .filter_map(|package| package.source.as_deref())
        .filter(|source| source.starts_with("registry+"))
        .collect();
    (sources.len() > 1).then(|| {
        let all: Vec<&str> = sources.into_iter().collect();
        format!("packages come from several registries: {}", all.join(", "))
    })
}

fn judge(package: &Package, rules: &Rules) -> Vec<String> {
    let Package { name, version, .. } = package;
    let mut problems = Vec::new();
    match &package.license {
        Some(license) if is_allowed(license, &rules.licenses.allow) => {}
        Some(license) => problems.push(format!("{name} {version}: its licence {license} is not allowed")),
        None => problems.push(format!("{name} {version}: it names no licence")),
    }
    if let Some(ban) = rules.bans.deny.iter().find(|ban| ban.name == *name) {
        problems.push(format!("{name} {version}: banned, {}", ban.reason));
    }
    match &package.source {
        Some(source) => {
            if !source.starts_with("registry+") {
                problems.push(format!("{name} {version}: comes from {source}, which is no registry"));
            }
        }
        None => {
            let wild = package.dependencies.iter().filter(|dependency| dependency.req == "*");
            problems.extend(wild.filter(|dependency| dependency.path.is_none()).map(|dependency| {
                format!("{name} {version}: asks for any version of {}; name one", dependency.name)
            }));
        }
    }
    problems
}

/// Whether a licence expression can be met with allowed licences alone. `AND` binds closer than `OR`; the
/// slash is an older way to write `OR`. What does not parse is not allowed.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    either(&mut words, allowed) == Some(true) && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn either(words: &mut Words<'_>, allowed: &[String]) -> Option<bool> {
    let mut met = both(words, allowed)?;
    while words.next_if_eq(&"OR").is_some() {
        met |= both(words, allowed)?;
    }
    Some(met)
}

fn both(words: &mut Words<'_>, allowed: &[String]) -> Option<bool> {
    let mut met = one(words, allowed)?;
    while words.next_if_eq(&"AND").is_some() {
        met &= one(words, allowed)?;
    }
    Some(met)
}

fn one(words: &mut Words<'_>, allowed: &[String]) -> Option<bool> {
    let word = words.next()?;
    if word == "(" {
        let met = either(words, allowed)?;
        return (words.next()? == ")").then_some(met);
    }
    let license = match words.next_if_eq(&"WITH") {
        Some(_) => format!("{word} WITH {}", words.next()?),
        None => word.to_owned(),
    };
    Some(allowed.contains(&license))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licence_expressions() {
        let allowed = ["MIT", "Apache-2.0", "Unicode-3.0"].map(String::from);
        for (expression, expected) in [
            ("MIT", true),
            ("MIT OR Apache-2.0", true),
            ("MIT/GPL-3.0", true),
            ("GPL-3.0 OR MIT", true),
            ("(MIT OR GPL-3.0) AND Unicode-3.0", true),
            ("MIT OR GPL-3.0 AND LGPL-2.1", true),
            ("Apache-2.0 WITH LLVM-exception OR MIT", true),
            ("GPL-3.0", false),
            ("MIT AND GPL-3.0", false),
            ("(MIT OR GPL-3.0) AND LGPL-2.1", false),
            ("Apache-2.0 WITH LLVM-exception", false),
            ("", false),
            ("MIT MIT", false),
            ("MIT OR", false),
            ("(MIT", false),
        ] {
            assert_eq!(is_allowed(expression, &allowed), expected, "{expression}");
        }
    }

    #[test]
    fn each_rule_can_be_broken() {
        let rules: Rules = toml::from_str(
            r#"
            graph.targets = []
            licenses.allow = ["MIT"]
            bans.deny = [{ name = "openssl", reason = "C" }]
            "#,
        )
        .unwrap();
        let check = |change: fn(&mut Package), expected: &str| {
            let mut package = Package {
                name: "fine".into(),
                version: "1.0.0".into(),
                source: Some("registry+https://index".into()),
                license: Some("MIT".into()),
                dependencies: Vec::new(),
            };
            assert_eq!(judge(&package, &rules), Vec::<String>::new());
            change(&mut package);
            let problems = judge(&package, &rules);
            assert!(problems.len() == 1 && problems[0].contains(expected), "{problems:?}: {expected}");
        };
        check(|package| package.license = None, "names no licence");
        check(|package| package.license = Some("GPL-3.0".into()), "GPL-3.0 is not allowed");
        check(|package| package.name = "openssl".into(), "banned, C");
        check(|package| package.source = Some("git+https://index".into()), "which is no registry");
        check(
            |package| {
                let wild = Dependency { name: "any".into(), req: "*".into(), path: None };
                (package.source, package.dependencies) = (None, vec![wild]);
            },
            "asks for any version of any",
        );
    }

    #[test]
    fn a_second_registry_is_named() {
        let from = |source: &str| Package {
            name: "fine".into(),
            version: "1.0.0".into(),
            source: Some(source.into()),
            license: Some("MIT".into()),
            dependencies: Vec::new(),
        };
        let one = [from("registry+https://one"), from("registry+https://one")];
        assert_eq!(registries(&one), None);
        let two = [from("registry+https://one"), from("registry+https://two")];
        assert!(registries(&two).is_some_and(|problem| problem.contains("https://two")));
    }
}
