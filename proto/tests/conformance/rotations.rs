//! Chains of trust files, by which root keys they name and who signed them.

use super::*;
use proto::dsse::PayloadType;
use proto::trust::RootKeys;

/// A trust file: the root keys that it names, how many must sign, who did.
type Step = (&'static [u8], usize, &'static [u8]);

/// Well signed from the first to the last.
const GOOD: [(&str, &[Step]); 9] = [
    ("a key for another", &[(&[1], 1, &[1]), (&[2], 1, &[2, 1]), (&[2], 1, &[2])]),
    ("strangers sign as well", &[(&[1], 1, &[3, 1, 4]), (&[2], 1, &[3, 2, 1, 4]), (&[2], 1, &[3, 2, 4])]),
    (
        "any three of five",
        &[
            (&[5, 6, 7, 8, 9], 3, &[5, 7, 9]),
            (&[5, 6, 7, 8, 9], 3, &[5, 9, 6]),
            (&[5, 6, 7, 8, 9], 3, &[5, 6, 8]),
            (&[5, 6, 7, 8, 9], 3, &[8, 7, 6]),
        ],
    ),
    ("one of five", &[(&[5, 6, 7, 8, 9], 3, &[5, 7, 9]), (&[5, 6, 8, 9, 10], 3, &[5, 9, 6])]),
    (
        "one of five, by old and new",
        &[
            (&[5, 6, 7, 8, 9], 3, &[5, 7, 9]),
            (&[5, 6, 8, 9, 10], 3, &[5, 7, 9, 10]),
            (&[5, 6, 8, 9, 10], 3, &[5, 9, 10]),
        ],
    ),
    (
        "all five",
        &[
            (&[5, 6, 7, 8, 9], 3, &[5, 7, 9]),
            (&[10, 12, 13, 14, 15], 3, &[5, 7, 9, 10, 12, 13]),
            (&[10, 12, 13, 14, 15], 3, &[10, 12, 13]),
        ],
    ),
    ("two where one was enough", &[(&[1, 2, 3], 1, &[1]), (&[1, 2, 3], 2, &[1, 2])]),
    ("one where two were wanted", &[(&[1, 2, 3], 2, &[1, 2]), (&[1, 2, 3], 1, &[1, 2]), (&[1, 2, 3], 1, &[1])]),
    ("a second key, both wanted", &[(&[1], 1, &[1]), (&[1, 2], 2, &[1, 2])]),
];

/// The last one is not signed by enough.
const BAD: [(&str, &[Step]); 6] = [
    ("not by the old key", &[(&[1], 1, &[1]), (&[2], 1, &[2, 3, 4])]),
    ("not by the new key", &[(&[1], 1, &[1]), (&[2], 1, &[1, 3, 4])]),
    ("not by three of the new five", &[(&[5, 6, 7, 8, 9], 3, &[5, 7, 9]), (&[5, 6, 8, 9, 10], 3, &[5, 7, 9])]),
    ("not by three of the old five", &[(&[5, 6, 7, 8, 9], 3, &[5, 7, 9]), (&[5, 6, 8, 9, 10], 3, &[5, 9, 10])]),
    ("by one where two are wanted now", &[(&[1, 2, 3], 1, &[1]), (&[1, 2, 3], 2, &[2])]),
    ("by one where two were wanted", &[(&[1, 2, 3], 2, &[1, 2]), (&[1, 2, 3], 1, &[1])]),
];

/// A headquarters whose first trust file is this one, and a device that pinned its keys.
fn begun(first: Step) -> (Repo, Client) {
    let mut repo = Repo::new();
    repo.trust.version = 0;
    follow(&mut repo, first);
    (repo, Client::enrolled(roots_of(first)))
}

fn roots_of((keys, threshold, _): Step) -> RootKeys {
    roots(threshold, keys)
}

