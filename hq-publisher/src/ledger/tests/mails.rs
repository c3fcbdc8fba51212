//! The outbox, its two ways, and who waits for whom.

use super::*;

const A_MINUTE: Duration = Duration::from_secs(60);

fn written(id: &str) -> Mail {
    Mail { id: id.into(), subject: "s".into(), body: "b".into(), created_at: t(0), attempts: 0, last_error: None }
}

/// Mails 1, 2 and 3, of a second each.
async fn three(l: &Ledger) {
    for (s, id) in [(0, "1"), (1, "2"), (2, "3")] {
        l.open_episode(id, "text", &written(id), t(s)).await.unwrap();
    }
}

#[tokio::test]
async fn a_server_that_is_away_holds_all_and_a_mail_to_blame_only_itself() {
    on_each_database(async |l| {
        three(&l).await;
        let claim = async |s| {
            let claimed = l.claim_mail(t(s), A_MINUTE, 0, |_| true).await.unwrap();
            claimed.map(|c| (c.mail.id, c.own_fault))
        };
        let taken = Taken::new();
        let failed = |error, own_fault, next| Failed {
            error,
            own_fault,
            holds: !own_fault,
            refused: 0,
            next: t(next),
            taken: &taken,
        };
        assert_eq!(l.mails_held().await.unwrap(), None);
        assert_eq!(claim(10).await, Some(("1".into(), false)));
        l.mail_failed("1", failed("nobody there", false, 100)).await.unwrap();
        assert_eq!((l.mails_held().await.unwrap(), claim(99).await), (Some("nobody there".into()), None));
        assert_eq!(claim(100).await, Some(("1".into(), false)));
        l.mail_failed("1", failed("550", true, 300)).await.unwrap();
        assert_eq!(l.mails_held().await.unwrap(), None, "it holds up nobody");
        assert_eq!(claim(101).await, Some(("2".into(), false)));
        assert_eq!(claim(300).await, Some(("1".into(), true)));
    })
    .await;
}

#[tokio::test]
async fn the_second_way_is_asked_once_a_mail_and_goes_past_one_that_it_refuses() {
    on_each_database(async |l| {
        three(&l).await;
        let untold = async |s| {
            let all = l.untold_mails(t(1), t(s)).await.unwrap();
            all.into_iter().map(|c| (c.mail.id, c.mail.attempts, c.refused, c.own_fault)).collect::<Vec<_>>()
        };
        let (one, two) = (("1".to_owned(), 0, 0, false), ("2".to_owned(), 0, 0, false));
        assert_eq!(untold(10).await, [one, two.clone()], "the third is too young");
        assert!(!l.claim_untold("unknown", t(10), A_MINUTE).await.unwrap());
        assert!(l.claim_untold("1", t(10), A_MINUTE).await.unwrap());
        assert!(!l.claim_untold("1", t(69), A_MINUTE).await.unwrap());
        assert!(untold(69).await.is_empty(), "none before an older one");
        assert!(l.claim_untold("1", t(70), A_MINUTE).await.unwrap());
        l.mail_untold("1", false, 2, t(80)).await.unwrap();
        assert_eq!(untold(80).await, [("1".into(), 1, 2, false), two]);
        l.mail_told("2", t(81)).await.unwrap();
        assert_eq!(untold(81).await, [("1".into(), 1, 2, true)], "what was taken after it says who is to blame");
        l.mail_told("1", t(82)).await.unwrap();
        assert!(untold(82).await.is_empty() && !l.claim_untold("1", t(200), A_MINUTE).await.unwrap());
        assert_eq!(l.unsent_mails().await.unwrap().len(), 3, "the first way goes on");
    })
    .await;
}

#[tokio::test]
async fn what_is_said_now_and_then_is_not_said_again_before() {
    on_each_database(async |l| {
        // The last one is of a clock that was ahead.
        for (now, last, mails) in [(10, 0, 1), (20, 5, 1), (30, 15, 2), (8, 0, 3)] {
            l.mail_now_and_then(&written(&format!("{now}")), t(now), t(last)).await.unwrap();
            assert_eq!(l.unsent_mails().await.unwrap().len(), mails, "at {now} s");
        }
    })
    .await;
}

/// Where nobody is to be told.
#[tokio::test]
async fn mails_that_were_put_aside_long_ago_go() {
    on_each_database(async |l| {
        let left = async || {
            let row = sqlx::query("SELECT COUNT(*) FROM mail").fetch_one(l.pool()).await.unwrap();
            sqlx::Row::get::<i64, _>(&row, 0)
        };
        l.open_episode("k", "text", &written("1"), t(0)).await.unwrap();
        for (s, unsent, expected) in
            [(3599, 1, 1), (3600, 0, 1), (3600 + 90 * 86_400, 0, 1), (3601 + 90 * 86_400, 0, 0)]
        {
            l.discard_mails(t(s)).await.unwrap();
            assert_eq!((l.unsent_mails().await.unwrap().len(), left().await), (unsent, expected), "after {s} s");
        }
        l.open_episode("ahead", "text", &written("2"), t(86_402)).await.unwrap();
        for (s, unsent) in [(2, 1), (1, 0)] {
            l.discard_mails(t(s)).await.unwrap();
            assert_eq!(l.unsent_mails().await.unwrap().len(), unsent, "a clock that was a day ahead, {s} s");
        }
    })
    .await;
}
