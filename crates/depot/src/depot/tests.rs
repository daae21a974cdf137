//! The depot on a real disk, and releases on their way from it to a host.

use super::*;
use std::sync::Arc;

use crate::host::HostDepot;
use crate::testing::{Node, Project, build_at, look, noise, service};
use crate::{Parcel, Shipment};

/// Sends a release from the depot to a host, as the controller and the agent do; returns how many bytes crossed.
fn send(depot: &Depot, release: &Release, host: &HostDepot) -> usize {
    let shipment = Shipment::new(Arc::new(depot.clone()), release.id).unwrap();
    send_shipment(&shipment, release, host)
}

fn send_shipment(shipment: &Arc<Shipment>, release: &Release, host: &HostDepot) -> usize {
    let read = |mut parcel: Parcel| {
        let mut data = Vec::new();
        parcel.content.read_to_end(&mut data).unwrap();
        assert_eq!(parcel.bytes, data.len() as u64);
        (parcel.hash, parcel.encoding, data)
    };
    let manifest = crate::manifest::decode(&read(shipment.manifest().unwrap()).2).unwrap();
    let mut bytes = 0;
    let mut parcels = shipment.parcels(host.lacking(&manifest).unwrap()).unwrap();
    for parcel in parcels.by_ref() {
        let (hash, encoding, data) = read(parcel.unwrap());
        bytes += data.len();
        host.receive(hash, encoding, &data).unwrap();
    }
    assert_eq!(parcels.left_bytes(), 0);
    assert_eq!(host.missing(&manifest).unwrap(), []);
    host.place(release.id, &manifest).unwrap();
    let mark = greenlight_model::host::ReleaseMark {
        id: release.id,
        label: release.label.clone(),
        commit: release.commit.clone(),
    };
    host.complete(&mark, &manifest).unwrap();
    bytes
}

#[test]
fn releases_travel_to_a_host_and_arrive_equal() {
    let mut large = noise(1, 9 << 20);
    let text = b"the same line again\n".repeat(10_000);
    let project = Project::new(&[
        ("run", Node::Executable(b"#!/bin/sh\n")),
        ("text", Node::File(&text)),
        ("large", Node::File(&large)),
        ("static/link", Node::Link("../text")),
    ]);
    let service = service(&["mkdir static/empty"]);
    let host = HostDepot::open(&project.directory.path().join("srv/web")).unwrap();
    let depot = project.depot();

    let first = build_at(&project, &service, None, 0).unwrap();
    let cold = send(&depot, &first, &host);
    assert!(cold > large.len() && cold < large.len() + 10_000, "{cold} bytes: what compresses is compressed");
    let placed = look(&host.release_directory(first.id));
    let mut expected = look(&project.path());
    expected.retain(|path, _| path != ".git" && !path.starts_with(".git/"));
    expected.insert("static/empty".to_owned(), "directory".to_owned());
    assert_eq!(placed, expected);

    large[4 << 20] ^= 1;
    project.commit("second", &[("large", Node::File(&large))]);
    let second = build_at(&project, &service, None, 1).unwrap();
    let warm = send(&depot, &second, &host);
    assert!(warm > 0 && warm <= 2_000, "{warm} bytes: the changed byte, and what surrounds it");
    assert_eq!(fs::read(host.release_directory(second.id).join("large")).unwrap(), large);
    assert_eq!(send(&depot, &second, &host), 0);

    // It goes whole where there is nothing to differ from, and where a difference would not be smaller.
    let difference = |base| depot.object_as_difference(crate::content_hash(&text), base).unwrap();
    let whole = depot.object(crate::content_hash(&text)).unwrap();
    assert_eq!(difference(crate::content_hash(b"never built here")), whole);
    assert_eq!(difference(crate::content_hash(b"#!/bin/sh\n")), whole);
}

