//! Secrets: each has a source, each is used, and none is also an ordinary variable.

use std::collections::{BTreeMap, BTreeSet};

use greenlight_model::id::{ServiceName, VariableName};

use crate::language::{FleetFile, Secret};
use crate::problem::{Problems, suggest};
use crate::read::{Key, Map};
use crate::requires;

/// Variables that Greenlight sets itself.
const OWN_VARIABLES: &str = "GREENLIGHT_";

pub(super) fn check(file: &FleetFile, problems: &mut Problems) {
    let sources = file.secret.value();
    let mut used: BTreeSet<&VariableName> = BTreeSet::new();
    let mut secrets_of: BTreeMap<&ServiceName, BTreeSet<&VariableName>> = BTreeMap::new();
    for (service_name, service) in file.service.good() {
        let mut own: BTreeSet<&VariableName> = BTreeSet::new();
        let asked = service.requires.value().into_iter().flat_map(requires::secrets);
        for (secret, is_read) in
            service.secrets.items().map(|one| (one, true)).chain(asked.map(|one| (one, false)))
        {
            used.insert(secret);
            if is_read && !own.insert(secret) {
                problems.error("secret-twice", &secret.span, format!("`{}` is listed twice", **secret), None);
            }
            let names =
                || sources.into_iter().flat_map(|sources| &sources.entries).map(|(name, _)| name.as_str());
            let is_readable = sources.is_none_or(|sources| sources.complete) && !file.secret.is_bad();
            if is_readable && !names().any(|name| name == secret.as_str()) {
                problems.error(
                    "unknown-secret",
                    &secret.span,
                    format!("no source is stated for the secret `{}`", **secret),
                    crate::problem::nearest(secret.as_str(), names())
                        .map(|near| format!("did you mean `{near}`?"))
                        .or_else(|| {
                            Some(format!("say where its value comes from in a table `[secret.{}]`", **secret))
                        }),
                );
            }
        }
        for (_, process) in service.process.good() {
            variables(&process.variables, &own, problems);
            for (_, profile) in process.profile.good() {
                variables(&profile.variables, &own, problems);
            }
        }
        secrets_of.insert(service_name, own);
    }
    for (_, environment) in file.environment.good() {
        let services = environment.hosts.entries();
        let secrets: BTreeSet<&VariableName> =
            services.filter_map(|(service, _)| secrets_of.get(&service.value)).flatten().copied().collect();
        variables(&environment.variables, &secrets, problems);
    }
    for (name, secret) in sources.into_iter().flat_map(|sources| &sources.entries) {
        if let Key::Is(secret) = secret {
            source(name, secret, &name.span, problems);
        }
        if !used.contains(&name.value) && file.service.value().is_some_and(|services| services.complete) {
            problems.warning(
                "unused-secret",
                &name.span,
                format!("no service reads the secret `{}`", **name),
                format!("name it in a service: `secrets = [\"{}\"]`", **name),
            );
        }
    }
}

fn source(name: &VariableName, secret: &Secret, span: &std::ops::Range<usize>, problems: &mut Problems) {
    match (secret.age.is_absent(), secret.command.is_absent()) {
        (true, true) => problems.error(
            "secret-without-source",
            span,
            format!("the secret `{name}` has no source"),
            "state `age`, an encrypted file, or `command`, a program that prints the value".to_owned(),
        ),
        (false, false) => {
            let span = secret.command.get().map_or(span, |command| &command.span);
            problems.error(
                "secret-with-two-sources",
                span,
                format!("the secret `{name}` has two sources, `age` and `command`"),
                "keep one of them".to_owned(),
            );
        }
        (true, false) => {
            if let Some(identity) = secret.identity.get() {
                problems.error(
                    "identity-without-age",
                    &identity.span,
                    "`identity` opens an age file, and this secret comes from a command",
                    "leave `identity` out".to_owned(),
                );
            }
        }
        (false, true) => {}
    }
    if let Some(command) = secret.command.get()
        && let Some(placeholder) = command.placeholders().next()
    {
        problems.error(
            "unknown-placeholder",
            &command.span,
            format!("`{{{placeholder}}}` stands for nothing here"),
            suggest(placeholder, "what may stand in braces", []),
        );
    }
}

fn variables(
    variables: &Key<Map<VariableName, String>>,
    secrets: &BTreeSet<&VariableName>,
    problems: &mut Problems,
) {
    for (name, _) in variables.entries() {
        if secrets.contains(&name.value) {
            problems.error(
                "variable-and-secret",
                &name.span,
                format!("`{}` is a variable here and a secret of the same service", **name),
                "leave one of the two out".to_owned(),
            );
        }
        if name.as_str().starts_with(OWN_VARIABLES) {
            problems.error(
                "reserved-variable",
                &name.span,
                format!(
                    "`{}` begins with `{OWN_VARIABLES}`: such variables are set by Greenlight itself",
                    **name
                ),
                "choose another name".to_owned(),
            );
        }
    }
}
