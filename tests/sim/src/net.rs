//! The network between the machines: who may reach whom, and what becomes of questions and answers on the way.
//!
//! Product code asks through [`Line`], its end of the wire; the simulation decides when and with what it goes on.

use crate::clock::Ms;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use hyper::body::{Body, Frame, SizeHint};
use proto::fetch::Wire;
use std::collections::BTreeMap;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use tillcast_tests::Dice;
use tokio::sync::{mpsc, oneshot};

/// A machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Who {
    /// Headquarters: `publish` and `serve`.
    Hq,
    /// The objects as they are.
    Bucket,
    /// A cache in front of them.
    Cdn,
    /// The relay of a store.
    Relay(usize),
    /// A register, numbered through all stores.
    Register(usize),
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Hq => f.write_str("hq"),
            Who::Bucket => f.write_str("bucket"),
            Who::Cdn => f.write_str("cdn"),
            Who::Relay(n) => write!(f, "relay-{n}"),
            Who::Register(n) => write!(f, "register-{n}"),
        }
    }
}

impl Who {
    /// The machine of a host name.
    pub fn of_host(host: &str) -> Option<Who> {
        match host {
            "hq" => Some(Who::Hq),
            "bucket" => Some(Who::Bucket),
            "cdn" => Some(Who::Cdn),
            _ => host.strip_prefix("relay-")?.parse().ok().map(Who::Relay),
        }
    }
}

/// A question on its way.
#[derive(Debug, Clone)]
pub struct Question {
    /// `GET` or `POST`.
    pub method: http::Method,
    /// Path and query.
    pub path: String,
    /// Whom it is for.
    pub to: Who,
    /// Headers.
    pub headers: http::HeaderMap,
    /// The body.
    pub body: Bytes,
}

impl Question {
    /// A plain one.
    pub fn get(to: Who, path: &str) -> Question {
        let (method, path) = (http::Method::GET, path.to_owned());
        Question { method, path, to, headers: http::HeaderMap::new(), body: Bytes::new() }
    }
}

/// Where product code waits for an answer.
pub type Reply = oneshot::Sender<Result<reqwest::Response, String>>;

/// A machine's end of the wire.
#[derive(Debug)]
pub struct Line(pub mpsc::UnboundedSender<(Question, Reply)>);

impl Wire for Line {
    fn ask(&self, request: reqwest::Request) -> BoxFuture<'static, Result<reqwest::Response, String>> {
        let out = self.0.clone();
        Box::pin(async move {
            let url = request.url();
            let path = url.query().map_or_else(|| url.path().to_owned(), |q| format!("{}?{q}", url.path()));
            let question = Question {
                method: request.method().clone(),
                to: Who::of_host(url.host_str().unwrap_or_default()).ok_or("no such host")?,
                path,
                headers: request.headers().clone(),
                body: request.body().and_then(|b| b.as_bytes()).map(Bytes::copy_from_slice).unwrap_or_default(),
            };
            let (reply, answer) = oneshot::channel();
            out.send((question, reply)).map_err(|_| "the network is gone")?;
            answer.await.map_err(|_| "the connection broke".to_owned())?
        })
    }
}

/// An answer on its way.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Headers.
    pub headers: Vec<(String, String)>,
    /// The body as it was sent.
    pub body: Bytes,
    /// It ends after so many bytes, as when a connection breaks.
    pub cut: Option<usize>,
}

impl Answer {
    /// An answer with a body.
    pub fn new(status: u16, body: impl Into<Bytes>) -> Answer {
        Answer { status, headers: Vec::new(), body: body.into(), cut: None }
    }
    /// With a header.
    pub fn with(mut self, name: &str, value: impl ToString) -> Answer {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }
    /// What a captive portal says to everything.
    pub fn page() -> Answer {
        Answer::new(200, "<!DOCTYPE html><html>please log in</html>").with("content-type", "text/html")
    }
    /// As product code meets it.
    pub fn arrive(self) -> reqwest::Response {
        let mut response = http::Response::builder().status(self.status);
        for (name, value) in &self.headers {
            response = response.header(name, value);
        }
        let stream = Stream { whole: self.body.len() as u64, cut: self.cut, left: self.body };
        response
            .body(reqwest::Body::wrap(stream))
            .map(Into::into)
            .unwrap_or_else(|_| http::Response::new(reqwest::Body::from("bad headers")).into())
    }
}

