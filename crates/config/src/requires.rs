//! What a host must have: fixed keys, and every other key is a runtime.

use greenlight_model::id::{CheckName, UserName, VariableName};
use greenlight_model::quantity::ByteSize;
use greenlight_model::requirements::{Reach, Requirements, ServiceUrl};
use serde_json::Value;
use toml::de::DeValue;

use crate::build::list;
use crate::problem::Problems;
use crate::read::{
    At, Example, Field, Key, List, Map, Node, Read, Refusal, Short, Shorthand, Table, TableReader, Text,
    in_text_order, table,
};
use crate::text::{AbsolutePath, Command, PackageName, RelativePath, VersionRequirement};

/// Where Python packages are looked for when nothing else is said.
const VENV: &str = "venv";

/// What a host must have.
#[derive(Debug, Default)]
pub(crate) struct Requires {
    disk: Key<ByteSize>,
    memory: Key<ByteSize>,
    packages: Key<List<PackageName>>,
    pip: Key<List<DistributionName>>,
    venv: Key<AnyPath>,
    users: Key<List<UserName>>,
    paths: Key<List<AbsolutePath>>,
    writable: Key<List<AbsolutePath>>,
    pub(crate) reach: Key<Map<CheckName, Short<ReachTable>>>,
    not_running: Key<List<Command>>,
    runtimes: Map<String, VersionRequirement>,
}

/// Declares the fixed keys: their descriptions, and how each is read.
macro_rules! keys {
    ($( $(#[doc = $doc:literal])* $key:ident : $type:ty = $example:literal; )*) => {
        impl Table for Requires {
            const TITLE: &'static str = "the requirements";
            const DESCRIPTION: &'static str = "What a host must have before a release may go there; checked on every host \
                before anything is changed. Every other key is a runtime with the versions that will do: `python = \">=3.11\"`. \
                The program that the processes are run with is asked, where its name says that it is this runtime, else \
                the one that is found first.";
            const FIELDS: &'static [Field] = &[$( Field {
                key: stringify!($key),
                description: concat!($($doc, "\n"),*),
                example: $example,
                required: false,
                schema: <$type as Read>::schema,
            }, )*];
        }

        impl Requires {
            fn fixed(reader: &TableReader<'_>, problems: &mut Problems) -> Self {
                Self {
                    $( $key: reader.key(stringify!($key), $example, problems), )*
                    runtimes: Map::default(),
                }
            }
        }
    };
}

keys! {
    /// Free disk under the service's directory.
    disk: ByteSize = "\"2GiB\"";
    /// Memory that can be had without swapping.
    memory: ByteSize = "\"512MiB\"";
    /// Debian packages that must be installed, at the same version on every host of the service.
    packages: List<PackageName> = "[\"libpq5\"]";
    /// Python packages that must be in `venv`, at the same version on every host of the service.
    pip: List<DistributionName> = "[\"sqlalchemy\"]";
    /// The virtual environment that `pip` is about: an absolute path, or one inside the release, where that of the release
    /// that runs is looked at. Default: `venv`.
    venv: AnyPath = "\"/opt/web/venv\"";
    /// Accounts that must exist.
    users: List<UserName> = "[\"www-data\"]";
    /// Files and directories that must be there, and readable by the accounts of the processes.
    paths: List<AbsolutePath> = "[\"/etc/web/site.conf\"]";
    /// Directories that the accounts of the processes must be able to write to.
    writable: List<AbsolutePath> = "[\"/var/spool/web\"]";
    /// Outside services that must let each host log in; nothing is changed there. `tcp://`, `http://`, `postgresql://`,
    /// `redis://` or `amqp://`.
    reach: Map<CheckName, Short<ReachTable>> = "{ cache = \"redis://cache1\", database = { secret = \"DATABASE_URL\" } }";
    /// Commands that must not be running on a host while it is changed: critical jobs.
    not_running: List<Command> = "[\"python3 bin/import.py\"]";
}

impl Read for Requires {
    const EXPECTED: &'static str = "a table";

    fn read(node: Node<'_>, problems: &mut Problems) -> Option<Self> {
        let DeValue::Table(table) = node.value.get_ref() else {
            node.wrong_type(Self::EXPECTED, problems);
            return None;
        };
        let mut requires = Self::fixed(&TableReader::over(table), problems);
        for (key, value) in in_text_order(table) {
            let name = key.get_ref().as_ref();
            let fixed = Self::FIELDS.iter().map(|field| field.key);
            if fixed.clone().any(|key| key == name) {
                continue;
            }
            let span = key.span();
            // A misspelt `packages` holds no version; say what it is near to instead of what a version looks like.
            let meant = crate::problem::nearest(name, fixed);
            if let (Some(meant), false) = (meant, value.get_ref().is_str()) {
                let message = format!("`{name}` is not a key of {}", Self::TITLE);
                problems.error("unknown-key", &span, message, format!("did you mean `{meant}`?"));
                continue;
            }
            let example = Example { key: name, value: "\">=3.11\"" };
            let entry = Node { name, key: &span, value, example, is_entry: false };
            match <VersionRequirement as Read>::read(entry, problems) {
                Some(version) => {
                    let version = Key::Is(At { span: entry.span(), value: version });
                    requires.runtimes.entries.push((At { span, value: name.to_owned() }, version));
                }
                None => requires.runtimes.complete = false,
            }
        }
        Some(requires)
    }

    fn schema() -> Value {
        let mut schema = crate::read::table_schema::<Self>();
        schema["additionalProperties"] = <VersionRequirement as Read>::schema();
        schema
    }
}

