//! `router`: the built-in data plane as a process of its own.

use greenlight_router::{AccessLogForm, RouterConfig, RouterError, RouterState, TlsFiles};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::{LogForm, Router};
use crate::failure::{Exit, Failure};
use crate::printer::Printer;

pub(crate) fn run(router: &Router, printer: &Printer) -> Result<Exit, Failure> {
    let state = match &router.state {
        None => RouterState::new(0, Vec::new()),
        Some(path) => {
            let cannot = |why: String| Failure::usage(format!("cannot read {}: {why}", path.display()));
            let text = std::fs::read_to_string(path).map_err(|error| cannot(error.to_string()))?;
            serde_json::from_str(&text).map_err(|error| cannot(error.to_string()))?
        }
    };
    let mut config = RouterConfig::new(router.listen, router.control.clone());
    if let (Some(certificate), Some(key)) = (&router.tls_certificate, &router.tls_key) {
        config.tls = Some(TlsFiles { certificate: certificate.clone(), key: key.clone() });
    }
    config.access_log.clone_from(&router.access_log);
    config.access_log_form = match router.access_log_form {
        LogForm::Json => AccessLogForm::Json,
        LogForm::Common => AccessLogForm::Common,
    };
    config.access_log_one_in = router.access_log_one_in;
    config.keep.clone_from(&router.keep);
    config.take_over = router.take_over;
    config.metrics = router.metrics;
    config.counts = !router.no_counts;
    config.workers = router.workers.unwrap_or_default();
    let control = router.control.display();
    let started = |address| printer.progress(format!("router on {address}, control socket {control}"));
    let stopped = async {
        match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
            (Ok(mut terminate), Ok(mut interrupt)) => {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            }
            (Err(error), _) | (_, Err(error)) => {
                // Without signals it stops as any process does that is killed: requests in flight are lost.
                printer
                    .warning(format!("cannot listen for signals, so stopping will not be graceful: {error}"));
                std::future::pending::<()>().await;
            }
        }
    };
    let report = greenlight_router::run_until(config, state, started, stopped)
        .map_err(|error| Failure::from_error(exit_of(&error), &error))?;
    printer.progress(format!("router stopped: {report:?}"));
    Ok(Exit::Done)
}

/// What was asked for is at fault, or what the system has for it.
fn exit_of(error: &RouterError) -> Exit {
    match error {
        RouterError::State(_) | RouterError::Tls(_) | RouterError::TooManyWorkers { .. } => Exit::Usage,
        _ => Exit::Failed,
    }
}
