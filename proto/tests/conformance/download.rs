//! Packs: TUF's target files.

use super::*;
use proto::dsse::PayloadType;
use proto::fetch::FetchErrorKind;
use proto::layout::PackName;
use serde_json::{Value, json};

/// A device that has accepted a list with packs of three audiences.
async fn supplied() -> (Repo, Client, [PackName; 3]) {
    let mut repo = Repo::new();
    let names = [("catalog@all", "all"), ("price@zone-east", "east"), ("staff@store-0421", "staff")]
        .map(|(instance, content)| repo.add_pack(instance, None, 1, content.as_bytes()));
    repo.put_list(|_| ());
    let client = Client::of(&repo);
    client.takes("the list", &repo).await;
    repo.server.asked();
    (repo, client, names)
}

#[tokio::test]
async fn a_listed_pack_is_downloaded() {
    let (mut repo, client, [all, ..]) = supplied().await;
    assert!(!client.part(&all).exists(), "a list alone brings none");
    assert_eq!(client.download(&repo, &all).await.unwrap(), b"all");
    assert_eq!(repo.server.asked(), ["packs/catalog@all/0000000001.full.pack"]);
    client.recovers("the next list", &mut repo).await;
}

#[tokio::test]
async fn packs_lie_in_folders_by_stream_and_audience() {
    let (repo, client, names) = supplied().await;
    for (name, content) in names.iter().zip(["all", "east", "staff"]) {
        assert_eq!(client.download(&repo, name).await.unwrap(), content.as_bytes());
    }
    let folders = ["catalog@all", "price@zone-east", "staff@store-0421"];
    assert_eq!(repo.server.asked(), folders.map(|f| format!("packs/{f}/0000000001.full.pack")));
}

#[tokio::test]
async fn a_pack_that_was_replaced_is_refused_and_the_one_that_is_there_stays() {
    let (mut repo, client, [all, east, _]) = supplied().await;
    assert_eq!(client.download(&repo, &all).await.unwrap(), b"all");
    for name in [&all, &east] {
        repo.server.put(&name.clone().into(), b"evil");
    }
    assert_eq!(client.download(&repo, &all).await.unwrap(), b"all");
    assert_eq!(client.download(&repo, &east).await, Err(FetchErrorKind::WrongHash));
    assert!(!client.part(&east).exists());
    client.recovers("honest again", &mut repo).await;
    assert_eq!(client.download(&repo, &east).await.unwrap(), b"east");
}

#[tokio::test]
async fn a_pack_that_is_not_the_listed_one_is_refused() {
    let (mut repo, client, [_, east, _]) = supplied().await;
    for (served, kind) in [
        (&b"EAST"[..], FetchErrorKind::WrongHash),
        (b"east ", FetchErrorKind::TooLong),
        (b"eas", FetchErrorKind::TooShort),
        (b"", FetchErrorKind::TooShort),
        (b"<html>log in</html>", FetchErrorKind::NotAnObject),
    ] {
        repo.server.put(&east.clone().into(), served);
        for _ in 0..2 {
            assert_eq!(client.download(&repo, &east).await, Err(kind), "{served:?}");
            // A login page says nothing about the part.
            assert!(!client.part(&east).exists() || kind == FetchErrorKind::NotAnObject, "{served:?}");
        }
    }
    // Another pack of the same list, well signed for.
    repo.server.put(&east.clone().into(), b"all");
    assert_eq!(client.download(&repo, &east).await, Err(FetchErrorKind::TooShort));
    client.recovers("honest again", &mut repo).await;
    assert_eq!(client.download(&repo, &east).await.unwrap(), b"east");
}