#[test]
fn a_release_is_found_by_what_people_call_it() {
    let project = Project::new(&[("a", Node::File(b"1"))]);
    project.git(&["tag", "v1"]);
    let first = build_at(&project, &service(&[]), None, 0).unwrap();
    project.commit("second", &[("a", Node::File(b"2"))]);
    project.git(&["tag", "v2"]);
    let second = build_at(&project, &service(&[]), None, 1).unwrap();
    // The same commit and label, other steps.
    let third = build_at(&project, &service(&["true"]), None, 2).unwrap();
    let depot = project.depot();
    let web = "web".parse().unwrap();
    assert_eq!(depot.releases().unwrap(), [third.clone(), second.clone(), first.clone()]);

    let id = second.id.to_string();
    for (text, expected) in [
        ("latest", &third),
        ("v1", &first),
        (&id[..8], &second),
        (&id, &second),
        (&first.commit[..7], &first),
    ] {
        assert_eq!(depot.find(&web, text).unwrap(), *expected, "{text}");
    }
    for text in ["v2", &second.commit[..10]] {
        let error = depot.find(&web, text).unwrap_err();
        let FindError::Ambiguous { candidates, .. } = &error else { panic!("{error}") };
        assert_eq!(*candidates, [third.clone(), second.clone()], "newest first");
        assert!(error.to_string().contains(&second.id.short()), "{error}");
    }
    for text in ["v3", "", &id[..3], &id.to_uppercase()] {
        let error = depot.find(&web, text).unwrap_err();
        assert!(matches!(error, FindError::Unknown { .. }), "{text}: {error}");
        assert!(error.to_string().contains(&first.id.short()), "{error}");
    }
    let error = depot.find(&"api".parse().unwrap(), "latest").unwrap_err().to_string();
    assert!(error.contains("none was built yet"), "{error}");
}

#[test]
fn pruning_removes_releases_and_what_only_they_needed() {
    // The two of the first release lie in one pack, of which little is needed by the second.
    let own = noise(1, 1_000);
    let project = Project::new(&[("both", Node::File(b"both")), ("own", Node::File(&own))]);
    let first = build_at(&project, &service(&["echo log"]), None, 0).unwrap();
    let large = noise(3, 3 << 20);
    project.commit("second", &[("own", Node::File(b"2")), ("large", Node::File(&large))]);
    let second = build_at(&project, &service(&[]), None, 1).unwrap();
    let depot = project.depot();
    assert_eq!(depot.prune(&BTreeSet::from([first.id, second.id])).unwrap(), BTreeSet::new());
    assert_eq!(depot.prune(&BTreeSet::from([second.id])).unwrap(), BTreeSet::from([first.id]));
    assert_eq!(depot.releases().unwrap(), std::slice::from_ref(&second));
    assert!(matches!(depot.manifest(first.id), Err(DepotError::NoRelease { .. })));
    assert!(!depot.log(first.id).exists() && depot.log(second.id).exists());
    assert!(matches!(depot.object(crate::content_hash(&own)), Err(DepotError::ObjectMissing { .. })));
    assert_eq!(depot.object(crate::content_hash(b"both")).unwrap().data, b"both");
    let host = HostDepot::open(&project.directory.path().join("srv/web")).unwrap();
    assert!(send(&depot, &second, &host) > 0, "everything that is left is whole");
    assert_eq!(build_at(&project, &service(&["echo log"]), Some("HEAD~1"), 2).unwrap().id, first.id);
}

#[test]
fn a_damaged_object_is_found_and_built_again() {
    let project = Project::new(&[("a", Node::File(b"right"))]);
    let release = build_at(&project, &service(&[]), None, 0).unwrap();
    let depot = project.depot();
    let hash = crate::content_hash(b"right");
    let pack = || depot.pack_path(depot.index().unwrap().packs[0].name);
    let damage = || {
        let path = pack();
        let mut data = fs::read(&path).unwrap();
        *data.last_mut().unwrap() ^= 1;
        fs::remove_file(&path).unwrap();
        fs::write(&path, data).unwrap();
    };
    damage();
    assert!(matches!(depot.object(hash), Err(DepotError::ObjectDamaged { .. })));
    assert!(matches!(depot.object(hash), Err(DepotError::ObjectMissing { .. })));
    build_at(&project, &service(&[]), None, 1).unwrap();
    assert_eq!(depot.object(hash).unwrap().data, b"right");
    damage();
    assert_eq!(build_at(&project, &service(&[]), None, 2).unwrap(), release);
    assert_eq!(depot.object(hash).unwrap().data, b"right", "a build does not trust what it finds");
}

#[test]
fn builds_at_the_same_time_do_not_disturb_each_other() {
    let project = Project::new(&[("a", Node::File(&noise(1, 2 << 20))), ("b", Node::File(b"b"))]);
    let ids: Vec<ReleaseId> = std::thread::scope(|scope| {
        let builds: Vec<_> = (0..4)
            .map(|n| {
                let project = &project;
                let step = format!("echo {} > c", n % 2);
                scope.spawn(move || build_at(project, &service(&[&step]), None, n).unwrap().id)
            })
            .collect();
        builds.into_iter().map(|build| build.join().unwrap()).collect()
    });
    assert_eq!((ids[0], ids[1]), (ids[2], ids[3]));
    let depot = project.depot();
    assert_eq!(depot.releases().unwrap().len(), 2);
    let host = HostDepot::open(&project.directory.path().join("srv/web")).unwrap();
    for release in depot.releases().unwrap() {
        send(&depot, &release, &host);
    }
}
