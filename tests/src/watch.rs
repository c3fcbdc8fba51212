//! Headquarters' service and the mails that it sends, for tests of what is told.

use crate::bins::Daemon;
use crate::servers::Smtp;
use crate::site::{Builder, Site};
use crate::{PATIENCE, until};

/// A mail server, and `serve` of a site that judges several times a second.
pub struct Watch {
    smtp: Smtp,
    hq: Option<Daemon>,
}

impl Watch {
    /// The mail server, and the site's settings for it: relays report, and who gets nothing is told of at once.
    pub fn over(site: Builder) -> (Watch, Builder) {
        let smtp = Smtp::start();
        let site = site.mail(&smtp).hq_service().hq("serve.alert_tick", "'200ms'").hq("alerts.stuck", "'1s'");
        (Watch { smtp, hq: None }, site)
    }

    /// Starts `serve`.
    pub fn start(&mut self, site: &Site) {
        self.hq = Some(site.hq.start_ready());
    }

    fn count(&self, subject: &str) -> usize {
        self.smtp.mails().iter().filter(|m| m.subject == format!("[Tillcast] {subject}")).count()
    }

    /// Acts until this is told and not over: the text of the mail.
    #[track_caller]
    pub fn tells(&self, subject: &str, mut act: impl FnMut()) -> String {
        let over = format!("Recovered: {subject}");
        until(PATIENCE, subject, || {
            let told = self.count(subject) > self.count(&over);
            if !told {
                act();
            }
            told
        });
        let subject = format!("[Tillcast] {subject}");
        self.smtp.mails().into_iter().rev().find(|m| m.subject == subject).unwrap().text
    }

    /// Acts until all that was told is over.
    #[track_caller]
    pub fn is_calm(&self, mut act: impl FnMut()) {
        until(PATIENCE, "a mail that says that it is over", || {
            let mails = self.smtp.mails();
            let ends = mails.iter().filter(|m| m.subject.starts_with("[Tillcast] Recovered: ")).count();
            let calm = ends * 2 == mails.len();
            if !calm {
                act();
            }
            calm
        });
    }
}
