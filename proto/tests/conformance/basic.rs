//! What is asked for, in which order, and what is kept of it.

use super::*;
use proto::device::{Device, DeviceError};
use proto::dsse::{Envelope, PayloadType};
use proto::fetch::FetchErrorKind;
use proto::follow::lock;
use proto::layout::ObjectName;
use proto::trust::EnrolCode;
use serde_json::{Value, json};

#[tokio::test]
async fn a_new_device_asks_for_its_list_and_for_the_trust_files_one_by_one() {
    let mut repo = Repo::new();
    repo.rotate(12);
    let client = Client::of(&repo);
    let (mut follower, device) = (client.follower(&[&repo.server]), client.device());
    assert_eq!(client.look(&mut follower, &device).await, Outcome::News);
    let first = ["stores/0421/manifest.json", "trust.json", "trust/0000000001.json", "trust/0000000002.json"];
    assert_eq!(repo.server.asked(), first);
    // While it runs it asks whether the list has changed; after a start it looks for new trust files, too.
    assert_eq!(client.look(&mut follower, &device).await, Outcome::Same);
    assert_eq!(repo.server.asked(), first[..1]);
    drop(device);
    assert_eq!(client.refresh(&repo).await, Outcome::Same);
    assert_eq!(repo.server.asked(), first[..2]);
    client.recovers("a later list", &mut repo).await;
}

#[tokio::test]
async fn what_is_kept_is_what_was_published() {
    let mut repo = Repo::new();
    repo.add_pack("price@zone-east", None, 1, b"rows");
    repo.put_list(|_| ());
    let client = Client::of(&repo);
    client.takes("published", &repo).await;
    let device = client.device();
    let device = lock(&device);
    assert_eq!(device.trust().trust(), Some(&repo.trust));
    let list = device.manifest().unwrap();
    assert_eq!(list.get(), &repo.list);
    assert_eq!(list.envelope(), repo.object(&list_name()));
    assert_eq!((device.seen().epoch, device.seen().floor), (1, Some(t0())));
}

#[tokio::test]
async fn no_pack_is_known_before_a_list_was_accepted() {
    let mut repo = Repo::new();
    let name = repo.add_pack("price@zone-east", None, 1, b"rows");
    let client = Client::of(&repo);
    // The pack lies in the bucket, and the list of today does not name it.
    assert!(lock(&client.device()).manifest().is_none());
    assert_eq!(client.refresh(&repo).await, Outcome::News);
    assert!(lock(&client.device()).manifest().unwrap().instance(&name.instance.stream).is_none());
    assert_eq!(repo.server.asked_packs(), [""; 0]);
    client.recovers("it names it now", &mut repo).await;
    assert_eq!(client.download(&repo, &name).await.unwrap(), b"rows");
}

#[tokio::test]
async fn a_code_that_is_damaged_enrols_nobody() {
    let repo = Repo::new();
    let client = Client::of(&repo);
    let good = serde_json::to_value(client.code(repo.trust.root.clone())).unwrap();
    let text = |code: &Value| {
        use base64::Engine as _;
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(serde_json::to_vec(code).unwrap())
    };
    assert!(EnrolCode::from_text(&text(&good), t0()).is_ok());
    for field in ["format", "id", "seed", "roots", "trust_version", "expires_at"] {
        let mut code = good.clone();
        code.as_object_mut().unwrap().remove(field);
        assert_eq!(EnrolCode::from_text(&text(&code), t0()).unwrap_err().code(), "BAD_CODE", "{field}");
    }
    for (field, value) in [
        ("threshold", json!(2)),
        ("threshold", json!(0)),
        ("keys", json!([])),
        ("keys", json!(["0100000000000000000000000000000000000000000000000000000000000000"])),
    ] {
        let mut code = good.clone();
        code["roots"][field] = value;
        assert_eq!(EnrolCode::from_text(&text(&code), t0()).unwrap_err().code(), "BAD_CODE", "{field}");
    }
    let nobody = tempfile::tempdir().unwrap();
    let opened = Device::open(nobody.path(), &client.id, &client.limits);
    assert!(matches!(opened, Err(DeviceError::NotEnrolled(_))), "{opened:?}");
    assert_eq!(repo.server.asked(), [""; 0]);
}

