//! Mails by the ledger to recipients that take them or not, and to an SMTP server on loopback.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::config::MailConfig;
use proto::clock::TestClock;
use proto::config::HumanDuration;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::time::timeout;

#[derive(Clone, Copy, PartialEq)]
enum Says {
    Yes,
    NotNow,
    Never,
    Down,
}
use Says::{Down, Never, NotNow, Yes};

type Answer = Box<dyn Fn(&Mail, &str) -> Says + Send>;

/// Answers for each recipient as told; keeps what was asked of whom, and what was taken.
struct Fake {
    to: Vec<&'static str>,
    answer: Mutex<Answer>,
    asked: Mutex<Vec<(Mail, String, Says)>>,
}
impl Transport for Fake {
    fn recipients(&self) -> Vec<String> {
        self.to.iter().map(|r| (*r).to_owned()).collect()
    }
    async fn send(&self, mail: &Mail, to: &[String]) -> Result<(), SendError> {
        let mut error = SendError::default();
        for one in to {
            let says = self.answer.lock().unwrap()(mail, one);
            self.asked.lock().unwrap().push((mail.clone(), one.clone(), says));
            match says {
                Yes => error.taken.push(one.clone()),
                NotNow => error.later.push(one.clone()),
                Never => {}
                Down => error.down = true,
            }
            if says != Yes {
                error.text = "no".into();
            }
            if says == Down {
                break;
            }
        }
        if error.text.is_empty() { Ok(()) } else { Err(error) }
    }
}
impl Fake {
    fn to(to: &[&'static str]) -> Fake {
        Fake { to: to.to_vec(), answer: Mutex::new(Box::new(|_, _| Yes)), asked: Mutex::default() }
    }
    fn now(&self, answer: impl Fn(&Mail, &str) -> Says + Send + 'static) {
        *self.answer.lock().unwrap() = Box::new(answer);
    }
    fn tries(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
    fn taken_mails(&self, by: &str) -> Vec<Mail> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|(_, who, says)| who == by && *says == Yes).map(|(mail, ..)| mail.clone()).collect()
    }
    /// What this one took: the reason of each mail, with a mark where it is over.
    fn taken(&self, by: &str) -> String {
        self.taken_mails(by).iter().map(|m| reason(&m.subject)).collect::<Vec<_>>().join(" ")
    }
    fn subjects(&self) -> Vec<String> {
        self.taken_mails("it").into_iter().map(|m| m.subject).collect()
    }
}

fn reason(subject: &str) -> String {
    let mark = if subject.contains("Recovered") { "-" } else { "" };
    format!("{mark}{}", subject.split(['(', ')']).nth(1).unwrap())
}

/// Drains for so long, every 2 s or 300 times.
async fn drain_for(time: Duration, l: &Ledger, transport: &impl Transport, clock: &TestClock) {
    let step = (time / 300).max(Duration::from_secs(2));
    for _ in 0..time.as_secs() / step.as_secs() {
        drain(l, transport, clock).await.unwrap();
        clock.advance(step);
    }
}

async fn write(l: &Ledger, clock: &TestClock, reasons: &[&str]) {
    for reason in reasons {
        publish_refused(l, clock, &[refused(&price(), reason, "x")]).await.unwrap();
    }
}

fn refused(instance: &Instance, reason: &str, text: &str) -> Refused {
    Refused { instance: instance.clone(), reason: reason.into(), text: text.into() }
}

async fn recovered(l: &Ledger, clock: &TestClock, instance: Instance) {
    publish_recovered(l, clock, &BTreeSet::from([instance])).await.unwrap();
}

