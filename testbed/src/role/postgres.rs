//! A real PostgreSQL on a host, with a database and a user of its own.

use std::io::Read;
use std::net::SocketAddr;

use crate::command::run_with_input;
use crate::{Bed, Error, Host};

const PORT: u16 = 5432;
const DATABASE: &str = "greenlight";
const USER: &str = "greenlight";

/// The script that the superuser runs; the password arrives on its standard input, in the first line.
const CREATE: &str = r#"
set -eu
read -r password
cluster=$(pg_lsclusters --no-header | { read -r version name rest; echo "$version $name"; })
set -- $cluster
echo "listen_addresses = '*'" > "/etc/postgresql/$1/$2/conf.d/bed.conf"
echo "host all all samenet scram-sha-256" >> "/etc/postgresql/$1/$2/pg_hba.conf"
pg_ctlcluster "$1" "$2" start
runuser -u postgres -- psql --quiet --no-psqlrc --set ON_ERROR_STOP=1 <<SQL
CREATE ROLE greenlight LOGIN PASSWORD '$password';
CREATE DATABASE greenlight OWNER greenlight;
SQL
"#;

/// A client whose password arrives on its standard input, out of sight of other processes.
const QUERY: &str = r#"read -r PGPASSWORD && export PGPASSWORD && exec psql "$@""#;

/// A PostgreSQL that runs.
#[derive(Debug)]
pub struct Postgres {
    host: Host,
    password: String,
}

impl Bed {
    /// Starts PostgreSQL on a host and returns when it accepts logins from the bed: database `greenlight`, user
    /// `greenlight`, a password of its own.
    pub fn postgres(&self, host: &str) -> Result<Postgres, Error> {
        let postgres = Postgres { host: self.host(host).clone(), password: random_password()? };
        let mut command = postgres.host.command("sh")?;
        command.args(["-c", CREATE]);
        // Its start waits until the server accepts connections, so there is nothing left to wait for.
        run_with_input(&mut command, format!("{}\n", postgres.password).as_bytes())?;
        Ok(postgres)
    }
}

impl Postgres {
    /// The host it runs on.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        (self.host.address(), PORT).into()
    }

    /// The user's password.
    pub fn password(&self) -> &str {
        &self.password
    }

    /// A connection URL with user, password and database.
    pub fn url(&self) -> String {
        format!("postgresql://{USER}:{}@{}/{DATABASE}", self.password, self.address())
    }

    /// Runs SQL as the user over the network and returns the rows, columns separated by `|`.
    pub fn query(&self, sql: &str) -> Result<String, Error> {
        let mut command = self.host.command("sh")?;
        command.args(["-c", QUERY, "psql", "--no-psqlrc", "--tuples-only", "--no-align"]);
        command.args(["--set", "ON_ERROR_STOP=1", "--host", &self.host.address().to_string()]);
        command.args(["--username", USER, "--dbname", DATABASE, "--command", sql]);
        run_with_input(&mut command, format!("{}\n", self.password).as_bytes())
    }
}

fn random_password() -> Result<String, Error> {
    let (path, mut bytes) = ("/dev/urandom", [0; 16]);
    std::fs::File::open(path)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(Error::io("read", path))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