#[tokio::test]
async fn the_first_trust_file_must_be_signed_by_the_pinned_roots() {
    for signers in [&[][..], &[66], &[11]] {
        let mut repo = Repo::new();
        let client = Client::of(&repo);
        // All of an attacker's own but the name.
        let trust = repo.trust_by(signers, |t| {
            t.version = 1;
            t.root = roots(1, &[66]);
            t.publishers = vec![publisher(67)];
        });
        repo.server.put(&trust_name(1), &trust);
        repo.forge_list(&repo.list_by(&[67], |_| ()));
        let refused = trust_refused(1, "BAD_SIGNATURE");
        client.refuses(&format!("by {signers:?}"), &mut repo, refused, (0, None)).await;
    }
}

#[tokio::test]
async fn what_is_not_signed_is_refused_and_what_came_before_it_is_kept() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    repo.forge_trust(&repo.trust_by(&[], |_| ()));
    repo.forge_list(&repo.list_by(&[11], |_| ()));
    client.refuses("trust", &mut repo, trust_refused(2, "BAD_SIGNATURE"), (1, Some(1))).await;
    repo.rotate(12);
    repo.forge_list(&repo.list_by(&[], |_| ()));
    client.refuses("list", &mut repo, list_refused("BAD_SIGNATURE"), (2, Some(2))).await;
}

#[tokio::test]
async fn a_trust_file_under_another_number_is_refused() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    for (case, version) in [("the next but one", 3), ("the old one", 1), ("none", 0), ("the last", u64::MAX)] {
        let bytes = repo.trust_by(&[1], |t| t.version = version);
        repo.server.put(&trust_name(2), &bytes);
        repo.server.put(&ObjectName::Trust, &repo.trust_by(&[1], |_| ()));
        let kept = client.kept();
        client.refuses(case, &mut repo, trust_refused(2, "BAD_TRUST"), kept).await;
    }
    // `trust.json` only says how far to walk: what it says itself is nobody's word.
    let other = repo.trust_by(&[66], |t| t.publishers = vec![publisher(66)]);
    repo.rotate(12);
    repo.server.put(&ObjectName::Trust, &other);
    client.takes("a pointer that lies", &repo).await;
}

/// A list's serial stands in no name. One that was heard of is asked for, and what comes is judged by itself.
#[tokio::test]
async fn a_serial_that_was_heard_of_is_a_hint() {
    let repo = Repo::new();
    let client = Client::of(&repo);
    let (mut follower, device) = (client.follower(&[&repo.server]), client.device());
    let news = follower.refresh(&device, &client.clock, &client.limits, Some(99)).await;
    assert_eq!(Outcome::of(news), Outcome::News);
    assert_eq!(repo.server.asked()[0], "stores/0421/manifest.json?serial=99");
    drop(device);
    assert_eq!(client.kept(), (1, Some(1)));
}

#[tokio::test]
async fn a_serial_that_comes_again_with_other_content_is_refused() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    let relay = Some(key(3).public());
    repo.forge_list(&repo.list_by(&[11], |m| (m.serial, m.relay) = (1, relay)));
    let kept = (1, Some(1));
    client.refuses("other content", &mut repo, list_refused("SAME_SERIAL_OTHER_BYTES"), kept).await;
}

#[tokio::test]
async fn a_list_is_kept_byte_for_byte() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    let bytes = [b" \n", repo.object(&list_name()), b" "].concat();
    repo.forge_list(&bytes);
    client.takes("odd blanks", &repo).await;
    assert_eq!(lock(&client.device()).manifest().unwrap().envelope(), bytes);
    client.recovers("as usual", &mut repo).await;
}