async fn ledger(dir: &tempfile::TempDir) -> Ledger {
    Ledger::open_url(&format!("sqlite:{}", dir.path().join("fleet.db").display())).await.unwrap()
}
fn price() -> Instance {
    "price@zone-east".parse().unwrap()
}
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn many_stores_that_left_the_list_at_once_share_a_mail() {
    let dir = tempfile::tempdir().unwrap();
    let (l, clock) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"));
    let stores: Vec<StoreId> = (0..300).map(|n| format!("s{n:03}").parse().unwrap()).collect();
    let tell = async |some: &[StoreId]| {
        publish_unlisted(&l, &clock, &some.iter().collect::<Vec<_>>()).await.unwrap();
        l.unsent_mails().await.unwrap()
    };
    assert_eq!(tell(&stores).await[0].subject, "[Tillcast] 300 at once: store not listed");
    assert_eq!(tell(&stores).await.len(), 1);
    let mails = tell(&stores[..2]).await;
    assert_eq!(mails.last().unwrap().subject, "[Tillcast] Recovered: 298 at once: store not listed");
    assert_eq!((mails.len(), tell(&[]).await.len()), (2, 4));
}

#[tokio::test]
async fn many_notices_at_once_share_a_mail_and_so_do_their_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (l, clock) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"));
    let begins = "waits-for-drops ";
    let notice = |n: usize| (format!("price@zone-z{n} waits for drops"), "No drop has come.".to_owned());
    let mut all: BTreeMap<_, _> = (0..30).map(|n| (format!("{begins}price@zone-z{n}"), notice(n))).collect();
    for _ in 0..2 {
        publish_notices(&l, &clock, begins, &all).await.unwrap();
    }
    // Who is known needs no text.
    all.values_mut().for_each(|told| *told = Default::default());
    all.pop_last();
    for _ in 0..2 {
        publish_notices(&l, &clock, begins, &all).await.unwrap();
    }
    publish_notices(&l, &clock, begins, &BTreeMap::new()).await.unwrap();
    let subjects: Vec<String> = l.unsent_mails().await.unwrap().into_iter().map(|m| m.subject).collect();
    let (many, one) = ("30 at once: waits for drops", "Recovered: price@zone-z9 waits for drops");
    let last = "Recovered: 29 at once: waits for drops";
    assert_eq!(subjects, [many, one, last].map(|s| format!("[Tillcast] {s}")));
}

#[tokio::test]
async fn many_refusals_at_once_share_a_mail_for_each_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (l, clock) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"));
    let zone = |n: usize| format!("price@zone-z{n:03}").parse::<Instance>().unwrap();
    let many = |reason: &str| (0..300).map(|n| refused(&zone(n), reason, &format!("row {n}"))).collect::<Vec<_>>();
    let mut all = many("BAD_ROWS");
    all.push(refused(&price(), "SHRINK", "900 of 1000 rows would go"));
    for _ in 0..2 {
        publish_refused(&l, &clock, &all).await.unwrap();
    }
    let mails = l.unsent_mails().await.unwrap();
    let subjects: Vec<&str> = mails.iter().map(|m| m.subject.as_str()).collect();
    let shrunk = "[Tillcast] Publishing price@zone-east was refused (SHRINK)";
    assert_eq!(subjects, ["[Tillcast] 300 at once: publish refused", shrunk]);
    let body = &mails[0].body;
    assert!(body.contains("Publishing price@zone-z199 was refused (BAD_ROWS)\n… and 100 more"), "{body}");
    assert!(body.contains("\nThe first of them:\n") && body.contains("\nrow 0\n"), "what is wrong: {body}");
    assert_eq!(refused_instances(&l, None).await.unwrap().len(), 301, "each is an episode");
    publish_recovered(&l, &clock, &(0..298).map(zone).collect()).await.unwrap();
    assert_eq!(l.unsent_mails().await.unwrap()[2].subject, "[Tillcast] Recovered: 298 at once: publish refused");
    let left = BTreeSet::from([zone(298), zone(299), price()]);
    assert_eq!(refused_instances(&l, None).await.unwrap(), left);
    publish_recovered(&l, &clock, &left).await.unwrap();
    assert_eq!((l.unsent_mails().await.unwrap().len(), refused_instances(&l, None).await.unwrap().len()), (6, 0));
}

