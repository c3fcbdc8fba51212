//! A mail catcher: just enough SMTP (RFC 5321) to take a mail, kept as files where they can be read.

use anyhow::Result;
use base64::Engine as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// The mails caught so far, newest last: subject and text.
#[derive(Debug, Clone, Default)]
pub struct PostBox(Arc<Mutex<Vec<Mail>>>);

/// One mail.
#[derive(Debug, Clone)]
pub struct Mail {
    /// Its subject.
    pub subject: String,
    /// Its text, decoded.
    pub text: String,
}

impl PostBox {
    /// Takes mail on a port of this machine and writes each to `dir`.
    pub async fn open(dir: PathBuf) -> Result<(PostBox, u16)> {
        proto::shelf::create_dir(&dir)?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let mails = PostBox::default();
        let all = mails.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (mails, dir) = (all.clone(), dir.clone());
                tokio::spawn(async move {
                    // A client that hangs up in the middle has sent no mail.
                    let _ = mails.talk(socket, dir).await;
                });
            }
        });
        Ok((mails, port))
    }

    /// The mails so far.
    pub fn all(&self) -> Vec<Mail> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn talk(&self, socket: TcpStream, dir: PathBuf) -> Result<()> {
        let (read, mut write) = socket.into_split();
        let mut lines = BufReader::new(read).lines();
        write.write_all(b"220 demo\r\n").await?;
        while let Some(line) = lines.next_line().await? {
            let verb = line.split_whitespace().next().unwrap_or_default().to_ascii_uppercase();
            let answer: &[u8] = match verb.as_str() {
                "QUIT" => {
                    write.write_all(b"221 bye\r\n").await?;
                    return Ok(());
                }
                "DATA" => {
                    write.write_all(b"354 go on\r\n").await?;
                    let mut raw = String::new();
                    while let Some(line) = lines.next_line().await? {
                        if line == "." {
                            break;
                        }
                        raw.push_str(line.strip_prefix('.').unwrap_or(&line));
                        raw.push('\n');
                    }
                    self.keep(&raw, &dir)?;
                    b"250 kept\r\n"
                }
                _ => b"250 ok\r\n",
            };
            write.write_all(answer).await?;
        }
        Ok(())
    }

    fn keep(&self, raw: &str, dir: &std::path::Path) -> Result<()> {
        let mail = read(raw);
        let mut mails = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        mails.push(mail);
        proto::shelf::write_durable(&dir.join(format!("{:03}.eml", mails.len())), raw.as_bytes())?;
        Ok(())
    }
}

/// The subject and the first text of a mail.
fn read(raw: &str) -> Mail {
    let unfolded = raw.replace("\n ", " ").replace("\n\t", " ");
    let header = |name: &str| {
        let line = unfolded.lines().find(|l| l.to_ascii_lowercase().starts_with(name));
        line.and_then(|l| l.split_once(':')).map(|(_, v)| v.trim().to_owned()).unwrap_or_default()
    };
    let body = raw.split_once("\n\n").map_or("", |(_, b)| b);
    let text = match header("content-transfer-encoding:").as_str() {
        "base64" => {
            let joined: String = body.split_whitespace().collect();
            let bytes = base64::engine::general_purpose::STANDARD.decode(joined).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        }
        "quoted-printable" => quoted_printable(body),
        _ => body.to_owned(),
    };
    Mail { subject: header("subject:"), text }
}

fn quoted_printable(body: &str) -> String {
    let joined = body.replace("=\n", "");
    let mut out = Vec::new();
    let mut bytes = joined.bytes();
    while let Some(b) = bytes.next() {
        if b != b'=' {
            out.push(b);
            continue;
        }
        let hex: Vec<u8> = bytes.by_ref().take(2).collect();
        let code = std::str::from_utf8(&hex).ok().and_then(|h| u8::from_str_radix(h, 16).ok());
        out.push(code.unwrap_or(b'?'));
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mails_are_decoded() {
        let m =
            read("Subject: Refused:\n row\nContent-Transfer-Encoding: quoted-printable\n\nsku =3D 4=\n2 K=C3=A4the\n");
        assert_eq!((m.subject.as_str(), m.text.trim()), ("Refused: row", "sku = 42 Käthe"));
        let m = read("Subject: x\nContent-Transfer-Encoding: base64\n\naGVs\nbG8=\n");
        assert_eq!(m.text, "hello");
    }
}
