//! A mail server that keeps what it gets where a test can read it (aiosmtpd).

use super::{make_certificates, ready, with_free_port};
use crate::process::{self, Process};
use crate::{repository, until_some};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::BufRead as _;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// How the mail server behaves.
#[derive(Debug, Clone, Default)]
pub struct SmtpOptions {
    /// Offers STARTTLS, and takes no mail without.
    pub starttls: bool,
    /// Takes mail of this `user:password` only.
    pub auth: Option<String>,
    /// Answers this many mails with 451 (try again) first.
    pub fail_first: u32,
    /// Answers 550 to recipients with this word in them.
    pub reject: Option<String>,
}

/// A mail as received.
#[derive(Debug, Clone, Deserialize)]
pub struct Mail {
    /// Envelope sender.
    pub from: String,
    /// Envelope recipients.
    pub to: Vec<String>,
    /// Subject, decoded.
    pub subject: String,
    /// Message-ID.
    pub message_id: String,
    /// All headers, names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The plain text part, decoded.
    pub text: String,
    /// The HTML part, decoded, or "".
    pub html: String,
    /// Whether it came over TLS.
    pub tls: bool,
    /// Whether the sender had logged in.
    pub authenticated: bool,
}

/// The mail server. [`Smtp::stop`] and [`Smtp::restart`] keep its port and mails.
#[derive(Debug)]
pub struct Smtp {
    process: Option<Process>,
    port: u16,
    options: SmtpOptions,
    dir: TempDir,
}

impl Smtp {
    /// Takes everything, without TLS or login.
    #[track_caller]
    pub fn start() -> Smtp {
        Smtp::with(SmtpOptions::default())
    }

    /// Starts one with options.
    #[track_caller]
    pub fn with(options: SmtpOptions) -> Smtp {
        let dir = crate::temp_dir("smtp");
        if options.starttls {
            make_certificates(dir.path(), "DNS:localhost,IP:127.0.0.1");
        }
        let (process, port) = with_free_port(|port| Ok((launch(dir.path(), port, &options)?, port)));
        Smtp { process: Some(process), port, options, dir }
    }

    /// `smtp://127.0.0.1:PORT`; `smtp://localhost:PORT` where the certificate's name counts.
    pub fn url(&self) -> String {
        format!("smtp://{}:{}", if self.options.starttls { "localhost" } else { "127.0.0.1" }, self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The certificate of the authority that signed the server's (PEM), with `starttls`.
    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.crt")
    }

    /// Goes dead: connections are refused.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Whether it is dead.
    pub fn is_stopped(&self) -> bool {
        self.process.is_none()
    }

    /// Comes back on the same port.
    #[track_caller]
    pub fn restart(&mut self) {
        self.process = None;
        self.process = Some(launch(self.dir.path(), self.port, &self.options).unwrap_or_else(|e| panic!("{e}")));
    }

    /// All mails so far, in order.
    pub fn mails(&self) -> Vec<Mail> {
        let Ok(file) = std::fs::File::open(self.dir.path().join("mails.jsonl")) else { return Vec::new() };
        // The last line may be half written.
        std::io::BufReader::new(file)
            .lines()
            .map_while(Result::ok)
            .map_while(|l| serde_json::from_str(&l).ok())
            .collect()
    }

    /// Waits for a mail with all these words in subject or text, and gives it back.
    #[track_caller]
    pub fn wait_for(&self, deadline: Duration, words: &[&str]) -> Mail {
        let fits = |m: &Mail| words.iter().all(|w| m.subject.contains(w) || m.text.contains(w));
        let subjects = || self.mails().into_iter().map(|m| m.subject).collect::<Vec<_>>();
        crate::wait_for(deadline, || self.mails().into_iter().find(fits))
            .unwrap_or_else(|| panic!("no mail with {words:?} within {deadline:?}; there are {:?}", subjects()))
    }

    /// Waits until there are at least `n` mails, and gives back all.
    #[track_caller]
    pub fn wait_count(&self, deadline: Duration, n: usize) -> Vec<Mail> {
        until_some(deadline, &format!("{n} mails"), || Some(self.mails()).filter(|m| m.len() >= n))
    }
}

fn launch(dir: &Path, port: u16, options: &SmtpOptions) -> Result<Process, String> {
    let mut server = process::command(&super::s3::venv("python"), None, "KILL");
    server
        .arg("-I")
        .arg(repository().join("tests/python/smtp_catcher.py"))
        .arg(port.to_string())
        .arg(dir.join("mails.jsonl"));
    if options.starttls {
        server.arg("--tls").arg(dir.join("server.crt")).arg(dir.join("server.key")).arg("--require-tls");
    }
    if let Some(auth) = &options.auth {
        server.args(["--auth", auth]);
    }
    if let Some(word) = &options.reject {
        server.args(["--reject", word]);
    }
    server.args(["--fail-first", &options.fail_first.to_string()]);
    let mut process = Process::spawn("SMTP catcher", server, &dir.join("log"));
    ready(&mut process, "the SMTP catcher", || TcpStream::connect(("127.0.0.1", port)).is_ok())?;
    Ok(process)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Sends a mail by Python's own client.
    fn send(smtp: &Smtp, with: &str) -> bool {
        let script = format!(
            "import smtplib, ssl; s = smtplib.SMTP('localhost', {}); {with}; s.sendmail('a@example.com', ['it@example.com'], \
             'Subject: =?utf-8?q?Z=C3=BCrich?=\\r\\nMessage-ID: <1@x>\\r\\n\\r\\nhello\\r\\n')",
            smtp.port()
        );
        Command::new(super::super::s3::venv("python")).args(["-c", &script]).output().unwrap().status.success()
    }

    #[test]
    fn catches_fails_first_and_comes_back() {
        let mut smtp = Smtp::with(SmtpOptions { fail_first: 1, ..SmtpOptions::default() });
        assert!(!send(&smtp, "pass"), "the first is told to try again");
        assert!(send(&smtp, "pass"));
        smtp.stop();
        assert!(!send(&smtp, "pass"));
        smtp.restart();
        assert!(!send(&smtp, "pass") && send(&smtp, "pass"));
        let mails = smtp.wait_count(crate::PATIENCE, 2);
        assert_eq!((mails[0].subject.as_str(), mails[0].text.trim(), mails[0].tls), ("Zürich", "hello", false));
    }

    #[test]
    fn wants_tls_and_login() {
        let smtp = Smtp::with(SmtpOptions { starttls: true, auth: Some("hq:secret".into()), ..SmtpOptions::default() });
        let tls = format!("s.starttls(context=ssl.create_default_context(cafile='{}'))", smtp.ca().display());
        assert!(!send(&smtp, "pass"));
        assert!(!send(&smtp, &tls));
        assert!(!send(&smtp, &format!("{tls}; s.login('hq', 'wrong')")));
        assert!(send(&smtp, &format!("{tls}; s.login('hq', 'secret')")));
        let mail = smtp.wait_for(crate::PATIENCE, &["hello"]);
        assert!(mail.tls && mail.authenticated);
    }
}