#[tokio::test]
async fn one_mail_for_a_refusal_one_for_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["it"]));
    for _ in 0..3 {
        let long = refused(&price(), "BAD_ROWS", "row 7: name is too long");
        publish_refused(&l, &clock, &[long]).await.unwrap();
        clock.advance(HOUR);
    }
    let few = refused(&price(), "SHRINK", "900 of 1000 rows would go");
    publish_refused(&l, &clock, &[few.clone(), few]).await.unwrap();
    recovered(&l, &clock, "price@all".parse().unwrap()).await;
    assert_eq!(drain(&l, &fake, &clock).await.unwrap(), None);
    assert_eq!(
        fake.subjects(),
        [
            "[Tillcast] Publishing price@zone-east was refused (BAD_ROWS)",
            "[Tillcast] Publishing price@zone-east was refused (SHRINK)"
        ]
    );
    recovered(&l, &clock, price()).await;
    recovered(&l, &clock, price()).await;
    drain(&l, &fake, &clock).await.unwrap();
    assert_eq!(fake.subjects().len(), 4);
    assert!(fake.subjects()[2].starts_with("[Tillcast] Recovered: Publishing price@zone-east"));
    publish_notice(&l, &clock, "mirror", Some(("A mirror lags", "s3://b"))).await.unwrap();
    publish_notice(&l, &clock, "mirror", Some(("A mirror lags", "s3://b"))).await.unwrap();
    publish_notice(&l, &clock, "mirror", None).await.unwrap();
    publish_notice(&l, &clock, "mirror", None).await.unwrap();
    drain(&l, &fake, &clock).await.unwrap();
    assert_eq!(fake.subjects().len(), 6);
}

#[tokio::test]
async fn a_dead_server_loses_nothing_and_a_bad_mail_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["it"]));
    write(&l, &clock, &["A", "B"]).await;
    fake.now(|_, _| Down);
    for n in 1..=20 {
        assert!(drain(&l, &fake, &clock).await.unwrap().is_some());
        assert_eq!(fake.tries(), n, "stops at the first");
        clock.advance(HOUR);
    }
    // Restarted, the server back: each once, under the Message-ID that it had.
    let before: Vec<String> = l.unsent_mails().await.unwrap().into_iter().map(|m| m.id).collect();
    let l = ledger(&dir).await;
    fake.now(|_, _| Yes);
    drain(&l, &fake, &clock).await.unwrap();
    let after: Vec<String> = fake.taken_mails("it").into_iter().map(|m| m.id).collect();
    assert_eq!(after, before);
    assert_eq!(drain(&l, &fake, &clock).await.unwrap(), None);

    // Down again for one; what comes meanwhile does not overtake it.
    for reason in ["D", "E"] {
        write(&l, &clock, &[reason]).await;
        fake.now(|_, _| Down);
        drain(&l, &fake, &clock).await.unwrap();
    }
    fake.now(|_, _| Yes);
    write(&l, &clock, &["F"]).await;
    drain(&l, &fake, &clock).await.unwrap();
    assert_eq!(fake.taken("it"), "A B D E F");

    write(&l, &clock, &["C", "G"]).await;
    fake.now(|mail, _| if mail.subject.contains("(C)") { Never } else { Yes });
    assert_eq!(drain(&l, &fake, &clock).await.unwrap(), None, "put off, the others go on");
    assert_eq!(fake.taken("it"), "A B D E F G");
    assert_eq!(l.unsent_mails().await.unwrap()[0].last_error.as_deref(), Some("no"));
}

#[tokio::test]
async fn a_server_that_is_down_is_asked_ever_more_rarely_for_all_mails_together() {
    let dir = tempfile::tempdir().unwrap();
    let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["it"]));
    fake.now(|_, _| Down);
    write(&l, &clock, &["A", "B", "C"]).await;
    drain_for(10 * MINUTE, &l, &fake, &clock).await;
    assert!((5..=7).contains(&fake.tries()), "{}", fake.tries());
    assert!(drain(&l, &fake, &clock).await.unwrap().is_some(), "it is said why all the while");
    // A new one has the oldest tried once.
    let before = fake.tries();
    write(&l, &clock, &["D"]).await;
    drain_for(MINUTE, &l, &fake, &clock).await;
    assert_eq!(fake.tries(), before + 1);
    fake.now(|_, _| Yes);
    drain_for(15 * MINUTE, &l, &fake, &clock).await;
    assert_eq!(fake.taken("it"), "A B C D");
}