#[tokio::test]
async fn fields_of_later_builds_are_read_over() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    repo.add_pack("price@zone-east", None, 1, b"rows");
    let mut trust = serde_json::to_value(repo.next_trust(|t| t.publishers.push(publisher(12)))).unwrap();
    let mut list = serde_json::to_value(repo.next_list(|_| ())).unwrap();
    for at in ["", "/root", "/publishers/0"] {
        trust.pointer_mut(at).unwrap()["later"] = json!({"a": [1, null]});
    }
    for at in ["", "/streams/price", "/streams/price/packs/0"] {
        list.pointer_mut(at).unwrap()["later"] = json!({"a": [1, null]});
    }
    repo.forge_trust(&repo.sealed(PayloadType::Trust, &serde_json::to_vec(&trust).unwrap(), &[1]));
    repo.forge_list(&repo.sealed(PayloadType::Manifest, &serde_json::to_vec(&list).unwrap(), &[12]));
    assert_eq!(client.refresh(&repo).await, Outcome::News);
    assert_eq!(client.kept(), (2, Some(2)));
    // Headquarters goes on from there.
    repo.put_trust(|t| t.publishers.push(publisher(12)));
    repo.put_list(|m| m.serial = 3);
    client.takes("the next", &repo).await;
}

/// The envelope with its signatures changed.
pub fn resigned(envelope: &[u8], change: impl FnOnce(&mut Envelope)) -> Vec<u8> {
    let mut envelope: Envelope = serde_json::from_slice(envelope).unwrap();
    change(&mut envelope);
    serde_json::to_vec(&envelope).unwrap()
}

#[tokio::test]
async fn a_key_id_that_misleads_moves_nothing() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    repo.rotate(12);
    for (n, id) in [key(11).public().id(), String::new(), "md5".into(), "x".repeat(1000)].into_iter().enumerate() {
        repo.put_list(|_| ());
        let list = resigned(repo.object(&list_name()), |e| e.signatures[0].keyid = id.clone());
        let mut list: Value = serde_json::from_slice(&list).unwrap();
        list["signatures"][0]["keyid_hash_algorithms"] = json!("md5");
        repo.forge_list(&serde_json::to_vec(&list).unwrap());
        client.takes(&format!("id {n}"), &repo).await;
    }
    // Nor does a stranger's signature become good by a good id.
    let good = key(12).public().id();
    repo.forge_list(&resigned(&repo.list_by(&[66], |_| ()), |e| e.signatures[0].keyid = good));
    client.refuses("another's id", &mut repo, list_refused("BAD_SIGNATURE"), (2, Some(6))).await;
}

#[tokio::test]
async fn a_trust_file_that_is_not_there_is_waited_for() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    repo.rotate(12);
    for missing in [trust_name(2), ObjectName::Trust] {
        repo.restore();
        repo.server.remove(&missing);
        let failed = Outcome::Failed(missing.to_string(), FetchErrorKind::NotFound);
        assert_eq!(client.refresh(&repo).await, failed);
        assert_eq!(client.kept(), (1, Some(1)));
    }
    client.recovers("it is there", &mut repo).await;
}

#[tokio::test]
async fn a_pack_that_is_not_there_is_waited_for_and_the_others_are_taken() {
    let mut repo = Repo::new();
    let full = repo.add_pack("price@zone-east", None, 1, b"all rows");
    let delta = repo.add_pack("price@zone-east", Some(1), 2, b"a change");
    repo.put_list(|_| ());
    let client = Client::of(&repo);
    client.takes("the list", &repo).await;
    repo.server.remove(&delta.clone().into());
    assert_eq!(client.download(&repo, &delta).await, Err(FetchErrorKind::NotFound));
    assert_eq!(client.download(&repo, &full).await.unwrap(), b"all rows");
    assert_eq!(client.kept(), (1, Some(2)));
    client.recovers("it is there", &mut repo).await;
    assert_eq!(client.download(&repo, &delta).await.unwrap(), b"a change");
}

