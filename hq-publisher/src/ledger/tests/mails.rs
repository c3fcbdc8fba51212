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

#[tokio::test]
async fn one_mail_an_episode_and_a_mail_is_nobody_elses_while_claimed() {
    on_each_database(async |l| {
        assert!(l.open_episode("k", "text", &written("1@hq"), t(0)).await.unwrap());
        assert!(!l.open_episode("k", "text", &written("2@hq"), t(1)).await.unwrap());
        assert_eq!(l.open_episodes("k").await.unwrap().len(), 1);
        assert!(l.close_episode("k", &written("3@hq"), t(2)).await.unwrap());
        assert!(!l.close_episode("k", &written("4@hq"), t(3)).await.unwrap());
        assert!(l.open_episode("k", "text", &written("5@hq"), t(4)).await.unwrap(), "a new episode");
        let ids = async || l.unsent_mails().await.unwrap().into_iter().map(|m| m.id).collect::<Vec<_>>();
        assert_eq!(ids().await, ["1@hq", "3@hq", "5@hq"]);

        let claim = async |s| {
            let claimed = l.claim_mail(t(s), Duration::from_secs(60), 0, |_| true).await.unwrap();
            claimed.map(|c| (c.mail.id, c.mail.attempts, c.mail.last_error))
        };
        let mail = |id: &str, attempts| Some((id.to_owned(), attempts, None));
        assert_eq!(claim(10).await, mail("1@hq", 1));
        assert_eq!(claim(10).await, mail("3@hq", 1));
        l.mail_sent("3@hq", t(11)).await.unwrap();
        let taken = Taken::from([("it@example.com".to_owned(), t(11))]);
        let failed =
            Failed { error: "no route", own_fault: true, holds: false, refused: 2, next: t(100), taken: &taken };
        l.mail_failed("1@hq", failed).await.unwrap();
        assert_eq!(claim(12).await, mail("5@hq", 1));
        assert_eq!(claim(13).await, None);
        // A sender that died: its claim runs out.
        assert_eq!(claim(80).await, mail("5@hq", 2));
        let later = l.claim_mail(t(100), Duration::from_secs(60), 0, |has| *has == taken).await.unwrap().unwrap();
        let error = later.mail.last_error.as_deref();
        assert_eq!((later.mail.id.as_str(), error, later.refused), ("1@hq", Some("no route"), 2));
        // The second way: none before an older one, but past one that is to blame itself.
        let untold =
            async |s| l.untold_mails(t(4), t(s)).await.unwrap().into_iter().map(|m| m.mail.id).collect::<Vec<_>>();
        assert_eq!(untold(100).await, ["1@hq", "5@hq"]);
        l.mail_untold("1@hq", false, 1, t(130)).await.unwrap();
        assert!(untold(129).await.is_empty());
        assert_eq!(untold(130).await, ["1@hq", "5@hq"]);
        l.mail_untold("1@hq", true, 1, t(200)).await.unwrap();
        assert_eq!(untold(131).await, ["5@hq"]);

        // What ended long ago goes.
        for (n, key) in ["k", "l"].iter().enumerate() {
            let end = t(91 * 86_400 * (n as i64 + 1));
            l.open_episode(key, "text", &written(&format!("{key}1@hq")), t(200)).await.unwrap();
            l.close_episode(key, &written(&format!("{key}2@hq")), end).await.unwrap();
        }
        let rows = sqlx::query("SELECT key FROM episode").fetch_all(l.pool()).await.unwrap();
        let keys: Vec<String> = rows.iter().map(|r| sqlx::Row::get(r, 0)).collect();
        assert_eq!(keys, ["l"]);
    })
    .await;
}