#[tokio::test]
async fn a_mail_that_is_never_taken_now_is_passed_after_a_few_tries() {
    let dir = tempfile::tempdir().unwrap();
    let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["it", "b"]));
    let bad = |mail: &Mail, _: &str| if mail.subject.contains("(BAD") { NotNow } else { Yes };
    fake.now(bad);
    write(&l, &clock, &["BAD", "BADDER", "C"]).await;
    recovered(&l, &clock, price()).await;
    drain_for(MINUTE, &l, &fake, &clock).await;
    assert_eq!(fake.taken("it"), "", "the order is kept as long as it may be a hiccup");
    drain_for(20 * MINUTE, &l, &fake, &clock).await;
    assert_eq!((fake.taken("it"), fake.taken("b")), ("C -C".into(), "C -C".into()));
    // New ones go past at once, and do not have the bad ones tried.
    let before = fake.tries();
    write(&l, &clock, &["D"]).await;
    drain(&l, &fake, &clock).await.unwrap();
    assert!(fake.taken("it").ends_with("-C D") && fake.tries() <= before + 2 * 5, "{}", fake.taken("it"));
    // They are tried on, and taken at last.
    fake.now(|_, _| Yes);
    drain_for(16 * MINUTE, &l, &fake, &clock).await;
    assert_eq!((fake.taken("it").split(' ').count(), l.unsent_mails().await.unwrap().len()), (7, 0));
}

#[tokio::test]
async fn a_server_that_takes_nothing_now_gets_all_in_their_order_when_it_does() {
    let dir = tempfile::tempdir().unwrap();
    let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["it"]));
    fake.now(|_, _| NotNow);
    write(&l, &clock, &["A", "B", "C"]).await;
    recovered(&l, &clock, price()).await;
    drain_for(6 * HOUR, &l, &fake, &clock).await;
    assert!(fake.tries() < 350, "{}", fake.tries());
    fake.now(|_, _| Yes);
    drain_for(15 * MINUTE, &l, &fake, &clock).await;
    assert_eq!(fake.taken("it"), "A B C -A -B -C");
}

#[tokio::test]
async fn a_recipient_that_says_not_now_gets_all_in_their_order_and_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["dead", "b", "it"]));
    let refused = |b: Says| {
        move |_: &Mail, who: &str| match who {
            "b" => b,
            "dead" => Never,
            _ => Yes,
        }
    };
    // An outage first: its tries do not count against who is asked later.
    fake.now(|_, _| Down);
    write(&l, &clock, &["A"]).await;
    drain_for(48 * HOUR, &l, &fake, &clock).await;
    fake.now(refused(NotNow));
    recovered(&l, &clock, price()).await;
    let before = fake.tries();
    drain_for(MINUTE / 6, &l, &fake, &clock).await;
    assert_eq!(fake.taken("it"), "A -A");
    assert!(fake.tries() <= before + 6, "not every 2 s");
    for n in 0..30 {
        write(&l, &clock, &[&format!("N{n}")]).await;
        drain_for(2 * MINUTE, &l, &fake, &clock).await;
        assert!(fake.taken("it").ends_with(&format!(" N{n}")));
    }
    assert_eq!(drain(&l, &fake, &clock).await.unwrap(), None, "somebody has each");
    // An hour later it takes them.
    fake.now(refused(Yes));
    drain_for(15 * MINUTE, &l, &fake, &clock).await;
    assert_eq!(fake.taken("b"), fake.taken("it"));
    assert_eq!((fake.taken("it").split(' ').count(), l.unsent_mails().await.unwrap().len()), (32, 0));

    // But not for ever, after it is had by somebody.
    fake.now(refused(NotNow));
    write(&l, &clock, &["Z"]).await;
    drain_for(23 * HOUR, &l, &fake, &clock).await;
    assert_eq!(l.unsent_mails().await.unwrap().len(), 1);
    drain_for(2 * HOUR, &l, &fake, &clock).await;
    assert_eq!(l.unsent_mails().await.unwrap().len(), 0);
    assert!(fake.taken("it").ends_with("N29 Z") && fake.taken("b").ends_with("N29"));
}

