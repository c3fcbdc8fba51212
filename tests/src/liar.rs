//! A server that answers as a test tells it to: late, endlessly, with lies, or with what another server says.

use crate::http;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    /// `GET`, `POST`.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// All headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

/// An answer.
#[derive(Debug, Clone)]
pub enum Say {
    /// A whole answer of this status, with more header lines (each with its CRLF).
    Whole(u16, String, Vec<u8>),
    /// A 200 with these first bytes, then a byte every so often, without end.
    Drip(Vec<u8>, Duration),
    /// A 200 whose body never ends. True: its Content-Length says 2^63.
    Endless(bool),
    /// What this server says to the same.
    As(String),
    /// Nothing; the connection stays open for a minute.
    Nothing,
}

impl Say {
    /// A 200 with this body.
    pub fn ok(body: impl Into<Vec<u8>>) -> Say {
        Say::Whole(200, String::new(), body.into())
    }
}

type Answer = dyn Fn(&Asked) -> Say + Send + Sync;

/// The server; gone on drop.
pub struct Liar {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    answer: Arc<Mutex<Arc<Answer>>>,
    stop: Arc<AtomicBool>,
}

impl Liar {
    /// Starts it.
    pub fn start(answer: impl Fn(&Asked) -> Say + Send + Sync + 'static) -> Liar {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let liar = Liar {
            address: listener.local_addr().unwrap(),
            asked: Arc::default(),
            answer: Arc::new(Mutex::new(Arc::new(answer))),
            stop: Arc::default(),
        };
        let (asked, answer, stop) = (liar.asked.clone(), liar.answer.clone(), liar.stop.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let (asked, answer, stop) = (asked.clone(), answer.clone(), stop.clone());
                thread::spawn(move || one(stream, &asked, &answer, &stop));
            }
        });
        liar
    }

    /// Answers otherwise from now on.
    pub fn now(&self, answer: impl Fn(&Asked) -> Say + Send + Sync + 'static) {
        *self.answer.lock().unwrap() = Arc::new(answer);
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the listener.
        let _ = TcpStream::connect(self.address);
    }
}

fn one(mut stream: TcpStream, asked: &Mutex<Vec<Asked>>, answer: &Mutex<Arc<Answer>>, stop: &AtomicBool) {
    let _ = stream.set_read_timeout(Some(Duration::from_secs(60)));
    let Some(request) = read(&mut stream) else { return };
    asked.lock().unwrap().push(request.clone());
    let answer = answer.lock().unwrap().clone();
    // A client that goes away ends it.
    let _ = say(&mut stream, answer(&request), &request, stop);
}

fn read(stream: &mut TcpStream) -> Option<Asked> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut lines = head.lines();
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
    let headers: Vec<(String, String)> =
        lines.filter_map(|l| l.split_once(": ")).map(|(n, v)| (n.to_ascii_lowercase(), v.to_owned())).collect();
    let length = headers.iter().find(|(n, _)| n == "content-length").map_or(0, |(_, v)| v.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    Some(Asked { method, target, headers, body })
}

fn say(stream: &mut TcpStream, say: Say, request: &Asked, stop: &AtomicBool) -> std::io::Result<()> {
    let stopped = || stop.load(Ordering::Relaxed);
    match say {
        Say::Whole(status, headers, body) => {
            let length = body.len();
            write!(stream, "HTTP/1.1 {status} x\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n")?;
            stream.write_all(&body)
        }
        Say::Drip(first, every) => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")?;
            stream.write_all(&first)?;
            while !stopped() {
                stream.write_all(b" ")?;
                thread::sleep(every);
            }
            Ok(())
        }
        Say::Endless(told) => {
            let length = if told { format!("content-length: {}\r\n", 1u64 << 63) } else { String::new() };
            write!(stream, "HTTP/1.1 200 OK\r\nconnection: close\r\n{length}\r\n")?;
            let chunk = vec![b'{'; 1 << 16];
            while !stopped() {
                stream.write_all(&chunk)?;
            }
            Ok(())
        }
        Say::As(url) => {
            let headers: Vec<(&str, &str)> = request
                .headers
                .iter()
                .filter(|(n, _)| !["host", "content-length", "connection"].contains(&n.as_str()))
                .map(|(n, v)| (n.as_str(), v.as_str()))
                .collect();
            let url = format!("{url}{}", request.target);
            let reply = http::try_request(&request.method, &url, &headers, &request.body);
            let reply = reply.map_err(std::io::Error::other)?;
            write!(stream, "HTTP/1.1 {} x\r\nconnection: close\r\n", reply.status)?;
            for (name, value) in reply.headers.iter().filter(|(n, _)| n != "transfer-encoding" && n != "connection") {
                write!(stream, "{name}: {value}\r\n")?;
            }
            stream.write_all(b"\r\n")?;
            stream.write_all(&reply.body)
        }
        Say::Nothing => {
            (0..600).take_while(|_| !stopped()).for_each(|_| thread::sleep(Duration::from_millis(100)));
            Ok(())
        }
    }
}

/// Sends bytes as they are and gives what comes back until the server ends it, or `limit` has passed.
pub fn talk(address: &str, bytes: &[u8], limit: Duration) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let _ = stream.set_read_timeout(Some(limit));
    // The server may have hung up half way: what it said counts.
    let _ = stream.write_all(bytes);
    let (mut all, mut chunk) = (Vec::new(), [0; 65_536]);
    while let Ok(n) = stream.read(&mut chunk) {
        if n == 0 {
            break;
        }
        all.extend_from_slice(&chunk[..n]);
    }
    String::from_utf8_lossy(&all).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_it_is_told_and_what_others_say() {
        let honest = Liar::start(|asked| Say::ok(format!("{} {}", asked.method, asked.target)));
        let url = honest.url();
        let between = Liar::start(move |_| Say::As(url.clone()));
        assert_eq!(http::get(&format!("{}/a?b=1", between.url())).text(), "GET /a?b=1");
        between.now(|_| Say::Whole(503, "x-a: b\r\n".into(), b"no".to_vec()));
        let reply = http::get(&between.url());
        assert_eq!((reply.status, reply.header("x-a"), between.asked().len()), (503, "b", 2));
        between.now(|_| Say::Endless(false));
        assert!(http::try_get_within(&between.url(), Duration::from_millis(300)).is_err());
    }
}