#[tokio::test]
async fn a_list_that_is_gone_leaves_the_kept_one() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    repo.server.remove(&list_name());
    let failed = Outcome::Failed(list_name().to_string(), FetchErrorKind::NotFound);
    client.refuses("gone", &mut repo, failed, (1, Some(1))).await;
}

#[tokio::test]
async fn what_was_signed_as_something_else_is_no_list_and_no_trust_file() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    // One key for all, so that only the type tells.
    repo.signer = 1;
    repo.put_trust(|t| t.publishers = vec![publisher(1)]);
    repo.put_list(|_| ());
    client.takes("first", &repo).await;
    let list = repo.next_list(|_| ()).to_payload().unwrap();
    for other in [PayloadType::Trust, PayloadType::Heartbeat, PayloadType::Receipt] {
        repo.forge_list(&repo.sealed(other, &list, &[1]));
        let kept = client.kept();
        client.refuses(other.as_str(), &mut repo, list_refused("OTHER_PAYLOAD_TYPE"), kept).await;
    }
    // The envelope says that it is a list, and its signature was made for a heartbeat.
    let list = repo.next_list(|_| ()).to_payload().unwrap();
    let bent = resigned(&repo.sealed(PayloadType::Heartbeat, &list, &[1]), |e| {
        e.payload_type = PayloadType::Manifest.as_str().to_owned();
    });
    repo.forge_list(&bent);
    let kept = client.kept();
    client.refuses("relabelled", &mut repo, list_refused("BAD_SIGNATURE"), kept).await;
    // A list with all that a trust file has, and the other way round.
    let trust = serde_json::to_value(repo.next_trust(|_| ())).unwrap();
    let mut both = serde_json::to_value(repo.next_list(|_| ())).unwrap();
    both.as_object_mut().unwrap().extend(trust.as_object().unwrap().clone());
    let both = serde_json::to_vec(&both).unwrap();
    repo.forge_trust(&repo.sealed(PayloadType::Manifest, &both, &[1]));
    let kept = client.kept();
    client.refuses("a list as trust file", &mut repo, trust_refused(3, "OTHER_PAYLOAD_TYPE"), kept).await;
    repo.forge_list(&repo.sealed(PayloadType::Trust, &both, &[1]));
    let kept = client.kept();
    client.refuses("a trust file as list", &mut repo, list_refused("OTHER_PAYLOAD_TYPE"), kept).await;
}

#[tokio::test]
async fn the_time_is_the_one_that_a_case_says() {
    let repo = Repo::new();
    let client = Client::of(&repo);
    client.clock.advance(30 * DAY);
    assert_eq!(client.refresh(&repo).await, list_refused("EXPIRED"));
    client.clock.set(t0());
    client.takes("in time", &repo).await;
}

#[tokio::test]
async fn the_headquarters_of_these_cases_is_sound() {
    let mut repo = Repo::new();
    let read = |repo: &Repo, name: &ObjectName| -> Value { proto::dsse::peek(repo.object(name), 1 << 20).unwrap() };
    assert_eq!((repo.trust.version, repo.list.serial), (1, 1));
    assert_eq!(read(&repo, &ObjectName::Trust), read(&repo, &trust_name(1)));
    let name = repo.add_pack("price@zone-east", None, 7, b"rows");
    let end = t0();
    repo.put_list(|m| m.expires_at = end);
    let list = read(&repo, &list_name());
    assert_eq!((&list["serial"], &list["expires_at"]), (&json!(2), &json!(end.to_string())));
    let pack = &list["streams"]["price"]["packs"][0];
    let bytes = repo.object(&name.into());
    assert_eq!(pack["bytes"], bytes.len());
    assert_eq!(pack["sha256"], proto::digest::Sha256::of(bytes).to_string());
}