#[tokio::test]
async fn one_mail_that_a_recipient_never_takes_now_keeps_no_later_one_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let (l, clock, fake) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), Fake::to(&["it", "b"]));
    fake.now(|mail, who| if who == "b" && mail.subject.contains("(BAD)") { NotNow } else { Yes });
    write(&l, &clock, &["BAD", "C", "D"]).await;
    drain_for(MINUTE, &l, &fake, &clock).await;
    assert_eq!((fake.taken("it"), fake.taken("b")), ("BAD C D".into(), "".into()));
    drain_for(20 * MINUTE, &l, &fake, &clock).await;
    assert_eq!((fake.taken("it"), fake.taken("b")), ("BAD C D".into(), "C D".into()));
}

#[test]
fn hostile_text_stays_out_of_headers() {
    let config = MailConfig {
        smtp: proto::config::Secret::new("smtp://127.0.0.1:1"),
        from: "Till\r\nBcc: x@y.z <tillcast@example.com>".into(),
        to: vec!["IT <it@example.com>".into(), "b@example.com".into()],
        ca_file: None,
        timeout: proto::config::HumanDuration(Duration::from_secs(1)),
    };
    // A name that will not do is refused, or harmless; it never panics.
    let config = match Smtp::new(&config) {
        Ok(_) | Err(_) => MailConfig { from: "Tillcast <tillcast@example.com>".into(), ..config },
    };
    let smtp = Smtp::new(&config).unwrap();
    let notice = Notice {
        episodes: Vec::new(),
        subject: format!("Zürich\r\nBcc: x@y.z\u{2028}{}", "a".repeat(200_000)),
        body: format!("line one\r\n.\r\nline\u{0} two {}", "é".repeat(100_000)),
    };
    let mail = compose(&notice, Timestamp::UNIX_EPOCH);
    assert!(mail.subject.chars().count() <= SUBJECT && mail.body.len() < BODY + 20);
    assert!(mail.body.starts_with("Written at 1970-01-01T00:00:00Z.\n\nline one"), "{:.60}", mail.body);
    let text = String::from_utf8(smtp.message(&mail).unwrap().formatted()).unwrap();
    let head = text.split("\r\n\r\n").next().unwrap();
    assert!(!head.lines().any(|l| l.starts_with("Bcc")), "{head}");
    assert!(head.contains(&format!("Message-ID: <{}>", mail.id)), "{head}");
}

/// A mail server that answers `reply` to recipients whose address begins with `dead` and to mails of odd text, and
/// nothing to those that begin with `silent`; whom it took each mail for.
#[derive(Clone)]
struct Server {
    url: String,
    reply: Arc<Mutex<&'static str>>,
    taken: Arc<Mutex<Vec<Vec<String>>>>,
}

async fn server(reply: &'static str) -> Server {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("smtp://{}", listener.local_addr().unwrap());
    let server = Server { url, reply: Arc::new(Mutex::new(reply)), taken: Arc::default() };
    let of = server.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(session(stream, of.clone()));
        }
    });
    server
}

async fn session(stream: tokio::net::TcpStream, server: Server) {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    let (mut to, mut in_data, mut odd) = (Vec::new(), false, false);
    write.write_all(b"220 test\r\n").await.unwrap();
    while let Ok(Some(line)) = lines.next_line().await {
        let reply = *server.reply.lock().unwrap();
        let answer = match line.split([':', ' ']).next().unwrap_or_default() {
            "." if in_data => {
                in_data = false;
                if !odd {
                    server.taken.lock().unwrap().push(std::mem::take(&mut to));
                }
                if odd { reply } else { "250 taken" }
            }
            _ if in_data => {
                odd |= line == "odd";
                continue;
            }
            "MAIL" => {
                to.clear();
                "250 ok"
            }
            "RCPT" if line.contains("<dead") => reply,
            "RCPT" if line.contains("<silent") => continue,
            "RCPT" => {
                to.push(line.split(['<', '>']).nth(1).unwrap().to_owned());
                "250 ok"
            }
            "DATA" => {
                in_data = true;
                "354 go on"
            }
            "QUIT" => return,
            _ => "250 ok",
        };
        if write.write_all(format!("{answer}\r\n").as_bytes()).await.is_err() {
            return;
        }
    }
}

