//! The preview says what happens then.

use super::*;

#[test]
fn a_preview_says_what_would_happen_by_wave_and_when() {
    let preview = preview(&fleet("web: a b").world());
    assert_eq!(preview.outcome, Some(Outcome::Done { left_out: Default::default() }));
    assert_eq!((preview.error, preview.waits), (None, Vec::new()));
    let waves: Vec<Option<usize>> = preview.steps.iter().map(|step| step.wave).collect();
    assert_eq!(waves[..6], [None; 6]);
    assert_eq!(waves[6..14], [0, 0, 0, 0, 1, 1, 1, 1].map(Some));
    assert!(preview.steps.is_sorted_by_key(|step| step.at_ms));
    assert!(preview.took_ms > 20_000);
}

#[test]
fn a_gate_is_shown_and_what_would_follow_it() {
    let mut world = fleet("web: a b").world();
    let green = preview(&world);
    let light = Light::Amber { why: "nobody has approved".to_owned() };
    world.gates.push(Gate { name: "approval".to_owned(), light });
    let amber = preview(&world);
    assert_eq!(amber.outcome, None);
    assert!(matches!(amber.waits[..], [Wait::Gate { .. }]));
    assert_eq!((&amber.steps, amber.digest_text()), (&green.steps, green.digest_text()));
}

#[test]
fn the_digest_is_of_what_would_change() {
    let world = fleet("web: a b").world();
    let text = preview(&world).digest_text();
    let id = "02".repeat(32);
    let lines: Vec<String> = ["1", "2"]
        .iter()
        .zip(["a/web", "b/web"])
        .flat_map(|(wave, name)| {
            [
                format!("{wave} drain {name}"),
                format!("{wave} activate {name} {id} generation 2"),
                format!("{wave} confirm {name} {id} generation 2"),
                format!("{wave} admit {name}"),
            ]
        })
        .collect();
    assert_eq!(text, format!("greenlight plan 1\n{}\n", lines.join("\n")));
    // Bytes that are there already are no other plan; a server that was drained meanwhile is.
    let mut staged = world.clone();
    let target = *world.rollout.plan.targets.values().next().unwrap();
    report_mut(&mut staged, &instance("a/web")).staged.insert(target);
    assert_eq!(preview(&staged).digest_text(), text);
    let mut drained = world;
    if let BalancerReport::Servers(servers) = &mut drained.traffic[0] {
        servers.get_mut(&host("a")).unwrap().admission = greenlight_model::traffic::Admission::Drain;
    }
    assert_ne!(preview(&drained).digest_text(), text);
}

#[test]
fn a_preview_that_cannot_end_says_what_it_would_wait_for() {
    let mut world = fleet("web: a b").world();
    world.traffic = vec![BalancerReport::Unreachable { why: "refused".to_owned() }];
    let preview = preview(&world);
    assert_eq!(preview.outcome, None);
    let why = "refused".to_owned();
    assert_eq!(preview.waits[0], Wait::Balancer { title: "haproxy lb:9999 web".to_owned(), why });
}