table! {
    /// An outside service, and where the credentials for it come from.
    ReachTable, "an outside service", {
        /// Its address, without a password.
        url: ServiceAddress = "\"postgresql://web@db1/web\"",
        /// The secret that is its password.
        password: VariableName = "\"DATABASE_PASSWORD\"",
        /// The secret that is its whole address, with user and password.
        secret: VariableName = "\"DATABASE_URL\"",
    }
}

impl Shorthand for ReachTable {
    type Short = ServiceAddress;
    fn from_short(short: At<ServiceAddress>) -> Self {
        Self { url: Key::Is(short), ..Self::default() }
    }
}

/// The address of an outside service, which anybody may read.
#[derive(Debug, Clone)]
pub(crate) struct ServiceAddress(String);

impl Text for ServiceAddress {
    const EXPECTED: &'static str = "the address of a service";
    const PATTERN: Option<&'static str> =
        Some("^(tcp|http|postgresql|postgres|redis|amqp)(\\+[a-z0-9]+)?://");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let url = ServiceUrl::parse(text).map_err(|why| {
            Refusal::help(
                format!("this is no address of a service: {why}"),
                "write it as in `redis://cache1:6379`",
            )
        })?;
        if url.password.is_some() {
            return Err(Refusal::help(
                "there is a password in this address, and everybody who has the repository can read it",
                "leave it out here, and name the secret that it is: { url = \"…\", password = \"DATABASE_PASSWORD\" }",
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

/// The name of a Python package, as `pip list` shows it.
#[derive(Debug, Clone)]
pub(crate) struct DistributionName(String);

impl Text for DistributionName {
    const EXPECTED: &'static str = "the name of a Python package";
    const PATTERN: Option<&'static str> = Some("^[A-Za-z0-9][A-Za-z0-9._-]*$");
    fn from_text(text: &str) -> Result<Self, Refusal> {
        let is_valid = text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if is_valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(Refusal::new(format!("`{text}` is not the name of a Python package")))
        }
    }
}

/// An absolute path, or one inside the release.
#[derive(Debug, Clone)]
pub(crate) struct AnyPath(String);

impl Text for AnyPath {
    const EXPECTED: &'static str = "a path";
    fn from_text(text: &str) -> Result<Self, Refusal> {
        if text.starts_with('/') {
            return AbsolutePath::from_text(text).map(|path| Self(path.0));
        }
        RelativePath::from_text(text).map(|path| Self(path.0.trim_end_matches('/').to_owned()))
    }
}

/// What is wrong with the requirements of a service beyond each value by itself.
pub(crate) fn check(requires: &Requires, problems: &mut Problems) {
    if let (Key::Is(venv), true) = (&requires.venv, requires.pip.is_absent()) {
        problems.error(
            "venv-without-pip",
            &venv.span,
            "`venv` says where Python packages are, and none is required",
            "name them in `pip`, or leave `venv` out".to_owned(),
        );
    }
    for (name, reach) in requires.reach.good() {
        let ReachTable { url, password, secret } = &reach.value.0;
        match (url.is_absent(), secret.is_absent()) {
            (true, true) => problems.error(
                "reach-without-address",
                &name.span,
                format!("nothing says where the outside service `{}` is", name.value),
                "state `url`, or `secret`, which is its whole address".to_owned(),
            ),
            (false, false) => problems.error(
                "reach-with-two-addresses",
                secret.get().map_or(&name.span, |secret| &secret.span),
                format!("the outside service `{}` has two addresses, `url` and `secret`", name.value),
                "keep one of them".to_owned(),
            ),
            (true, false) if !password.is_absent() => problems.error(
                "reach-with-two-passwords",
                password.get().map_or(&name.span, |password| &password.span),
                "`secret` is a whole address, password and all",
                "leave `password` out".to_owned(),
            ),
            _ => {}
        }
    }
}

/// The secrets that outside services are asked with.
pub(crate) fn secrets(requires: &Requires) -> impl Iterator<Item = &At<VariableName>> {
    requires
        .reach
        .good()
        .flat_map(|(_, reach)| [reach.value.0.password.get(), reach.value.0.secret.get()])
        .flatten()
}

/// As the model has them.
pub(crate) fn build(requires: &Requires) -> Requirements {
    Requirements {
        disk: requires.disk.value().copied(),
        memory: requires.memory.value().copied(),
        runtimes: requires
            .runtimes
            .good()
            .map(|(name, version)| (name.value.clone(), version.0.clone()))
            .collect(),
        packages: list(&requires.packages, |package| package.0.clone()),
        pip: list(&requires.pip, |package| package.0.clone()),
        venv: (!requires.pip.is_absent())
            .then(|| requires.venv.value().map_or_else(|| VENV.to_owned(), |path| path.0.clone())),
        users: list(&requires.users, UserName::clone),
        paths: list(&requires.paths, |path| path.0.clone()),
        writable: list(&requires.writable, |path| path.0.clone()),
        reach: requires
            .reach
            .good()
            .filter_map(|(name, reach)| Some((name.value.to_string(), build_reach(&reach.value.0)?)))
            .collect(),
        not_running: list(&requires.not_running, |command| command.0.clone()),
    }
}

fn build_reach(reach: &ReachTable) -> Option<Reach> {
    match (reach.url.value(), reach.secret.value()) {
        (Some(url), _) => Some(Reach::Url { url: url.0.clone(), password: reach.password.value().cloned() }),
        (None, secret) => Some(Reach::Secret { secret: secret?.clone() }),
    }
}