/// The bucket is right, and what the list says of it is wrong.
#[tokio::test]
async fn a_list_that_misnames_a_pack_brings_none_and_the_next_mends_it() {
    let (mut repo, client, [_, east, staff]) = supplied().await;
    repo.put_list(|m| {
        let pack = &mut m.streams.get_mut(&east.instance.stream).unwrap().packs[0];
        pack.sha256 = "0".repeat(64).parse().unwrap();
    });
    client.takes("the list is HQ's word", &repo).await;
    assert_eq!(client.download(&repo, &east).await, Err(FetchErrorKind::WrongHash));
    assert_eq!(client.download(&repo, &staff).await.unwrap(), b"staff");
    repo.list.streams.remove(&east.instance.stream);
    let next = repo.add_pack("price@zone-east", None, 2, b"east, again");
    client.recovers("a higher version", &mut repo).await;
    assert_eq!(client.download(&repo, &next).await.unwrap(), b"east, again");
}

#[tokio::test]
async fn of_many_changes_each_that_is_looked_at_is_taken_as_it_was_signed() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    for n in 1..=11 {
        repo.list.streams.clear();
        let content = format!("state {n}").into_bytes();
        let name = repo.add_pack("price@zone-east", None, n, &content);
        repo.put_list(|_| ());
        if n % 5 != 1 {
            continue;
        }
        client.takes("seen", &repo).await;
        assert_eq!(client.download(&repo, &name).await.unwrap(), content);
        // The same name, other bytes: what is there stays, a device without it refuses.
        repo.server.put(&name.clone().into(), format!("evil! {n}").as_bytes());
        assert_eq!(client.download(&repo, &name).await.unwrap(), content);
        std::fs::remove_file(client.part(&name)).unwrap();
        assert!(client.download(&repo, &name).await.is_err());
        assert!(!client.part(&name).exists());
    }
}

/// The next list of a device that has accepted one, as JSON, its pack of prices said otherwise.
fn list_with(repo: &Repo, change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut list = serde_json::to_value(repo.next_list(|_| ())).unwrap();
    change(&mut list["streams"]["price"]["packs"][0]);
    repo.sealed(PayloadType::Manifest, &serde_json::to_vec(&list).unwrap(), &[11])
}

#[tokio::test]
async fn packs_are_proved_by_sha_256_and_by_nothing_else() {
    let (mut repo, client, [_, east, _]) = supplied().await;
    // A second hash beside it proves nothing, nor does it hinder.
    repo.forge_list(&list_with(&repo, |p| p["sha512"] = json!("0".repeat(128))));
    assert_eq!(client.refresh(&repo).await, Outcome::News);
    assert_eq!(client.download(&repo, &east).await.unwrap(), b"east");
    repo.put_list(|m| m.serial += 1);
    let sha256 = json!(proto::digest::Sha256::of(b"east").to_string());
    for (case, field, value) in [
        ("SHA-512 alone", "sha512", json!("0".repeat(128))),
        ("an unknown one", "unknown-hash", sha256.clone()),
        ("too short", "sha256", json!("00")),
        ("upper case", "sha256", json!(sha256.as_str().unwrap().to_uppercase())),
        ("no text", "sha256", json!(0)),
        ("none", "sha256", Value::Null),
    ] {
        repo.forge_list(&list_with(&repo, |p| {
            p.as_object_mut().unwrap().remove("sha256");
            p[field] = value;
        }));
        assert_eq!(client.refresh(&repo).await, Outcome::News, "{case}");
        assert_eq!(client.unread(), ["price"], "{case}");
        // The forged one took the next number.
        repo.put_list(|m| m.serial += 1);
        client.takes(case, &repo).await;
        assert_eq!(client.unread(), [""; 0], "{case}");
    }
}

#[tokio::test]
async fn a_pack_that_is_there_is_not_fetched_again() {
    let (repo, client, [_, east, _]) = supplied().await;
    assert_eq!(client.download(&repo, &east).await.unwrap(), b"east");
    assert_eq!(repo.server.asked_packs(), ["1.full.pack"]);
    assert_eq!(client.download(&repo, &east).await.unwrap(), b"east");
    assert_eq!(repo.server.asked_packs(), [""; 0]);
    // It is hashed again for that: rot is no copy.
    std::fs::write(client.part(&east), b"EAST").unwrap();
    assert_eq!(client.download(&repo, &east).await.unwrap(), b"east");
    assert_eq!(repo.server.asked_packs(), ["1.full.pack"]);
}