fn smtp(server: &Server, to: &[&str]) -> Smtp {
    let config = MailConfig {
        smtp: proto::config::Secret::new(&server.url),
        from: "a@example.com".into(),
        to: to.iter().map(|t| (*t).to_owned()).collect(),
        ca_file: None,
        timeout: proto::config::HumanDuration(Duration::from_secs(10)),
    };
    Smtp::new(&config).unwrap()
}

async fn send(server: &Server, to: &[&str], body: &str) -> Result<(), SendError> {
    let notice = Notice { episodes: Vec::new(), subject: "s".into(), body: body.into() };
    let smtp = smtp(server, to);
    smtp.send(&compose(&notice, Timestamp::UNIX_EPOCH), &smtp.recipients()).await
}

#[tokio::test]
async fn a_dead_recipient_silences_nobody_else() {
    let all = ["it@example.com", "dead@example.com", "b@example.com"];
    let alone = [["it@example.com"], ["b@example.com"]];
    // A full mailbox may have room again soon.
    for (reply, later) in [("550 no such user", &[][..]), ("452 mailbox full", &["dead@example.com"])] {
        let server = server(reply).await;
        let e = send(&server, &all, "b").await.unwrap_err();
        assert!(e.taken == alone.concat() && e.later == later && !e.down, "{e:?}");
        assert_eq!(*server.taken.lock().unwrap(), alone);
        let nobody = send(&server, &["dead@example.com", "dead2@example.com"], "b").await.unwrap_err();
        assert!(nobody.taken.is_empty() && nobody.text.contains(&reply[4..]), "{nobody:?}");
        send(&server, &["it@example.com", "b@example.com"], "b").await.unwrap();
        let last = server.taken.lock().unwrap().split_off(2);
        assert_eq!(last, [["it@example.com", "b@example.com"]], "one for all, if all are taken");
        let odd = send(&server, &all[..1], "odd").await.unwrap_err();
        assert_eq!((odd.later.len(), odd.down), (later.len(), false), "{odd:?}");
    }
    // Who is not let in can send nothing.
    let e = send(&server("454 no login now").await, &all, "b").await.unwrap_err();
    assert!(e.down && e.taken.is_empty(), "{e:?}");
}

/// There is time for one of them alone at each try.
#[tokio::test]
async fn a_slow_server_gets_each_mail_once_for_each_though_some_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (l, clock, server) =
        (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"), server("550 no such user").await);
    let mut smtp = smtp(&server, &["it@example.com", "dead@example.com", "b@example.com", "c@example.com"]);
    smtp.alone = Duration::ZERO;
    write(&l, &clock, &["A", "B"]).await;
    drain_for(HOUR / 2, &l, &smtp, &clock).await;
    let mut all = server.taken.lock().unwrap().concat();
    all.sort();
    let twice = ["b@example.com", "c@example.com", "it@example.com"].map(|who| [who, who]);
    assert_eq!(all, twice.concat());
    assert_eq!(l.unsent_mails().await.unwrap().len(), 0);
}

#[test]
fn a_mail_that_waited_for_a_day_goes_on_while_somebody_gets_it() {
    let day_old = Taken::from([("it".to_owned(), Timestamp::UNIX_EPOCH)]);
    let now = after(Timestamp::UNIX_EPOCH, PATIENCE);
    let slow = SendError { later: vec!["c".into()], ..SendError::default() };
    assert!(is_borne(&slow, &day_old, now));
    assert!(!is_borne(&SendError { taken: vec!["b".into()], ..slow }, &day_old, now));
}