/// Headquarters publishes a step, and a list.
fn follow(repo: &mut Repo, step: Step) {
    repo.root_signers = step.2.to_vec();
    repo.put_trust(|t| t.root = roots_of(step));
    repo.put_list(|_| ());
}

#[tokio::test]
async fn root_keys_change_as_the_old_and_the_new_ones_sign() {
    for (case, steps) in GOOD {
        let (mut repo, awake) = begun(steps[0]);
        awake.takes(case, &repo).await;
        for step in &steps[1..] {
            follow(&mut repo, *step);
            awake.takes(case, &repo).await;
        }
        // One that slept through all walks them at once.
        let asleep = Client::enrolled(roots_of(steps[0]));
        asleep.takes(case, &repo).await;
        assert_eq!(asleep.device().lock().unwrap().trust(), awake.device().lock().unwrap().trust(), "{case}");
    }
}

#[tokio::test]
async fn root_keys_do_not_change_when_too_few_sign() {
    for (case, steps) in BAD {
        let (mut repo, client) = begun(steps[0]);
        client.takes(case, &repo).await;
        let last = *steps.last().unwrap();
        repo.forge_trust(&repo.trust_by(last.2, |t| t.root = roots_of(last)));
        // A new device has walked as far by its first look.
        let new = Client::enrolled(roots_of(steps[0]));
        assert_eq!(new.refresh(&repo).await, trust_refused(2, "BAD_SIGNATURE"), "{case}");
        assert_eq!(new.kept(), (1, None), "{case}");
        let kept = client.kept();
        client.refuses(case, &mut repo, trust_refused(2, "BAD_SIGNATURE"), kept).await;
        // The same file, signed by all.
        let all: Vec<u8> = (1..=10).collect();
        repo.root_signers = all;
        repo.put_trust(|t| t.root = roots_of(last));
        client.recovers(case, &mut repo).await;
        new.takes(case, &repo).await;
    }
}

/// Publishers by their keys in the trust file, the list by whoever signed it; whether it is accepted. TUF's roles have
/// thresholds; here any one publisher is enough, since one machine signs the lists.
#[tokio::test]
async fn a_list_is_good_by_any_one_publisher_of_the_newest_trust_file() {
    let cases: [(&str, &[u8], &[u8], bool); 10] = [
        ("another key", &[2], &[2], true),
        ("strangers sign as well", &[1], &[3, 1, 4], true),
        ("not by the new key", &[2], &[1, 3, 4], false),
        ("two of three are known", &[5, 6, 8, 9, 10], &[5, 7, 9], true),
        ("by two", &[5, 6, 8, 9, 10], &[5, 9], true),
        ("by one of five", &[5, 6, 7, 8, 9], &[7], true),
        ("by the last of five", &[5, 6, 7, 8, 9], &[9], true),
        ("by three of five", &[5, 6, 7, 8, 9], &[5, 6, 8], true),
        ("by nobody", &[5, 6, 7, 8, 9], &[], false),
        ("by strangers alone", &[5, 6, 7, 8, 9], &[1, 2, 3, 4], false),
    ];
    for (case, publishers, signers, good) in cases {
        let mut repo = Repo::new();
        let client = Client::of(&repo);
        client.takes(case, &repo).await;
        repo.put_trust(|t| t.publishers = publishers.iter().map(|n| publisher(*n)).collect());
        let list = repo.next_list(|_| ()).to_payload().unwrap();
        repo.forge_list(&repo.sealed(PayloadType::Manifest, &list, signers));
        let (outcome, kept) =
            if good { (Outcome::News, (2, Some(2))) } else { (list_refused("BAD_SIGNATURE"), (2, Some(1))) };
        assert_eq!(client.refresh(&repo).await, outcome, "{case}");
        assert_eq!(client.kept(), kept, "{case}");
        repo.signer = publishers[0];
        repo.put_list(|m| m.serial = 3);
        client.takes(case, &repo).await;
    }
}
