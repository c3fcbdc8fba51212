//! Keys, signatures, thresholds. Root keys have a threshold; of publishers' keys one is enough.

use super::basic::resigned;
use super::*;
use proto::dsse::{PayloadType, Signature};
use serde_json::{Value, json};

/// Trust file 2 wants two of the roots 1, 2 and 3.
async fn of_three_roots() -> (Repo, Client) {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    repo.root_signers = vec![1, 2, 3];
    repo.put_trust(|t| t.root = roots(3, &[1, 2, 3]));
    repo.put_list(|_| ());
    client.takes("three roots", &repo).await;
    (repo, client)
}

#[tokio::test]
async fn a_trust_file_with_too_few_signatures_is_refused() {
    let (mut repo, client) = of_three_roots().await;
    for signers in [&[][..], &[1], &[1, 2], &[2, 3], &[1, 3, 4], &[1, 3, 3, 3]] {
        repo.forge_trust(&repo.trust_by(signers, |_| ()));
        let kept = client.kept();
        client.refuses(&format!("{signers:?}"), &mut repo, trust_refused(3, "BAD_SIGNATURE"), kept).await;
    }
    repo.put_trust(|_| ());
    client.recovers("all three", &mut repo).await;
}

#[tokio::test]
async fn a_threshold_that_its_keys_cannot_meet_is_refused() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    for (case, root) in [
        ("6 of 5", roots(6, &[1, 2, 3, 4, 5])),
        ("0 of 1", roots(0, &[1])),
        ("1 of none", roots(1, &[])),
        ("6 of one key, nine times", roots(6, &[1; 9])),
        ("2 of one key, twice", roots(2, &[1, 1])),
    ] {
        repo.forge_trust(&repo.trust_by(&[1, 2, 3, 4, 5], |t| t.root = root));
        let kept = client.kept();
        client.refuses(case, &mut repo, trust_refused(2, "BAD_TRUST"), kept).await;
    }
}

#[tokio::test]
async fn one_key_counts_once_however_often_it_is_listed_or_signs() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    // Two keys, one of them nine times; it signs nine times, under ids of its own.
    repo.root_signers = vec![1, 2];
    let many = [1, 1, 1, 1, 1, 1, 1, 1, 1, 2];
    repo.put_trust(|t| t.root = roots(2, &many));
    repo.put_list(|_| ());
    client.takes("listed more than once", &repo).await;
    let one = resigned(&repo.trust_by(&[1], |_| ()), |e| {
        let sig = e.signatures[0].sig.clone();
        e.signatures.extend((0..8).map(|n| Signature { keyid: format!("id {n}"), sig: sig.clone() }));
    });
    repo.forge_trust(&one);
    let kept = client.kept();
    client.refuses("nine by one", &mut repo, trust_refused(3, "BAD_SIGNATURE"), kept).await;
    repo.put_trust(|_| ());
    client.recovers("one by each", &mut repo).await;
}

/// TUF refuses an envelope that names a key twice. Ids are hints here, and count for nothing.
#[tokio::test]
async fn a_signature_that_stands_twice_helps_and_hinders_nobody() {
    let (mut repo, client) = of_three_roots().await;
    let twice = |bytes: &[u8]| resigned(bytes, |e| e.signatures.push(e.signatures[0].clone()));
    repo.forge_trust(&twice(&repo.trust_by(&[1, 2], |_| ())));
    let kept = client.kept();
    client.refuses("two of three", &mut repo, trust_refused(3, "BAD_SIGNATURE"), kept).await;
    repo.put_trust(|_| ());
    repo.put_list(|_| ());
    repo.server.put(&trust_name(3), &twice(repo.object(&trust_name(3))));
    repo.forge_list(&twice(repo.object(&list_name())));
    client.takes("good ones", &repo).await;
}