#[tokio::test]
async fn a_server_that_falls_silent_is_left_and_who_took_a_mail_has_it() {
    let server = server("550 no such user").await;
    let mut half = smtp(&server, &["dead@example.com", "it@example.com", "silent@example.com", "b@example.com"]);
    half.longest = Duration::from_secs(8);
    let notice = Notice { episodes: Vec::new(), subject: "s".into(), body: "b".into() };
    let mail = compose(&notice, Timestamp::UNIX_EPOCH);
    let e = half.send(&mail, &half.recipients()).await.unwrap_err();
    assert!(e.down && e.taken == ["it@example.com"], "{e:?}");

    // One that does not even greet: it sees that it was left, by `doctor` too.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mute = Server { url: format!("smtp://{}", listener.local_addr().unwrap()), ..server };
    let is_left = async || listener.accept().await.unwrap().0.read(&mut [0]).await.unwrap() == 0;
    let mut smtp = smtp(&mute, &["it@example.com"]);
    (smtp.timeout, smtp.longest) = (HumanDuration(Duration::from_secs(1)), Duration::from_secs(1));
    let asked = async {
        let (tested, left) = tokio::join!(smtp.test(), is_left());
        assert!(tested.is_err_and(|e| e.contains("mail.timeout")) && left);
        let to = smtp.recipients();
        let (sent, left) = tokio::join!(smtp.send(&mail, &to), is_left());
        assert!(sent.is_err_and(|e| e.down && e.taken.is_empty()) && left);
    };
    timeout(MINUTE, asked).await.unwrap();
}

#[tokio::test]
async fn a_greylisted_recipient_gets_its_mails_when_it_is_let_in() {
    let dir = tempfile::tempdir().unwrap();
    let (l, clock) = (ledger(&dir).await, TestClock::at("2026-01-01T00:00:00Z"));
    let server = server("450 greylisted").await;
    let smtp = smtp(&server, &["it@example.com", "dead@example.com"]);
    write(&l, &clock, &["A", "B"]).await;
    drain_for(MINUTE / 6, &l, &smtp, &clock).await;
    assert_eq!(*server.taken.lock().unwrap(), [["it@example.com"], ["it@example.com"]]);
    *server.reply.lock().unwrap() = "250 ok";
    drain_for(MINUTE, &l, &smtp, &clock).await;
    assert_eq!(server.taken.lock().unwrap().len(), 4);
    assert_eq!(l.unsent_mails().await.unwrap().len(), 0);
}

#[test]
fn addresses_and_servers_that_cannot_be_are_told() {
    let config = |smtp: &str, to: &str| MailConfig {
        smtp: proto::config::Secret::new(smtp),
        from: "a@example.com".into(),
        to: vec![to.into()],
        ca_file: None,
        timeout: proto::config::HumanDuration(Duration::from_secs(1)),
    };
    assert!(Smtp::new(&config("smtp://u:p%40ss@h:587?tls=required", "it@example.com")).is_ok());
    assert!(Smtp::new(&config("smtps://h", "it@example.com")).is_ok());
    let e = Smtp::new(&config("http://h", "it@example.com")).unwrap_err().to_string();
    assert!(e.starts_with("mail.smtp"), "{e}");
    let e = Smtp::new(&config("smtp://h", "nobody")).unwrap_err().to_string();
    assert!(e.starts_with("mail.to") && e.contains("nobody"), "{e}");
    // One of these would keep each mail from all.
    let e = Smtp::new(&config("smtp://h", "Jörg <jörg@example.com>")).unwrap_err().to_string();
    assert!(e.starts_with("mail.to") && e.contains("ASCII"), "{e}");
    let smtp = Smtp::new(&config("smtp://h", "Jörg <it@bücher.example>")).unwrap();
    assert_eq!(smtp.recipients(), ["it@xn--bcher-kva.example"]);
    let notice = Notice { episodes: Vec::new(), subject: "s".into(), body: "b".into() };
    let mail = compose(&notice, Timestamp::UNIX_EPOCH);
    assert!(smtp.message(&mail).unwrap().formatted().is_ascii());
}
