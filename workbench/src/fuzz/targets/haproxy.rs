//! What HAProxy answers: states of the servers that were asked for, or an error that says what is wrong with the answer.
//!
//! A line `%%` in the input ends one answer and begins the next; what is asked beyond the last is answered with nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use greenlight_drivers::balancer::BalancerDriver;
use greenlight_drivers::transport::{BoxFuture, Transport, TransportError};
use greenlight_model::fleet::{Balancer, BalancerKind};
use greenlight_model::id::HostName;

use super::{Target, demand};

pub(super) const TARGET: Target = Target {
    name: "haproxy",
    about: "HAProxy's answers",
    words: &[
        "%%\n",
        "# pxname,svname,",
        "be_id",
        "srv_name",
        "srv_op_state",
        "srv_admin_state",
        "srv_uweight",
        "srv_check_state",
        "check_health",
        "check_rise",
        "check_fall",
        "scur",
        "qcur",
        "web1",
        "web2",
        "1\n",
        "\"\"",
        "Can't find backend.\n",
        "Permission denied\n",
        "Unknown command",
    ],
    make: None,
    mend: None,
    feed,
    bytes_fixed: 1 << 20,
    bytes_per_byte: 256,
};

const SEPARATOR: &str = "%%\n";

struct Recorded(Mutex<std::vec::IntoIter<String>>);

impl Transport for Recorded {
    fn exchange<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<String, TransportError>> {
        let answer = self.0.lock().unwrap_or_else(PoisonError::into_inner).next().unwrap_or_default();
        Box::pin(std::future::ready(Ok(answer)))
    }
}

fn feed(input: &[u8]) -> Result<bool, String> {
    let text = String::from_utf8_lossy(input);
    let answers: Vec<String> = text.split(SEPARATOR).map(str::to_owned).collect();
    let hosts: Vec<HostName> = ["web1", "web2"].iter().filter_map(|name| name.parse().ok()).collect();
    let balancer = Balancer {
        service: "web".parse().map_err(|error| format!("{error}"))?,
        kind: BalancerKind::HaproxyTcp { address: "lb:9999".to_owned() },
        backend: "web".to_owned(),
        servers: BTreeMap::new(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().map_err(|error| error.to_string())?;
    let driver = || {
        let recorded = Recorded(Mutex::new(answers.clone().into_iter()));
        BalancerDriver::new(&balancer, &hosts, Arc::new(recorded))
    };
    let is_understood = match runtime.block_on(driver().read()) {
        Ok(servers) => {
            demand(servers.keys().eq(&hosts), || format!("it was asked for others than {servers:?}"))?;
            true
        }
        Err(error) => {
            demand(!error.to_string().is_empty(), || "an error without words".to_owned())?;
            false
        }
    };
    // A change is believed when it was read back: each answer may be the one that is read.
    for host in &hosts {
        let _ = runtime.block_on(driver().drain(host));
        let _ = runtime.block_on(driver().admit(host, None));
    }
    Ok(is_understood)
}