#[tokio::test]
async fn keys_of_other_kinds_are_refused_and_ed25519_is_verified() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    let rsa =
        json!({"keytype": "rsa", "scheme": "rsassa-pss-sha256", "keyval": {"public": "-----BEGIN PUBLIC KEY-----"}});
    for (case, other) in [
        ("RSA", rsa),
        ("ECDSA on P-256", json!(format!("04{}", "ab".repeat(64)))),
        ("the same, compressed", json!(format!("02{}", "ab".repeat(32)))),
        ("of small order", json!("0100000000000000000000000000000000000000000000000000000000000000")),
        ("no point", json!("02".to_owned() + &"00".repeat(31))),
        ("upper case", json!(key(2).public().to_string().to_uppercase())),
    ] {
        for list in ["/root/keys/0", "/publishers/0/key"] {
            let mut trust = serde_json::to_value(repo.next_trust(|_| ())).unwrap();
            *trust.pointer_mut(list).unwrap() = other.clone();
            repo.forge_trust(&repo.sealed(PayloadType::Trust, &serde_json::to_vec(&trust).unwrap(), &[1]));
            let kept = client.kept();
            client.refuses(&format!("{case}, {list}"), &mut repo, trust_refused(2, "BAD_TRUST"), kept).await;
        }
    }
    repo.root_signers = vec![1, 2];
    repo.put_trust(|t| t.root = roots(2, &[1, 2]));
    repo.put_list(|_| ());
    client.takes("Ed25519", &repo).await;
    // Signatures that look like some.
    let good = repo.trust_by(&[1, 2], |_| ());
    let other = repo.list_by(&[2], |_| ());
    let of_other: Value = serde_json::from_slice(&other).unwrap();
    for sig in [of_other["signatures"][0]["sig"].as_str().unwrap(), "", "AAAA", "no base64!", &"A".repeat(86)] {
        repo.forge_trust(&resigned(&good, |e| e.signatures[1].sig = sig.to_owned()));
        let kept = client.kept();
        client.refuses(sig, &mut repo, trust_refused(3, "BAD_SIGNATURE"), kept).await;
    }
}

#[tokio::test]
async fn a_bad_signature_beside_enough_good_ones_hinders_nobody() {
    let mut repo = Repo::new();
    let client = Client::of(&repo);
    repo.put_trust(|t| t.publishers.push(publisher(12)));
    let old = signature_of_the_list(&repo);
    for sig in [old.as_str(), "", "no base64!"] {
        repo.put_list(|_| ());
        for first in [true, false] {
            let bad = Signature { keyid: key(12).public().id(), sig: sig.to_owned() };
            let at = |len: usize| if first { 0 } else { len };
            repo.forge_list(&resigned(repo.object(&list_name()), |e| e.signatures.insert(at(e.signatures.len()), bad)));
            if first {
                client.takes(sig, &repo).await;
            } else {
                assert_eq!(client.refresh(&repo).await, Outcome::Same);
            }
        }
    }
}

/// A signature of the list before, by a known key.
fn signature_of_the_list(repo: &Repo) -> String {
    let list: Value = serde_json::from_slice(repo.object(&list_name())).unwrap();
    list["signatures"][0]["sig"].as_str().unwrap().to_owned()
}

/// Names come from lists, and become paths of requests and files.
#[tokio::test]
async fn names_that_play_tricks_are_refused_with_their_list_or_stream() {
    let mut repo = Repo::new();
    repo.add_pack("price@zone-east", None, 1, b"rows");
    repo.put_list(|_| ());
    let client = Client::of(&repo);
    client.takes("first", &repo).await;
    let good = |repo: &Repo| serde_json::to_value(repo.next_list(|_| ())).unwrap();
    let files = || std::fs::read_dir(client.home.path()).unwrap().count();
    let before = files();
    for name in ["?", "#", "/delegated", "../delegated", "", ".", "..", "a/b", "a\\b", "%2e%2e", "Price", "a\0", "é"] {
        let by_name: [fn(&mut Value, &str); 4] = [
            |m, n| m["streams"][n] = m["streams"]["price"].clone(),
            |m, n| m["streams"]["price"]["audience"] = json!(format!("zone-{n}")),
            |m, n| m["streams"]["price"]["digests"][n] = json!("0".repeat(32)),
            |m, n| m["registers"][format!("0421-{n}")] = json!(key(5).public().to_string()),
        ];
        for (n, change) in by_name.into_iter().enumerate() {
            if n == 3 && name == "Price" {
                continue;
            }
            let mut list = good(&repo);
            change(&mut list, name);
            repo.server.asked();
            repo.forge_list(&repo.sealed(PayloadType::Manifest, &serde_json::to_vec(&list).unwrap(), &[11]));
            let kept = client.kept();
            // Of an audience or a table it is the stream's matter alone.
            let (outcome, unread, kept): (_, &[&str], _) = match n {
                1 | 2 => (Outcome::News, &["price"], (1, kept.1.map(|serial| serial + 1))),
                _ => (list_refused("BAD_MANIFEST"), &[], kept),
            };
            assert_eq!(client.refresh(&repo).await, outcome, "{name:?} {n}");
            assert_eq!(repo.server.asked(), ["stores/0421/manifest.json", "trust.json"], "{name:?} {n}");
            assert_eq!((client.kept(), files()), (kept, before), "{name:?} {n}");
            assert_eq!(client.unread(), unread, "{name:?} {n}");
            repo.restore();
            repo.put_list(|m| m.serial += 1);
            client.takes("good names", &repo).await;
        }
    }
}