/// A body that may break off before its announced end.
struct Stream {
    whole: u64,
    cut: Option<usize>,
    left: Bytes,
}

impl Body for Stream {
    type Data = Bytes;
    type Error = std::io::Error;
    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        if let Some(at) = self.cut {
            if at == 0 {
                self.cut = None;
                self.left.clear();
                self.whole = 0;
                return Poll::Ready(Some(Err(std::io::ErrorKind::ConnectionReset.into())));
            }
            self.cut = Some(0);
            let n = at.min(self.left.len());
            return Poll::Ready(Some(Ok(Frame::data(self.left.split_to(n)))));
        }
        if self.left.is_empty() {
            return Poll::Ready(None);
        }
        let n = self.left.len().div_ceil(2);
        Poll::Ready(Some(Ok(Frame::data(self.left.split_to(n)))))
    }
    fn is_end_stream(&self) -> bool {
        self.left.is_empty() && self.cut.is_none()
    }
    fn size_hint(&self) -> SizeHint {
        match self.cut {
            Some(_) => SizeHint::with_exact(self.whole),
            None => SizeHint::with_exact(self.left.len() as u64),
        }
    }
}

/// How a way between two machines behaves.
#[derive(Debug, Clone, Copy, Default)]
pub struct Way {
    /// Nothing passes until then.
    pub down_until: Ms,
    /// It is unreliable until then.
    pub bad_until: Ms,
}

/// What becomes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It arrives after this.
    Arrives(Ms),
    /// It arrives twice.
    Twice(Ms, Ms),
    /// It is lost; the sender knows after this.
    Lost(Ms),
}

/// All ways.
#[derive(Debug, Default)]
pub struct Net {
    /// Ways that have had trouble.
    pub ways: BTreeMap<(Who, Who), Way>,
}

impl Net {
    /// The way between two machines, for changing.
    pub fn way(&mut self, from: Who, to: Who) -> &mut Way {
        self.ways.entry((from, to)).or_default()
    }
    /// All is well from now on.
    pub fn heal(&mut self) {
        self.ways.clear();
    }
    /// Throws the dice for one message.
    pub fn fate(&self, from: Who, to: Who, now: Ms, dice: &mut Dice) -> Fate {
        let way = self.ways.get(&(from, to)).copied().unwrap_or_default();
        if now < way.down_until {
            return Fate::Lost(dice.between(1, 30_000));
        }
        let near = dice.between(1, 40);
        if now < way.bad_until {
            return match dice.below(100) {
                0..30 => Fate::Lost(dice.between(1000, 30_000)),
                30..45 => Fate::Twice(near, dice.between(1, 20_000)),
                45..80 => Fate::Arrives(dice.between(1, 20_000)),
                _ => Fate::Arrives(near),
            };
        }
        Fate::Arrives(near)
    }
    /// What becomes of an answer's body on a bad way.
    pub fn harm(&self, from: Who, to: Who, now: Ms, answer: &mut Answer, dice: &mut Dice) -> Option<&'static str> {
        let bad = self.ways.get(&(from, to)).is_some_and(|w| now < w.bad_until);
        if !bad || answer.body.is_empty() || !dice.percent(35) {
            return None;
        }
        Some(match dice.below(5) {
            0 | 1 => {
                answer.cut = Some(dice.index(answer.body.len()));
                "cut"
            }
            2 => {
                let mut bytes = answer.body.to_vec();
                let at = dice.index(bytes.len());
                bytes[at] ^= 1 << dice.below(8);
                answer.body = bytes.into();
                "bent"
            }
            3 => {
                *answer = Answer::page();
                "page"
            }
            _ => {
                *answer = Answer::new(*dice.pick(&[500u16, 502, 503, 429]), "no");
                "status"
            }
        })
    }
}
